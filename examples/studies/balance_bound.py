r"""A bound on the error of a ReLU chain on new samples that grows with the balance of its basis paths.

arXiv 1903.02237 bounds the generalisation error by a function of the ratio of the largest to the smallest value of a
basis path. Its full text was not at hand, so that **this bound is ours**: the PAC-Bayes bound that such a ratio enters
most directly. It holds for the noisy network, whose paths are all multiplied by random factors, and for every loss of 0
or 1; the loss that training minimises does not enter.

**The noisy network.** A chain is a skeleton (an in-edge and an out-edge per hidden unit), a sign per hidden unit, and
the values of its ``d`` basis paths (see ``PathGeometry``). The noise ``Q`` keeps skeleton and signs, and draws each
``ln|v_e|`` evenly from ``s`` below to ``s`` above its value: a relative change of the path.

**The prior.** It may not know the samples. Drawn evenly: one of ``K`` skeletons, the signs of ``d`` paths and ``H``
hidden units, ``s`` out of a list, and the ends ``a < b`` of a range out of a grid of steps ``h``; then each ``ln|v_e|``
evenly from ``a - s`` to ``b + s``. Where the range takes in all paths, the density of ``Q`` over that of the prior is
constant; the smallest such range is shorter than ``ln(balance) + 2 h``, so that

    KL(Q, prior) <= d ln(1 + (ln(balance) + 2 h) / (2 s)) + (d + H) ln 2 + ln(K) + 2 ln(grid) + ln(list).

**The bound** (Seeger 2002, Maurer 2004): with probability ``1 - delta`` over ``n`` independent training samples, for
every ``Q`` at once, ``s`` chosen afterwards included,

    kl(error of Q on the samples, error of Q on new ones) <= (KL(Q, prior) + ln(2 sqrt(n) / delta)) / n,

with ``kl(q, p) = q ln(q/p) + (1-q) ln((1-q)/(1-p))``. The right side of the study is the largest such ``p``. How flat
the loss is in relative changes of paths enters by the error of ``Q`` on the samples, the balance by ``KL``.

**Where it applies:** to chains without a path of value zero (the balance is infinite) and without a dead unit. It says
something only where ``d`` is small against ``n``: each path costs one to several nats.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_flatness.estimators.balance import balance
from lightning_flatness.geometry import PathChart, PathGeometry

NOISES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The list that ``s`` is from."""
STEP = 0.25
LARGEST = 50.0
"""The grid of the ends of ranges of ``ln|v|``: steps, and how far from 0."""
NUM_ENDS = 2 * round(LARGEST / STEP) + 1
DELTA = 0.05

Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Complexity:
    """What the bound needs to know of a chain, beside its errors.

    Attributes:
        num_paths: Basis paths, ``d``.
        num_units: Hidden units, ``H``.
        log_skeletons: ``ln(K)``.
        log_balance: ``ln(max|v| / min|v|)``; infinite where the bound does not apply.
    """

    num_paths: int
    num_units: int
    log_skeletons: float
    log_balance: float

    @property
    def applies(self) -> bool:
        """Whether the bound applies: no path is zero, no unit dead."""
        return math.isfinite(self.log_balance)

    def divergence(self, noise: float) -> float:
        """Return the bound on ``KL(Q, prior)`` in nats, for noise of half width ``s``."""
        per_path = math.log1p((self.log_balance + 2 * STEP) / (2 * noise))
        chosen = self.log_skeletons + 2 * math.log(NUM_ENDS) + math.log(len(NOISES))
        return self.num_paths * per_path + (self.num_paths + self.num_units) * math.log(2) + chosen

    def budget(self, noise: float, num_train: int) -> float:
        """Return what ``kl(error on samples, error on new ones)`` is at most, with probability ``1 - DELTA``."""
        return (self.divergence(noise) + math.log(2 * math.sqrt(num_train) / DELTA)) / num_train


