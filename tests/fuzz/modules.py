"""Networks: layers, hooks, ties, parametrisations, checkpointing, scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fuzz.base import NUM_CLASSES, NUM_FEATURES, NUM_HIDDEN, Base, add, feature, unpack


def middle(name: str, make: Any, **options: Any) -> None:
    """Register a layer between encoder and head."""

    class WithLayer(Base):
        def make_middle(self) -> list[nn.Module]:
            return [*super().make_middle(), make()]

    add(name, WithLayer, **options)


def encoder(name: str, make: Any, **options: Any) -> None:
    """Register an encoder."""

    class WithEncoder(Base):
        def make_encoder(self) -> nn.Module:
            return make()

    add(name, WithEncoder, **({"slot": "encoder"} | options))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(NUM_HIDDEN, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.flip(1)], 1)
        return self.attention(tokens, tokens, tokens)[0][:, 0]


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(1, NUM_HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(-1))[0][:, -1]


class StatefulRecurrent(Recurrent):
    """Carries its hidden state from batch to batch, where the sizes allow."""

    def __init__(self) -> None:
        super().__init__(nn.GRU)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None or self.hidden.shape[1] != len(x) or self.hidden.dtype != x.dtype:
            self.hidden = x.new_zeros(1, len(x), NUM_HIDDEN)
        output, hidden = self.rnn(x.unsqueeze(-1), self.hidden)
        self.hidden = hidden.detach()
        return output[:, -1]


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(27, NUM_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x.view(-1, 1, 2, 2)))), 1)
        return self.out(x.flatten(1))


class ChannelsLast(nn.Module):
    """Weights, activations and gradients lie in memory channel by channel of a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 2, padding=1)
        self.second = nn.Conv2d(4, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(12, NUM_HIDDEN)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        images = x.view(-1, 1, 2, 2).to(memory_format=torch.channels_last)
        return self.out(self.norm(self.second(F.relu(self.first(images)))).flatten(1))


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, NUM_HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x * 2).long() % 5).mean(1)


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, NUM_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag((x * 2).long() % 5)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Linear(NUM_FEATURES, NUM_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.real(x)).abs()


def _old_weight_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(NUM_HIDDEN, NUM_HIDDEN))


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, NUM_HIDDEN), nn.Tanh())


def _scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.Tanh()))


def _traced() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.Tanh()), torch.ones(2, NUM_HIDDEN))


