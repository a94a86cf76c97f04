"""Tiny random models of transformers; imported when they are made, because that takes seconds."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fuzz.base import Base, Data, Pipeline, add, unpack

SLOTS = ("set", "getitem", "collate", "encoder", "model", "precision", "loaders", "hugging_face", "copies")
SMALL: dict[str, Any] = {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": 2}
SMALL_BERT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def _gpt2() -> Any:
    import transformers as t

    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, **SMALL))


def _llama() -> Any:
    import transformers as t

    config = t.LlamaConfig(**SMALL_BERT, **SMALL, max_position_embeddings=8, num_key_value_heads=2)
    return t.LlamaForCausalLM(config)


def _bert() -> Any:
    import transformers as t

    return t.BertForSequenceClassification(
        t.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **SMALL_BERT)
    )


def _vit() -> Any:
    import transformers as t

    return t.ViTForImageClassification(
        t.ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **SMALL_BERT)
    )


class Tokens(Data):
    is_outermost = True  # other datasets change the pair that it makes a dictionary of

    def item(self, index: int) -> Any:
        x, y = super().item(index)
        tokens = (x * 3).long() % 11
        return {"input_ids": tokens, "labels": tokens, "y": y, "x": x}


class AsEncoding(Pipeline):
    def make_options(self) -> dict[str, Any]:
        from transformers import BatchEncoding

        return super().make_options() | {"collate_fn": functools.partial(_encode, BatchEncoding)}


def _encode(kind: Any, samples: list[Any]) -> Any:
    return kind(default_collate(samples))


class Wrapped(Base):
    """Keeps the model's output on itself, as many do."""

    def make_model(self) -> Any:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.model = self.make_model()

    def arguments(self, batch: Any) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def compute(self, batch: Any) -> Tensor:
        self.last = self.model(**self.arguments(batch))
        return super().compute(batch) + self.last.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = unpack(batch)
        self.log("val_loss", torch.nn.functional.cross_entropy(self(x), y))


class Labelled(Wrapped):
    def arguments(self, batch: Any) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"], "labels": batch["y"]}


class Pictures(Wrapped):
    def arguments(self, batch: Any) -> dict[str, Tensor]:
        return {"pixel_values": batch["x"].repeat(1, 4).view(-1, 1, 4, 4), "labels": batch["y"]}


def _model(base: type[Wrapped], make: Any) -> type[Wrapped]:
    return type("Model", (base,), {"make_model": lambda self: make()})


class CheckpointedGpt2(Wrapped):
    def make_model(self) -> Any:
        model = _gpt2()
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
        return model


class FrozenBert(Labelled):
    """Head warm-up: the body is frozen in the first epoch by the step."""

    def make_model(self) -> Any:
        return _bert()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.model.bert.requires_grad_(self.current_epoch > 0)
        return super().training_step(batch, batch_idx)


add("hugging_face_gpt2", _model(Wrapped, _gpt2), Tokens, slot=SLOTS, reference=False)
add("hugging_face_llama", _model(Wrapped, _llama), Tokens, slot=SLOTS, reference=False)
add("hugging_face_bert", _model(Labelled, _bert), Tokens, slot=SLOTS, reference=False)
add("hugging_face_vit", _model(Pictures, _vit), Tokens, slot=SLOTS, reference=False)
add(
    "hugging_face_batch_encoding", _model(Wrapped, _gpt2), Tokens, AsEncoding, slot=(*SLOTS, "workers"), reference=False
)
add("hugging_face_checkpointing", CheckpointedGpt2, Tokens, slot=SLOTS, reference=False)
add("hugging_face_frozen_body", FrozenBert, Tokens, slot=SLOTS, reference=False)


class WithoutOutput(Labelled):
    """Keeps nothing of a pass: the plain SAM of the tests can copy it."""

    def make_model(self) -> Any:
        return _bert()

    def compute(self, batch: Any) -> Tensor:
        return Base.compute(self, batch) + self.model(**self.arguments(batch)).loss


add("hugging_face_without_output", WithoutOutput, Tokens, slot=SLOTS)
