"""A TrainerCallback that logs the flatness of a language model with Hugging Face's Trainer; here a tiny random GPT-2.

.venv/bin/python examples/loops/hugging_face.py

Needs ``pip install transformers accelerate`` (the extra ``examples``). For your own model, copy the class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from lightning_flatness import FlatnessTracker


class FlatnessCallback(transformers.TrainerCallback):
    """Measures before training and after each epoch, on samples of the training set.

    Args:
        log: Where to: ``trainer.log``, which hands the values to every integration of the Trainer.
        options: Other arguments of :class:`FlatnessTracker`.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], **options: Any) -> None:
        self.log = log
        self.options = options
        self.tracker: FlatnessTracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        loader, optimizer = given["train_dataloader"], given["optimizer"]
        self.tracker = FlatnessTracker(
            given["model"],
            DataLoader(loader.dataset, args.per_device_train_batch_size, collate_fn=loader.collate_fn),
            loss_fn=lambda model, batch: model(**batch).loss,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
            log=lambda values, step: self.log(values),
            **self.options,
        )
        self.tracker.measure(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.tracker is not None
        self.tracker.measure(state.global_step)


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Counting up from random numbers, which even a tiny model learns."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) + index) % 16
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("logs/hugging_face"))
    args = parser.parse_args()

    transformers.set_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(
            output_dir=str(args.out), num_train_epochs=args.epochs, per_device_train_batch_size=16, learning_rate=3e-3,
            logging_steps=4, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Sequences(),
    )  # fmt: skip
    trainer.add_callback(FlatnessCallback(trainer.log, probe_size=64))
    trainer.train()
    for entry in trainer.state.log_history:
        if "flatness/lambda_max" in entry:
            print(f"step {entry['step']}: lambda_max {entry['flatness/lambda_max']:.4g}")


if __name__ == "__main__":
    main()