class Counted(nn.Module):
    """Has attributes that TorchScript keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.recent = [1.0]
        self.total = torch.zeros(1)
        self.linear = nn.Linear(NUM_HIDDEN, NUM_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.recent = self.recent[-2:] + [float(self.count)]  # noqa: RUF005 (TorchScript)
        self.total += 1.0
        return self.linear(x) * (1 + 0.01 * self.count + 0.01 * len(self.recent) + 0.001 * self.total.to(x.dtype))


def _scripted_attributes() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Counted())


def _scripted_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.BatchNorm1d(NUM_HIDDEN))


middle("batch_norm", lambda: nn.BatchNorm1d(NUM_HIDDEN))
middle("batch_norm_cumulative", lambda: nn.BatchNorm1d(NUM_HIDDEN, momentum=None))
middle("batch_norm_without_statistics", lambda: nn.BatchNorm1d(NUM_HIDDEN, track_running_stats=False), slot="averaging")
middle("layer_norm", lambda: nn.LayerNorm(NUM_HIDDEN))
middle("dropout", lambda: nn.Dropout(0.3))
middle("alpha_dropout", lambda: nn.AlphaDropout(0.2))
middle("random_relu", nn.RReLU, effects=False)  # draws as many numbers as are negative
middle("gelu", nn.GELU)
middle("prelu", nn.PReLU)
middle("residual", Residual)
middle("attention", Attention, slot="pruned")  # whose pruned weights keep the graph of the first pass, without us too
middle("transformer_layer", lambda: nn.TransformerEncoderLayer(NUM_HIDDEN, 2, 8, batch_first=True), slot="pruned")
middle("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(NUM_HIDDEN, NUM_HIDDEN)))
middle("weight_norm_of_the_old_kind", _old_weight_norm, reference=False)
middle("spectral_norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(NUM_HIDDEN, NUM_HIDDEN)))
middle("spectral_norm_of_the_old_kind", lambda: nn.utils.spectral_norm(nn.Linear(NUM_HIDDEN, NUM_HIDDEN)),
       reference=False)  # fmt: skip
middle("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(NUM_HIDDEN, NUM_HIDDEN)))
_SCRIPT = ("script", "precision")  # TorchScript casts otherwise once it has run a few times: no two runs are alike
middle("scripted_layer", _scripted, slot=_SCRIPT, reference=False)
middle("traced_layer", _traced, slot=_SCRIPT, reference=False)
middle("scripted_attributes", _scripted_attributes, slot=_SCRIPT, reference=False)
middle("scripted_batch_norm", _scripted_norm, slot=_SCRIPT, reference=False)
encoder("convolution", Convolutional)
encoder("channels_last", ChannelsLast)
encoder("lstm", lambda: Recurrent(nn.LSTM), slot=("encoder", "precision"))
encoder("gru", lambda: Recurrent(nn.GRU), slot=("encoder", "precision"))
encoder("stateful_rnn", StatefulRecurrent, reference=False, slot=("encoder", "precision"))
encoder("embedding", Embedded)
encoder("embedding_with_renorm", lambda: Embedded(max_norm=0.7))
encoder("embedding_bag", BagOfWords)
encoder("complex_numbers", Complex)
add(
    "sparse_embedding",
    type("SparseEmbedding", (Base,), {"make_encoder": lambda self: Embedded(sparse=True)}),
    slot=("encoder", "optimizer", "clip", "precision"),
)
add(
    "sparse_embedding_all",
    type("SparseEmbeddingAll", (Base,), {"make_encoder": lambda self: Embedded(sparse=True)}),
    slot=("encoder", "optimizer", "clip", "precision"),
    kinds=("monitor",),
    monitor={"metrics": "all"},
)
add(
    "batch_norm_all_in_train_mode",
    type("NormAll", (Base,), {"make_middle": lambda self: [nn.BatchNorm1d(NUM_HIDDEN), nn.Dropout(0.2)]}),
    kinds=("monitor",),
    monitor={"metrics": "all", "mode": "train"},
)


add(
    "channels_last_all",
    type("ChannelsLastAll", (Base,), {"make_encoder": lambda self: ChannelsLast()}),
    slot="encoder",
    kinds=("monitor",),
    monitor={"metrics": "all"},
)


@feature()
class TiedWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(NUM_CLASSES, NUM_HIDDEN, bias=False)
        self.second_head = nn.Linear(NUM_HIDDEN, NUM_CLASSES)
        self.second_head.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.second_head(self.decoder(super().forward(x)))


@feature()
class SharedSubmodule(Base):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.BatchNorm1d(NUM_HIDDEN))
        self.other = self.one

    def features(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(super().features(x))))


add(
    "shared_submodule_rebuilt",
    SharedSubmodule,
    kinds=("monitor",),
    monitor={"engine": "rebuilt"},
)


@feature()
class FrozenEncoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.requires_grad_(False)


@feature()
class FrozenBackboneInEval(Base):
    """Large beside what is trained, with BatchNorm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(NUM_FEATURES, 40), nn.BatchNorm1d(40), nn.Linear(40, NUM_HIDDEN))
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.backbone.eval()

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + self.backbone(x)


@feature()
class CheckpointAroundBatchNorm(Base):
    """Non-reentrant: the layer runs once more in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.BatchNorm1d(NUM_HIDDEN), nn.Tanh())

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, super().features(x), use_reentrant=False)


add(
    "checkpoint_around_batch_norm_in_train_mode",
    CheckpointAroundBatchNorm,
    kinds=("monitor",),
    monitor={"mode": "train"},
)


@feature()
class CheckpointAroundDropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.dropped = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.Dropout(0.3))

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.dropped, super().features(x), use_reentrant=False)


@feature()
class ReentrantCheckpoint(Base):
    def __init__(self) -> None:
        super().__init__()
        self.reentrant = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.Dropout(0.3))

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.reentrant, super().features(x), use_reentrant=True)


@feature()
class ReentrantCheckpointFirst(Base):
    """Its input needs no gradient, so the layer inside is not trained; Lightning users see a warning of torch."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x + 0 * checkpoint(self.first, x, use_reentrant=True))

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, NUM_FEATURES)


