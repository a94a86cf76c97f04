"""The bound of the study of PSI-flatness against plain loops, numerical integrals and a known population."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import nn

pytestmark = pytest.mark.usefixtures("import_path_of_studies")


def chain(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def paths_by_hand(module, skeleton=None):
    """Return the skeleton of a chain with one hidden layer, and the values of its basis paths, each by plain loops."""
    (first, bias), (last, last_bias) = (
        (layer.weight.tolist(), layer.bias.tolist()) for layer in (module[0], module[2])
    )
    units = range(len(first))
    if skeleton is None:
        in_edges = [max(range(len(first[j])), key=lambda i, j=j: abs(first[j][i])) for j in units]
        out_edges = [max(range(len(last)), key=lambda k, j=j: abs(last[k][j])) for j in units]
        skeleton = in_edges, out_edges
    in_edges, out_edges = skeleton
    values = {}
    for j in units:
        into, out = first[j][in_edges[j]], last[out_edges[j]][j]
        values |= {("in", i, j): first[j][i] * out for i in range(len(first[j]))} | {("bias", j): bias[j] * out}
        values |= {("out", j, k): into * last[k][j] for k in range(len(last))}
        del values["in", in_edges[j], j]  # the same path as that through the out-edge
    return skeleton, values | {("bias of output", k): value for k, value in enumerate(last_bias)}


@pytest.mark.parametrize("seed", range(3))
def test_complexity_is_that_of_plain_loops(seed):
    from balance_bound import complexity_of

    found = complexity_of(chain(3, 4, 2, seed=seed))
    _, values = paths_by_hand(chain(3, 4, 2, seed=seed))
    moduli = [abs(v) for v in values.values()]
    assert (found.num_paths, found.num_units, found.applies) == (len(values), 4, True)
    assert found.log_balance == pytest.approx(math.log(max(moduli) / min(moduli)), rel=1e-10)
    skeletons = list(itertools.product(itertools.product(range(3), repeat=4), itertools.product(range(2), repeat=4)))
    assert found.log_skeletons == pytest.approx(math.log(len(skeletons)))


def test_skeletons_of_convolutions_have_an_edge_per_tap():
    from balance_bound import complexity_of

    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 5))
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1.0
    into, between, out = 9, (2 * 4, 3 * 4), 4 * 5  # in-edges of 2 units; of 3 units in, of 2 units out; out of 3 units
    expected = 2 * math.log(into * between[1]) + 3 * math.log(between[0] * out)
    found = complexity_of(net)
    assert found.log_skeletons == pytest.approx(expected)
    assert found.num_paths == sum(p.numel() for p in net.parameters()) - 5


@pytest.mark.parametrize("noise", [0.05, 0.4])
def test_every_path_of_the_noisy_network_is_multiplied_by_its_factor(noise):
    from balance_bound import NoisyChain

    module = chain(5, 6, 4)
    skeleton, before = paths_by_hand(module)
    noisy, generator = NoisyChain(module, 2), torch.Generator().manual_seed(0)
    logs = []
    for _ in range(20):
        noisy._draw(noise, generator)
        _, after = paths_by_hand(noisy._module, skeleton)
        logs += [math.log(after[path] / before[path]) for path in before]  # no sign changes
    assert max(map(abs, logs)) <= noise * (1 + 1e-9)
    assert stats.kstest(logs, stats.uniform(-noise, 2 * noise).cdf).pvalue > 0.01
    assert torch.equal(module[0].weight, chain(5, 6, 4)[0].weight)


@pytest.mark.parametrize("noise", [0.05, 0.8])
def test_divergence_is_no_less_than_that_of_the_prior(noise):
    """The prior of the docstring, made by hand: the range on the grid that takes in all paths, and its densities."""
    from balance_bound import LARGEST, NOISES, STEP, complexity_of

    module = chain(3, 4, 2)
    _, values = paths_by_hand(module)
    logs = [math.log(abs(v)) for v in values.values()]
    grid = np.arange(-LARGEST, LARGEST + STEP / 2, STEP)
    low, high = grid[grid <= min(logs)].max(), grid[grid >= max(logs)].min()
    prior = stats.uniform(low - noise, high - low + 2 * noise)
    exact = math.log(3**4 * 2**4) + math.log(len(grid) ** 2) + math.log(len(NOISES)) + (len(values) + 4) * math.log(2)
    for log in logs:
        q = stats.uniform(log - noise, 2 * noise)
        ends = log - noise + 1e-9, log + noise - 1e-9
        exact += integrate.quad(lambda v, q=q: q.pdf(v) * (q.logpdf(v) - prior.logpdf(v)), *ends)[0]
    found = complexity_of(module).divergence(noise)
    assert exact <= found <= exact + len(values) * 2 * STEP / (high - low)


@pytest.mark.parametrize(("error", "budget"), [(0.0, 0.1), (0.2, 0.04), (0.5, 1e-4), (0.9, 0.01)])
def test_largest_error_is_the_root(error, budget):
    from balance_bound import largest_error

    def excess(p):
        return stats.entropy([error, 1 - error], [p, 1 - p]) - budget

    assert largest_error(error, budget) == pytest.approx(optimize.brentq(excess, error + 1e-12, 1 - 1e-12), abs=1e-9)
    assert largest_error(error, 0.0) == pytest.approx(error, abs=1e-7)
    assert largest_error(error, math.inf) == 1.0


def test_bound_holds_for_networks_chosen_by_their_training_error():
    """A thousand random networks, the best on few samples of a known population: what the bound has to withstand."""
    from balance_bound import NoisyChain, bound_of

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    y = (chain(2, 3, 2, seed=99)(x).argmax(dim=1) ^ (torch.rand(len(x), generator=generator) < 0.1)).long()
    for trial in range(5):
        chosen = torch.randint(len(x), (1500,), generator=generator)
        train = x[chosen], y[chosen]
        nets = [chain(2, 3, 2, seed=1000 * trial + i) for i in range(200)]
        best = min(nets, key=lambda net: float((net(train[0]).argmax(dim=1) != train[1]).double().mean()))
        noisy = NoisyChain(best, 20)
        bound, noise = bound_of(noisy, train)
        error, spread = noisy.error((x, y), noise)
        on_samples = noisy.error(train, noise)[0]
        assert on_samples < bound < 0.9
        assert error + 3 * spread < bound


def test_bound_does_not_apply_to_a_path_of_zero_or_a_dead_unit():
    from balance_bound import NoisyChain, complexity_of

    for change in (lambda net: net[2].bias[0].zero_(), lambda net: net[0].weight[1].zero_()):
        module = chain(3, 4, 2)
        with torch.no_grad():
            change(module)
        assert not complexity_of(module).applies
        assert not NoisyChain(module, 2).complexity.applies
