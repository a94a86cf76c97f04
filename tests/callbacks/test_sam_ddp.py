"""SAM on two processes (gloo): the same weights as one process on the same samples, or m-sharpness on request."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.ranks import printed, start_ranks
from helpers.sam_ddp_script import BATCH_SIZE, NUM_EPOCHS, NUM_SAMPLES, SCENARIOS, Small, run
from helpers.sam_reference import assert_same_bits, make_loader, plain_sam_gradient
from torch.nn import functional as F

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*does not have many workers")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Run all scenarios once, in two processes that find each other as under torchrun."""
    directory = tmp_path_factory.mktemp("ddp")
    processes = start_ranks("sam_ddp_script.py", str(directory), out=directory)
    deadline = time.monotonic() + 600
    try:  # a rank that fails leaves the other waiting
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(p.returncode == 0 for p in processes), printed(directory)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_ranks_agree(ranks, name):
    first, second = (rank[name] for rank in ranks)
    if "still" not in name:  # the ranks have BatchNorm statistics of their own
        assert_same_bits(first["weights"], second["weights"])
    for key in first["logged"].keys() - {"loss_step"}:
        assert first["logged"][key] == pytest.approx(second["logged"][key], rel=1e-6)
    assert first["num_calls"] == NUM_EPOCHS * NUM_SAMPLES // (2 * BATCH_SIZE)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "plain",
            "layer",
            "accumulate",
            "accumulate_views",
            "accumulate_views_in_place",
            "in_place",
            "static",
            "without",
            "momentum",
            "momentum_accumulate",
            "previous",
            "previous_accumulate",
        ),
        *(name for name in SCENARIOS if name.startswith("only_")),
    ],
)
def test_two_ranks_equal_one_process_on_the_same_samples(ranks, name):
    one = run(**({"ddp": None} | SCENARIOS[name] | {"devices": 1}))
    two = ranks[0][name]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-12, atol=1e-12)
    assert two["global_step"] == one["global_step"]
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-5, nan_ok=False)
    takes_one_gradient = "momentum" in name or "previous" in name
    assert ("sam/loss_rise" in two["logged"]) == (name != "without" and not takes_one_gradient)
    assert ("sam/perturbation_norm" in two["logged"]) == (name != "without")


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "only_" in name or "uneven_clean" in name])
def test_only_the_gradients_of_the_second_pass_count(ranks, name):
    weights = ranks[0][name]["weights"]["sometimes"]
    assert bool(weights.any()) == ("perturbed" in name)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("unused")])
def test_a_weight_without_gradient_is_not_decayed(ranks, name):
    assert torch.equal(ranks[0][name]["weights"]["sometimes"], torch.ones(3, dtype=torch.float64))


def test_rho_zero_is_bit_identical_to_no_callback_on_two_ranks(ranks):
    for rank in ranks:
        assert_same_bits(rank["zero"], rank["without"])


def _m_sharpness(accumulate: int, vanishing: bool = False) -> dict[str, torch.Tensor]:
    """Each half of a batch perturbed with its own gradient, in plain PyTorch."""
    small = Small()
    optimizer = small.configure_optimizers()
    parameters = [p for p in small.parameters() if p.requires_grad]
    batches = list(make_loader(torch.float64, 2 * BATCH_SIZE, NUM_SAMPLES))
    for _ in range(NUM_EPOCHS):
        for start in range(0, len(batches), accumulate):
            total = [torch.zeros_like(p) for p in parameters]
            for index, (x, y) in enumerate(batches[start : start + accumulate], start):
                for rank in range(2):
                    if vanishing and index % 2 == rank:
                        continue
                    gradients, _, _ = plain_sam_gradient(
                        small.net, lambda: F.cross_entropy(small.net(x[rank::2]), y[rank::2]), 0.1, "euclidean"
                    )
                    total = [t + g / accumulate / 2 for t, g in zip(total, gradients, strict=True)]
            for p, t in zip(parameters, total, strict=True):
                p.grad = t
            optimizer.step()
    return small.state_dict()


@pytest.mark.parametrize(("name", "accumulate"), [("local", 1), ("local_accumulate", 2), ("vanishing_local", 1)])
def test_unsynchronised_perturbation_is_m_sharpness(ranks, name, accumulate):
    expected = _m_sharpness(accumulate, vanishing="vanishing" in name)
    torch.testing.assert_close(ranks[0][name]["weights"], expected, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_on_one_rank_perturbs_with_the_others(ranks):
    """Half the samples count: the loss of one process is then half the loss of the other half of the batch."""
    small = Small()
    optimizer, parameters = small.configure_optimizers(), [p for p in small.parameters() if p.requires_grad]
    batches = list(make_loader(torch.float64, 2 * BATCH_SIZE, NUM_SAMPLES))
    for _ in range(NUM_EPOCHS):
        for start in range(0, len(batches), 2):
            total = [torch.zeros_like(p) for p in parameters]
            for index, (x, y) in enumerate(batches[start : start + 2], start):
                rank = 1 - index % 2
                gradients, _, _ = plain_sam_gradient(
                    small.net, lambda: F.cross_entropy(small.net(x[rank::2]), y[rank::2]), 0.1, "euclidean"
                )
                total = [t + g / 4 for t, g in zip(total, gradients, strict=True)]
            for p, t in zip(parameters, total, strict=True):
                p.grad = t
            optimizer.step()
    torch.testing.assert_close(ranks[0]["vanishing"]["weights"], small.state_dict(), rtol=1e-12, atol=1e-12)


def test_unsynchronised_perturbation_saves_the_first_all_reduce(ranks):
    num_steps = {name: ranks[0][name]["global_step"] for name in SCENARIOS}
    assert num_steps["plain"] == 10
    assert num_steps["accumulate"] == 6
    reduced = {name: ranks[0][name]["num_reduced"] / num_steps[name] for name in SCENARIOS}
    assert reduced["without"] == reduced["local"] == reduced["local_accumulate"] == 1
    assert reduced["momentum"] == reduced["momentum_accumulate"] == reduced["previous"] == 1
    assert reduced["plain"] == reduced["accumulate"] == 2
    assert ranks[0]["local_accumulate"]["num_averaged"] == 0
    assert ranks[0]["accumulate"]["num_averaged"] == 10 - 6  # the microbatches after which no step follows


@pytest.mark.parametrize("name", ["still", "still_local"])
def test_no_trace_on_two_ranks(ranks, name):
    """Learning rate zero: BatchNorm statistics and logs are as without SAM, on each rank."""
    for rank in ranks:
        with_sam, without = rank[name], rank["still_without"]
        assert_same_bits(with_sam["weights"], without["weights"])
        logged = {k: v for k, v in with_sam["logged"].items() if not k.startswith("sam/")}
        assert logged == without["logged"]