def complexity_of(module: nn.Sequential) -> Complexity:
    """Return the complexity of a chain at its weights, in float64."""
    return _complexity(module, _chart(_exact_copy(module)))


def _exact_copy(module: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _chart(module: nn.Sequential) -> PathChart:
    return PathGeometry().chart(module, list(module.parameters()), torch.float64)


def _complexity(module: nn.Sequential, chart: PathChart) -> Complexity:
    layers = [layer for layer in module if isinstance(layer, nn.Linear | nn.Conv2d)]
    hidden, skeletons = 0, 0.0
    for layer, following in pairwise(layers):
        units = len(layer.weight)
        hidden += units
        skeletons += units * (math.log(layer.weight.numel() / units) + math.log(following.weight.numel() / units))
    moduli = chart.values.abs()
    applies = chart.num_hidden_units == hidden and bool((moduli > 0).all())
    applies = applies and bool((moduli.log().abs() <= LARGEST).all())
    return Complexity(
        chart.num_coordinates, hidden, skeletons, math.log(float(balance(chart.values))) if applies else math.inf
    )


def largest_error(error: float, budget: float) -> float:
    """Return the largest ``p`` with ``kl(error, p) <= budget``, by bisection."""
    low, high = error, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(error, middle) <= budget else (low, middle)
    return high


def binary_kl(q: float, p: float) -> float:
    """Return ``q ln(q/p) + (1-q) ln((1-q)/(1-p))``; infinite where ``p`` rules out what ``q`` does not."""
    terms = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            terms += a * math.log(a / b) if b > 0 else math.inf
    return terms


class NoisyChain:
    """A chain whose basis paths can be multiplied by random factors: a copy in float64 on the CPU.

    Args:
        module: The chain.
        num_draws: How many noisy networks stand for all.
        seed: Of the draws, which are the same for all samples.
    """

    def __init__(self, module: nn.Sequential, num_draws: int, seed: int = 0) -> None:
        self._module = _exact_copy(module)
        self._chart = _chart(self._module)
        self._weights = parameters_to_vector(self._module.parameters()).detach().clone()
        self._num_draws = num_draws
        self._seed = seed
        self.complexity = _complexity(self._module, self._chart)

    def error(self, samples: Samples, noise: float) -> tuple[float, float]:
        """Return the mean error rate of noisy networks on some samples, and its standard error over draws.

        Args:
            samples: Images and classes.
            noise: Half width ``s``; 0 for the network itself.

        Returns:
            Two numbers from 0 to 1; the second is 0 for the network itself.
        """
        x, y = samples[0].to("cpu", torch.float64), samples[1].cpu()
        generator = torch.Generator().manual_seed(self._seed)
        rates = []
        for _ in range(self._num_draws if noise else 1):
            self._draw(noise, generator)
            with torch.no_grad():
                rates.append((self._module(x).argmax(dim=1) != y).double().mean())
        found = torch.stack(rates)
        spread = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        return float(found.mean()), spread

    def _draw(self, noise: float, generator: torch.Generator) -> None:
        """Multiply every path by a factor between ``exp(-noise)`` and ``exp(noise)``."""
        uniform = torch.rand(self._chart.num_coordinates, generator=generator, dtype=torch.float64)
        change = self._chart.values * torch.expm1(noise * (2 * uniform - 1))
        vector_to_parameters(self._weights + self._chart.displacement(change), self._module.parameters())


def bound_of(noisy: NoisyChain, train: Samples) -> tuple[float, float]:
    """Return the smallest bound over the list of noises, and the noise that has it.

    Args:
        noisy: The chain.
        train: What it was trained on, all of it.

    Returns:
        The bound on the error of the noisy network on new samples, from 0 to 1, and ``s``.
    """
    bounds = [
        largest_error(noisy.error(train, noise)[0], noisy.complexity.budget(noise, len(train[0]))) for noise in NOISES
    ]
    best = min(range(len(NOISES)), key=bounds.__getitem__)
    return bounds[best], NOISES[best]
