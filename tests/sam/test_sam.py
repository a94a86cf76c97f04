"""The optimizer SAM and the perturbation: exact, put back bit for bit, and a well-behaved optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.sam_reference import (
    ADAMW,
    SGD,
    assert_same_bits,
    make_loader,
    make_network,
    make_optimizer,
    make_trainer,
    plain_loop,
    plain_perturbation,
    plain_scales,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import SAM
from lightning_flatness.geometry import Geometry
from lightning_flatness.sam.optimizer import perturbed

GEOMETRIES = ("euclidean", "element", "layer", "filter")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, num_epochs: int = 3) -> list[Tensor]:
    model.train()
    torch.manual_seed(3)
    losses = []
    for _ in range(num_epochs):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).detach())
    return losses


def with_gradients(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return parameters


# ------------------------------------------------------------------------------------------------- the perturbation


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 1e-25, 1e30])
def test_perturbation_is_the_formula_at_any_scale_of_the_gradient(geometry, scale):
    dtype = torch.float32 if scale != 1 else torch.float64
    parameters = with_gradients((4, 3, 2, 2), (4,), (3, 4), dtype=dtype)
    expected = plain_perturbation([p.grad.double() for p in parameters], plain_scales(parameters, geometry), 0.3)
    weights = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad *= scale
    with perturbed(parameters, 0.3, geometry) as norm:
        changes = [p.detach() - w for p, w in zip(parameters, weights, strict=True)]
        assert all(p.grad is None for p in parameters)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for change, e in zip(changes, expected, strict=True):
        torch.testing.assert_close(change.double(), e.double(), rtol=tolerance, atol=tolerance)
    length = torch.cat([e.flatten() for e in expected]).norm()
    assert norm == pytest.approx(float(length), rel=1e-5)
    assert_same_bits(weights, [p.detach() for p in parameters])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(GEOMETRIES),
    st.floats(1e-8, 1e4),
)
def test_weights_come_back_bit_for_bit(values, dtype, geometry, rho):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with perturbed([p], rho, geometry), torch.no_grad():
        p.mul_(2)  # whatever happens inside
    assert torch.equal(before.view(torch.uint8), p.detach().view(torch.uint8))


def test_weights_come_back_when_the_block_raises():
    parameters = with_gradients((3, 2), (2,))
    before = [p.detach().clone() for p in parameters]
    seen = []

    def interrupted() -> None:
        with perturbed(parameters, 0.1):
            seen.append(torch.equal(parameters[0], before[0]))
            raise KeyboardInterrupt("as a test")

    with pytest.raises(KeyboardInterrupt, match="as a test"):
        interrupted()
    assert seen == [False]
    assert_same_bits(before, [p.detach() for p in parameters])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_gradients_of_zero_or_not_finite_perturb_nothing(value, geometry):
    parameters = with_gradients((3, 2), (2,))
    before = [p.detach().clone() for p in parameters]
    parameters[1].grad.fill_(value)
    if value == 0:
        parameters[0].grad.zero_()
    with perturbed(parameters, 0.1, geometry) as norm:
        assert norm == 0
        assert_same_bits(before, [p.detach() for p in parameters])


def test_frozen_and_unused_parameters_and_zero_blocks_stay():
    frozen, unused, zero, moved = with_gradients((2,), (2,), (2, 2), (2, 2))
    frozen.requires_grad_(False)
    unused.grad = None
    with torch.no_grad():
        zero.zero_()
    before = [p.detach().clone() for p in (frozen, unused, zero, moved)]
    for geometry in ("layer", "filter", "element"):
        for p in (frozen, zero, moved):
            p.grad = torch.ones_like(p)
        with perturbed([frozen, unused, zero, moved, moved], 0.1, geometry):
            for p, w in zip((frozen, unused, zero), before[:3], strict=True):
                assert torch.equal(p, w)
            assert not torch.equal(moved, before[3])
            assert torch.isfinite(moved).all()
    with perturbed([], 0.1) as norm:
        assert norm == 0


def test_sparse_gradients_and_complex_and_mixed_dtypes():
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    before = [embedding.weight.detach().clone(), other.detach().clone(), waves.detach().clone()]
    loss = embedding(torch.tensor([1, 1])).sum() + 3 * other.sum() + (waves * 1j).real.sum()
    loss.backward()
    length = (3 * 4 + 2 * 9 + 2 * 1) ** 0.5
    with perturbed([embedding.weight, other, waves], 0.5) as norm:
        assert norm == pytest.approx(0.5)
        torch.testing.assert_close(embedding.weight[1], before[0][1] + 0.5 * 2 / length)
        assert torch.equal(embedding.weight[0], before[0][0])
        torch.testing.assert_close(other, (before[1].float() + 0.5 * 3 / length).bfloat16())
        torch.testing.assert_close(waves, before[2] - 1j * 0.5 / length)
    assert_same_bits(before, [embedding.weight.detach(), other.detach(), waves.detach()])


def test_filter_geometry_knows_transposed_convolutions_by_the_module():
    module = nn.ConvTranspose2d(3, 4, 2, bias=False)
    changes = []
    for given_module in (None, module):
        module.weight.grad = torch.ones_like(module.weight)
        before = module.weight.detach().clone()
        with perturbed([module.weight], 0.1, "filter", given_module):
            changes.append(module.weight.detach() - before)
    inputs = module.weight.detach().square().sum((1, 2, 3), keepdim=True).expand_as(module.weight)
    outputs = module.weight.detach().square().sum((0, 2, 3), keepdim=True).expand_as(module.weight)
    for change, squares in zip(changes, (inputs, outputs), strict=True):
        torch.testing.assert_close(change, 0.1 * squares / squares.sum().sqrt(), rtol=1e-4, atol=1e-6)


def test_casts_of_the_weights_are_not_reused():
    """Autocast keeps half-precision copies of the weights for as long as its context is open."""
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        before.sum().backward()
        with perturbed(layer.parameters(), 10.0):
            assert float((layer(x) - before).detach().abs().max()) > 1
        assert torch.equal(layer(x), before)


# ---------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_a_plain_loop(geometry, optimizer, dtype):
    model, plain = make_network(dtype), make_network(dtype)
    sam = SAM(make_optimizer(optimizer, model.parameters()), 0.1, geometry, module=model)
    train(model, sam, make_loader(dtype))
    plain_loop(
        plain, make_optimizer(optimizer, plain.parameters()), list(make_loader(dtype)), rho=0.1, geometry=geometry
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)


def test_without_a_module_weights_are_the_same_and_buffers_see_both_passes():
    models = make_network(torch.float64), make_network(torch.float64)
    for model, module in zip(models, (models[0], None), strict=True):
        train(model, SAM(make_optimizer(SGD, model.parameters()), 0.1, module=module), make_loader(torch.float64))
    assert_same_bits(*(list(m.parameters()) for m in models))
    assert [int(m[1].num_batches_tracked) for m in models] == [15, 30]


def test_rho_zero_is_the_wrapped_optimizer_bit_for_bit():
    model, plain = make_network(), make_network()
    losses = train(model, SAM(make_optimizer(SGD, model.parameters()), rho=0.0), make_loader())
    assert_same_bits(losses, train(plain, make_optimizer(SGD, plain.parameters()), make_loader()))
    assert_same_bits(model.state_dict(), plain.state_dict())


def test_returns_the_first_loss_and_calls_the_closure_twice_with_the_same_random_numbers():
    w = nn.Parameter(torch.tensor([1.0]))
    sam, seen = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5), []

    def closure():
        loss = w.square().sum()
        loss.backward()  # without zero_grad: the gradients do not add up all the same
        seen.append((w.item(), torch.rand(()).item()))
        return loss

    torch.manual_seed(0)
    loss = sam.step(closure)
    after = torch.rand(())
    torch.manual_seed(0)
    numbers = torch.rand(()), torch.rand(())
    assert float(loss.detach()) == 1
    assert [weight for weight, _ in seen] == [1, 1.5]
    assert seen[0][1] == seen[1][1] == float(numbers[0])
    assert after == numbers[1]
    assert w.item() == pytest.approx(1 - 0.1 * 2 * 1.5)


def test_runs_under_no_grad_and_drops_older_gradients():
    w = nn.Parameter(torch.tensor([1.0]))
    w.grad = torch.tensor([-100.0])
    sam = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    with torch.no_grad():
        sam.step(lambda: w.square().sum().backward())
    assert w.item() == pytest.approx(1 - 0.1 * 2 * 1.5)


def test_groups_state_and_zero_grad_are_those_of_the_wrapped_optimizer():
    model = make_network()
    base = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}], lr=0.1)
    base.param_groups[0]["momentum"] = 0.9
    sam = SAM(base)
    assert sam.param_groups is base.param_groups
    assert sam.state is base.state
    assert sam.defaults is base.defaults
    sam.add_param_group({"params": model[4].parameters(), "lr": 0.2})
    assert [g["lr"] for g in base.param_groups] == [0.5, 0.1, 0.2]
    train(model, sam, make_loader(), num_epochs=1)
    assert len(base.state) == len(sam.state) == 1
    assert_same_bits(sam.state_dict(), base.state_dict())
    assert model[0].weight.grad is not None
    sam.zero_grad()
    assert model[0].weight.grad is None
    assert "rho=0.05, geometry=Euclidean()" in repr(sam)
    sam.param_groups = sam.param_groups[:1]
    assert len(base.param_groups) == 1


def test_checkpoints_resume_bit_for_bit_and_are_those_of_the_wrapped_optimizer():
    whole, begun = make_network(), make_network()
    for model in (whole, begun):
        model[3].p = 0.0
    train(whole, SAM(make_optimizer(ADAMW, whole.parameters())), make_loader(), num_epochs=2)
    first = SAM(make_optimizer(ADAMW, begun.parameters()))
    train(begun, first, make_loader(), num_epochs=1)
    resumed = copy.deepcopy(begun)
    second = SAM(make_optimizer(ADAMW, resumed.parameters()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, make_loader(), num_epochs=1)
    assert_same_bits(resumed.state_dict(), whole.state_dict())
    plain = make_optimizer(ADAMW, resumed.parameters())
    plain.load_state_dict(second.state_dict())  # leave SAM from a checkpoint
    assert_same_bits(plain.state_dict(), second.state_dict())


@pytest.mark.parametrize("on_wrapper", [True, False])
def test_schedulers_may_hold_either_optimizer(on_wrapper):
    model = make_network()
    base = make_optimizer(SGD, model.parameters())
    sam = SAM(base)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(sam if on_wrapper else base, max_lr=0.5, total_steps=5)
    rates = []
    for batch in make_loader():
        train(model, sam, [batch], num_epochs=1)
        rates.append(base.param_groups[0]["lr"])
        if len(rates) < 5:
            scheduler.step()
    assert len(set(rates)) == 5
    assert max(rates) <= 0.5


def test_hooks_of_the_optimizer():
    model, calls = make_network(), []
    base = make_optimizer(SGD, model.parameters())
    sam = SAM(base)
    sam.register_step_pre_hook(lambda *args: calls.append("before"))
    base.register_step_post_hook(lambda *args: calls.append("wrapped"))
    sam.register_step_post_hook(lambda *args: calls.append("after"))
    sam.register_state_dict_pre_hook(lambda *args: calls.append("saving"))
    sam.register_state_dict_post_hook(lambda *args: calls.append("saved"))
    sam.register_load_state_dict_pre_hook(lambda *args: calls.append("loading"))
    sam.register_load_state_dict_post_hook(lambda *args: calls.append("loaded"))
    train(model, sam, list(make_loader())[:1], num_epochs=1)
    sam.load_state_dict(sam.state_dict())
    assert calls == ["before", "wrapped", "after", "saving", "saved", "loading", "loaded"]


def test_pickle_and_deepcopy():
    model = make_network()
    sam = SAM(make_optimizer(SGD, model.parameters()), 0.2, "element")
    train(model, sam, make_loader(), num_epochs=1)
    for other in (pickle.loads(pickle.dumps(sam)), copy.deepcopy(sam)):
        assert (other.rho, other.geometry.name) == (0.2, "element")
        assert_same_bits(other.state_dict(), sam.state_dict())
    both_model, both_sam = copy.deepcopy((model, sam))
    train(both_model, both_sam, make_loader(), num_epochs=1)
    train(model, sam, make_loader(), num_epochs=1)
    assert_same_bits(both_model.state_dict(), model.state_dict())


# ------------------------------------------------------------------------------------------------------- its errors


def test_no_closure():
    model = make_network()
    before = copy.deepcopy(model.state_dict())
    sam = SAM(make_optimizer(SGD, model.parameters()))
    model[4].weight.grad = torch.ones_like(model[4].weight)
    with pytest.raises(ValueError, match=r"Expected a `closure` .* got None.*Call optimizer\.step\(closure\)"):
        sam.step()
    assert_same_bits(before, model.state_dict())


@pytest.mark.parametrize("failing_call", [1, 2])
def test_no_gradient_after_the_closure(failing_call):
    model = make_network()
    weights = [p.detach().clone() for p in model.parameters()]
    sam, calls = SAM(make_optimizer(SGD, model.parameters())), []

    def closure():
        calls.append(None)
        loss = model(torch.ones(4, 5)).square().sum()
        if len(calls) != failing_call:
            loss.backward()
        return loss

    where = "at the weights" if failing_call == 1 else "at the perturbed weights"
    with pytest.raises(RuntimeError, match=f"leave gradients .* got none {where}. Call loss.backward"):
        sam.step(closure)
    assert_same_bits(weights, [p.detach() for p in model.parameters()])
    assert not sam.state


def test_a_second_closure_that_raises():
    model = make_network()
    weights = [p.detach().clone() for p in model.parameters()]
    sam, calls = SAM(make_optimizer(SGD, model.parameters()), module=model), []

    def closure():
        calls.append(None)
        loss = model(torch.ones(4, 5)).square().sum()
        if len(calls) == 2:
            raise RuntimeError("as a test")
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="as a test"):
        sam.step(closure)
    assert_same_bits(weights, [p.detach() for p in model.parameters()])
    assert int(model[1].num_batches_tracked) == 1
    assert not sam.state


class _Curved(Geometry):
    name = "curved"

    def chart(self, module, parameters, dtype):
        raise NotImplementedError


def test_arguments_that_are_refused():
    w = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"Expected `optimizer` to be an instance .* got the class SGD. Make the"):
        SAM(torch.optim.SGD)
    with pytest.raises(TypeError, match=r"Expected `optimizer` to be an instance .* got list"):
        SAM([w])
    with pytest.raises(ValueError, match="one step per gradient, got LBFGS"):
        SAM(torch.optim.LBFGS([w]))
    with pytest.raises(ValueError, match="one step per gradient, got SAM"):
        SAM(SAM(base))
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"Expected `rho` to be >= 0 and finite, got {rho}"):
            SAM(base, rho=rho)
        with pytest.raises(ValueError, match=f"Expected `rho` to be >= 0 and finite, got {rho}"), perturbed([w], rho):
            pass
    with pytest.raises(ValueError, match="Expected `geometry` to be one of"):
        SAM(base, geometry="round")
    with pytest.raises(ValueError, match=r"Expected `geometry` to be linear .* got _Curved"):
        SAM(base, geometry=_Curved())


# -------------------------------------------------------------------------------------------- Fabric and Lightning


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_with_fabric(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    network, plain = make_network(dtype), make_network(dtype)
    model, optimizer = fabric.setup(network, SAM(make_optimizer(SGD, network.parameters()), 0.1, module=network))
    torch.manual_seed(3)
    model.train()
    for _ in range(3):
        for x, y in make_loader(dtype):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader(dtype)), rho=0.1)
    tolerance = 1e-6 if precision == "64-true" else 0.1  # Fabric hands outputs back in the default dtype
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_with_manual_optimization(tmp_path):
    class Manual(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = make_network(torch.float64)

        def on_train_start(self):
            torch.manual_seed(3)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.log("loss", optimizer.step(closure))
            self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = SAM(make_optimizer(SGD, self.parameters()), 0.1, "element", module=self)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]

    module, plain = Manual(), make_network(torch.float64)
    trainer = make_trainer()
    trainer.fit(module, make_loader(torch.float64))
    plain_loop(
        plain, make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64)), rho=0.1, geometry="element"
    )
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert trainer.global_step == 15
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt")["optimizer_states"][0]["state"]
    assert "momentum_buffer" in state[0]


def test_with_a_loss_scaler_by_hand():
    """What the docstring of SAM advises: GradScaler.step takes no closure."""
    model, plain = make_network(), make_network()
    for network in (model, plain):
        network[1], network[3] = nn.Identity(), nn.Identity()
    optimizer, scaler = make_optimizer(SGD, model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for x, y in list(make_loader()) * 3:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        with perturbed(list(model.parameters()), 0.1):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader()), rho=0.1)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)
