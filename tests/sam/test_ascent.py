"""The optimizer SAM with one gradient per step: a plain loop, its state, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.ascent_reference import ASCENTS, plain_ascent_loop
from helpers.sam_reference import ADAMW, SGD, assert_same_bits, make_loader, make_network, make_optimizer
from torch import nn
from torch.nn import functional as F

from lightning_flatness import SAM


def train(model, optimizer, *, num_epochs=3, with_closure=True, accumulate=1, seed=3):
    model.train()
    torch.manual_seed(seed)
    batches = list(make_loader(model[0].weight.dtype))
    for _ in range(num_epochs):
        for start in range(0, len(batches), accumulate):
            for x, y in batches[start : start + accumulate]:

                def closure(x=x, y=y):
                    if with_closure:
                        optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y) / accumulate
                    loss.backward()
                    return loss

                if with_closure:
                    optimizer.step(closure)
                else:
                    with optimizer.perturbed():
                        closure()
            if not with_closure:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("geometry", ["euclidean", "element", "layer"])
def test_equals_a_plain_loop(geometry, ascent, optimizer):
    model, plain = make_network(torch.float64), make_network(torch.float64)
    sam = SAM(make_optimizer(optimizer, model.parameters()), 0.1, geometry, module=model, ascent=ascent)
    train(model, sam)
    batches = list(make_loader(torch.float64))
    plain_ascent_loop(plain, batches, ascent=ascent, rho=0.1, optimizer=optimizer, geometry=geometry)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ascent", ASCENTS)
def test_without_a_closure_and_with_accumulated_gradients(ascent):
    model, plain = make_network(torch.float64), make_network(torch.float64)
    train(model, SAM(make_optimizer(SGD, model.parameters()), 0.1, ascent=ascent), with_closure=False, accumulate=2)
    plain_ascent_loop(plain, list(make_loader(torch.float64)), ascent=ascent, rho=0.1, accumulate=2)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ascent", ASCENTS)
def test_in_a_loop_with_a_loss_scaler(ascent):
    ends = []
    for scale in (None, 2.0**16):
        model, scaler = make_network(), torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        sam = SAM(make_optimizer(ADAMW, model.parameters()), 0.1, ascent=ascent)
        model.train()
        torch.manual_seed(3)
        for index, (x, y) in enumerate(list(make_loader()) * 2):
            with sam.perturbed():
                loss = F.cross_entropy(model(x), y)
                scaler.scale(loss * float("inf") if index == 3 and scale else loss).backward()
            if index != 3 or scale:  # a step that the scaler skips is none
                scaler.step(sam)
                scaler.update()
            sam.zero_grad()
        ends.append((dict(model.state_dict()), sam.state_dict()["state"]))
    assert_same_bits(*ends)


@pytest.mark.parametrize("ascent", ASCENTS)
def test_rho_zero_is_the_wrapped_optimizer_bit_for_bit(ascent):
    model, plain = make_network(), make_network()
    sam, alone = (
        SAM(make_optimizer(SGD, model.parameters()), 0.0, ascent=ascent),
        make_optimizer(SGD, plain.parameters()),
    )
    train(model, sam)
    train(plain, alone)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert_same_bits(sam.state_dict(), alone.state_dict())


@pytest.mark.parametrize("ascent", ASCENTS)
def test_checkpoints_and_copies_go_on_bit_for_bit(ascent):
    whole = make_network()
    whole[3].p = 0.0
    begun = copy.deepcopy(whole)
    train(whole, SAM(make_optimizer(ADAMW, whole.parameters()), ascent=ascent), num_epochs=2)
    first = SAM(make_optimizer(ADAMW, begun.parameters()), ascent=ascent)
    train(begun, first, num_epochs=1)
    copied, its = copy.deepcopy((begun, first))
    assert pickle.loads(pickle.dumps(its)).ascent == ascent
    assert f"ascent='{ascent}'" in repr(its)
    resumed = copy.deepcopy(begun)
    second = SAM(make_optimizer(ADAMW, resumed.parameters()), ascent=ascent)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((copied, its), (resumed, second)):
        train(model, optimizer, num_epochs=1)
        assert_same_bits(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("ascent", ASCENTS)
def test_an_exception_puts_the_weights_back(ascent):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    sam = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), 0.5, ascent=ascent)
    sam.step(lambda: w.square().sum().backward())
    before, seen = w.detach().clone(), []

    def failing():
        seen.append(w.detach().clone())
        raise RuntimeError("as a test")

    with pytest.raises(RuntimeError, match="as a test"):
        sam.step(failing)
    assert float((seen[0] - before).norm()) == pytest.approx(0.5)
    assert torch.equal(w, before)
    with pytest.raises(RuntimeError, match=r"leave gradients .* got none at the perturbed weights"):
        sam.step(lambda: None)
    assert torch.equal(w, before)


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_the_buffers_of_the_optimizer_are_not_written_to(geometry, scale):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    buffer = base.state[w]["momentum_buffer"] = torch.tensor([3.0, 4.0]) * scale
    before = buffer.clone()
    change = torch.tensor([0.3, 0.4]) if geometry == "euclidean" else 0.5 * torch.tensor([3.0, 16.0]) / 73**0.5
    with SAM(base, 0.5, geometry, ascent="momentum").perturbed():
        torch.testing.assert_close(w.detach(), torch.tensor([1.0, -2.0]) - change)
    assert torch.equal(buffer, before)


def test_the_loss_is_that_at_the_perturbed_weights():
    w = nn.Parameter(torch.tensor([1.0]))
    sam = SAM(torch.optim.SGD([w], lr=0.0), 0.5, ascent="previous")

    def closure():
        loss = w.square().sum()
        loss.backward()
        return loss

    assert [float(sam.step(closure).detach()) for _ in range(2)] == [1.0, 2.25]


def test_what_is_refused():
    w = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match=r"Expected `ascent` to be one of 'gradient', .* got 'foo'"):
        SAM(base, ascent="foo")
    with pytest.raises(ValueError, match=r"with momentum for ascent='momentum', got SGD without. Use e.g. torch.optim"):
        SAM(base, ascent="momentum")
    with (
        pytest.raises(
            ValueError, match=r"Expected `ascent` to be 'momentum' or 'previous', got 'gradient'.*step\(clos"
        ),
        SAM(base).perturbed(),
    ):
        pass