@feature()
class TensorHookInForward(Base):
    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: 2 * gradient)
        return h


@feature()
class CountingTensorHook(Base):
    """Grad-CAM: activations and their gradients are kept by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[Tensor] = []

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        if h.requires_grad:
            h.register_hook(self.gradients.append)
        return h


@feature()
class RetainedGradient(Base):
    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        if h.requires_grad:
            h.retain_grad()
        return h * 1.0


@feature(reference=False)
class ParameterHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.num_hook_calls = 0
        self.head.weight.register_hook(self._scale)

    def _scale(self, gradient: Tensor) -> Tensor:
        self.num_hook_calls += 1
        return 3 * gradient


@feature(reference=False, effects=False)
class HookAfterAccumulation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.accumulated: list[int] = []
        self.head.weight.register_post_accumulate_grad_hook(lambda p: self.accumulated.append(1))


@feature(reference=False)
class BackwardHookOfAModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backward_calls: list[int] = []
        self.head.register_full_backward_hook(lambda m, i, o: self.backward_calls.append(1))


@feature(reference=False)
class BackwardPreHookOfAModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_full_backward_pre_hook(lambda m, o: tuple(2 * g for g in o))


@feature(reference=False)
class ForwardHooksOfTheModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.num_seen = 0
        self.encoder.register_forward_hook(self._count)
        self.encoder.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 1.1,))

    def _count(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.num_seen += 1
        return output * (1 + 0.01 * self.num_seen)


class Straight(torch.autograd.Function):
    """Once differentiable only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@feature(slot="second_derivative")
class OnceDifferentiable(Base):
    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return h + 0.1 * Straight.apply(h)


@feature(slot="precision")
class AutocastInside(Base):
    def features(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = super().features(x)
        return h.to(x.dtype)


@feature()
class FunctionalCall(Base):
    def features(self, x: Tensor) -> Tensor:
        weights = {name: 1.1 * p for name, p in self.encoder.named_parameters()}
        return super().features(x) + 0.1 * torch.func.functional_call(self.encoder, weights, (x,))


@feature(slot="second_derivative")
class FunctionalGradient(Base):
    """MAML: one step of gradient descent inside."""

    def compute(self, batch: Any) -> Tensor:
        x, y = unpack(batch)
        weight, bias = self.head.weight, self.head.bias
        h = self.features(x)
        inner = F.cross_entropy(F.linear(h, weight, bias), y)
        (gradient,) = torch.autograd.grad(inner, weight, create_graph=True)
        return super().compute(batch) + F.cross_entropy(F.linear(h, weight - 0.1 * gradient, bias), y)


@feature()
class StochasticDepth(Base):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(NUM_HIDDEN, NUM_HIDDEN)

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return torch.tanh(self.deep(h)) if self.training and torch.rand(()) < 0.5 else h


@feature()
class UnusedParameters(Base):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


@feature()
class Detached(Base):
    """A part of the loss without graph, a part in `no_grad`."""

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        with torch.no_grad():
            target = self(x).softmax(1)
        return super().compute(batch) + 0.1 * F.mse_loss(self(x).softmax(1), target + 0.1)


@feature()
class Autoencoder(Base):
    """Variational, with the reparametrisation trick."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Linear(NUM_HIDDEN // 2, NUM_FEATURES)

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        mean, log_variance = self.features(x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return super().compute(batch) + 0.1 * F.mse_loss(self.decode(z), x)


@feature()
class VectorQuantiser(Base):
    """A codebook moved by averages, outside the gradient."""

    codebook: Tensor
    usage: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(4, NUM_HIDDEN))
        self.register_buffer("usage", torch.zeros(4, dtype=torch.long))

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        nearest = torch.cdist(h.detach().float(), self.codebook.float()).argmin(1)
        if self.training:
            for i in range(4):
                if (nearest == i).any():
                    self.codebook[i].lerp_(h.detach()[nearest == i].mean(0).to(self.codebook.dtype), 0.1)
            self.usage += 1
        return h + (self.codebook[nearest].to(h.dtype) - h).detach()


@feature(slot=("precision", "encoder"), trainer={"precision": "bf16-mixed"})
class FrozenBf16Backbone(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone16 = nn.Linear(NUM_FEATURES, NUM_FEATURES).to(torch.bfloat16).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        return super().features(self.backbone16(x).float())
