"""Cross-entropy over a large vocabulary: the derivatives of torch's, in less memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from memory import CountedMemory
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_flatness import LossLandscape, TopEigenvalues
from lightning_flatness.module.cross_entropy import LEAST_CLASSES, CompactCrossEntropy

CLASSES = LEAST_CLASSES + 100


class Tied(nn.Module):
    """Words in, words out, through one matrix."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, width)
        self.hidden = nn.Linear(width, width)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.hidden(self.words(words))), self.words.weight)


def problem(num_words: int = 300, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tied().to(dtype), torch.randint(CLASSES, (num_words, 2))


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"weight": torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)},
    "ignored": {"ignore_index": 7},
}


def derivatives(module: nn.Module, words: Tensor, options: dict[str, Any], order: int = 2) -> list[Tensor]:
    """Return the loss, its gradient, and derivatives along it, each of the one before."""
    logits, targets = module(words[:, 0]), words[:, 1].clone()
    targets[::5] = 7
    found = [F.cross_entropy(logits, targets, **options)]
    parameters = list(module.parameters())
    for _ in range(order):
        gradient = torch.autograd.grad(found[-1], parameters, create_graph=True)
        found.append(torch.stack([g.sin().sum() for g in gradient]).sum())
    return [*found, *torch.autograd.grad(found[-1], parameters)]


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("order", [0, 1, 2])  # so that the third derivative is taken, too
def test_values_and_derivatives_are_those_of_torch(name, order):
    module, words = problem()
    expected = derivatives(module, words, OPTIONS[name], order)
    with CompactCrossEntropy():
        found = derivatives(module, words, OPTIONS[name], order)
        assert "SumOfLosses" in _functions(F.cross_entropy(module(words[:, 0]), words[:, 1]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_loss_times_zero_has_its_mixed_derivatives():
    module, words = problem(20)
    found = []
    for mode in (CompactCrossEntropy(), nullcontext()):
        factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        with mode:
            loss = factor * F.cross_entropy(module(words[:, 0]), words[:, 1])
            gradient = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        v = [torch.ones_like(g) for g in gradient]
        found.append(torch.autograd.grad(gradient, [factor, *module.parameters()], v))
    assert found[0][0] != 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def _functions(loss: Tensor) -> str:
    nodes, pending = [], [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            nodes.append(node.name())
            pending += [following for following, _ in node.next_functions]
    return " ".join(nodes)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"reduction": "none"}])
def test_other_losses_are_torchs_own(options):
    module, words = problem(4)
    with CompactCrossEntropy():
        loss = F.cross_entropy(module(words[:, 0]), words[:, 1], **options).mean()
        few = F.cross_entropy(module.hidden(torch.ones(2, 3).double()), torch.tensor([0, 1]))
        soft = F.cross_entropy(module(words[:, 0]), torch.full((4, CLASSES), 1 / CLASSES).double())
    assert not any("SumOfLosses" in _functions(found) for found in (loss, few, soft))


def checkpointed(module: Any, words: Tensor) -> Tensor:
    hidden = module.hidden(module.words(words[:, 0]))
    head = module.words.weight
    losses = [
        checkpoint(lambda h, y: F.cross_entropy(F.linear(h, head), y, reduction="sum"), h, y, use_reentrant=False)
        for h, y in zip(hidden.split(2), words[:, 1].split(2), strict=True)
    ]
    return torch.stack(losses).sum() / len(words)


def penalised(module: nn.Module, words: Tensor) -> Tensor:
    logits = module(words[:, 0])
    slope = torch.func.grad(lambda f: F.cross_entropy(f, words[:, 1]))(logits)
    return F.cross_entropy(logits, words[:, 1]) + 10 * slope.square().sum()


def of_single_words(module: nn.Module, words: Tensor) -> Tensor:
    def slope(logits: Tensor, target: Tensor) -> Tensor:
        return torch.func.grad(lambda f: F.cross_entropy(f[None], target[None]))(logits)

    return torch.func.vmap(slope)(module(words[:, 0]), words[:, 1]).square().sum()


def without_labels(module: nn.Module, words: Tensor) -> Tensor:
    logits = module(words[:, 0])
    loss = F.cross_entropy(logits, torch.full((len(words),), -100))
    assert loss.isnan()
    return torch.where(loss.isnan(), 0, loss) + 1e-3 * logits.square().mean()


def of_bytes(module: nn.Module, words: Tensor) -> Tensor:
    return F.cross_entropy(module(words[:, 0]), (words[:, 1] % 256).byte())


@pytest.mark.parametrize("loss_fn", [checkpointed, penalised, of_single_words, without_labels, of_bytes])
def test_derivatives_of_a_users_loss_are_those_without_the_compact_one(loss_fn):
    module, words = problem(6)
    found = []
    for mode in (CompactCrossEntropy(), nullcontext()):
        with mode:
            loss = loss_fn(module, words)
        gradient = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        v = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g) for g in gradient]
        found.append([loss, *gradient, *torch.autograd.grad(gradient, list(module.parameters()), v)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)
    assert found[0][-1].norm() > 0


def next_word(module: nn.Module, words: Tensor) -> Tensor:
    return F.cross_entropy(module(words[:, 0]), words[:, 1])


def test_eigenvalues_are_those_of_the_plain_loss_by_the_exact_engine():
    module, words = problem()
    metric, plain = TopEigenvalues(tol=1e-6), TopEigenvalues(tol=1e-6)
    landscape = LossLandscape(module, list(words.split(100)), next_word, engine="exact")
    metric.update(landscape)
    assert landscape.engine == "kept"
    spelt_out = LossLandscape(
        module,
        list(words.split(100)),
        lambda m, w: -F.log_softmax(m(w[:, 0]), dim=1).gather(1, w[:, 1:]).mean(),
    )
    plain.update(spelt_out)
    assert float(metric.compute()) == pytest.approx(float(plain.compute()), rel=1e-6)
    assert float(landscape.cost.gradient_evaluations) == pytest.approx(spelt_out.cost.gradient_evaluations, rel=0.5)


def test_a_product_holds_less_than_two_copies_of_the_logits_more_than_a_step_of_training():
    module, words = problem(2000, torch.float32)
    logits = 4 * len(words) * CLASSES
    with CountedMemory() as step:
        next_word(module, words).backward()
    module.zero_grad()
    landscape = LossLandscape(module, [words], next_word)
    with CountedMemory() as product, landscape.measurement():
        for _ in range(2):
            landscape.hvp(torch.randn(landscape.num_parameters))
    assert product.peak - step.peak < 2 * logits
