"""The geometry of attention: no change of basis of a head moves an eigenvalue; the layers that it knows, and errors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_flatness import (
    SAM,
    AttentionGeometry,
    HessianTrace,
    LossLandscape,
    Pair,
    Part,
    TopEigenvalues,
    WorstCaseSharpness,
    loss_surface,
)
from lightning_flatness.geometry.attention.finders import pairs_of
from lightning_flatness.sam import perturbed

Model = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]


def mean_square(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean() + output.sin().mean()


class Attention(nn.Module):
    """Keys and values of other sizes than queries, with learned biases as extra tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=5, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False)[0]


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return layer, lambda m, x: mean_square(m(x)), torch.randn(3, 5, 4)


def decoder() -> Model:
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    x, memory = torch.randn(3, 4, 4), torch.randn(3, 5, 4)
    return layer, lambda m, x: mean_square(m(x[0], x[1])), (x, memory)


def attention() -> Model:
    x = (torch.randn(3, 4, 4), torch.randn(3, 5, 3), torch.randn(3, 5, 5))
    return Attention(), lambda m, x: mean_square(m(*x)), x


def tokens() -> Tensor:
    return torch.randint(7, (3, 5))


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=5, attn_implementation="eager"
    )
    return GPT2Model(config), lambda m, x: mean_square(m(input_ids=x).last_hidden_state), tokens()


def bert() -> Model:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5,
        max_position_embeddings=5, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    return model, lambda m, x: mean_square(m(input_ids=x).last_hidden_state), tokens()


def vit() -> Model:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5, image_size=4, patch_size=2,
        num_channels=1, attn_implementation="eager",
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    return model, lambda m, x: mean_square(m(pixel_values=x).last_hidden_state), torch.randn(3, 1, 4, 4)


def llama(**options: Any) -> Model:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=8, attention_bias=True,
        attn_implementation="eager", **options,
    )  # fmt: skip
    return LlamaModel(config), lambda m, x: mean_square(m(input_ids=x).last_hidden_state), tokens()


MODELS: dict[str, Callable[[], Model]] = {f.__name__: f for f in (encoder, decoder, attention, gpt2, bert, vit, llama)}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    module, loss_fn, batch = MODELS[name]()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p + 0.4 * torch.randn_like(p))
    to = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
    return module.to(dtype).eval(), loss_fn, tuple(map(to, batch)) if isinstance(batch, tuple) else to(batch)


def random_matrix(d: int, condition: float, in_planes: bool, generator: torch.Generator) -> Tensor:
    """Any invertible matrix of this condition number; in planes a rotation and a scaling."""
    if in_planes:
        angle, size = torch.rand(2, generator=generator).double()
        c, s = torch.cos(6 * angle), torch.sin(6 * angle)
        return condition ** (size - 0.5) * torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return u @ torch.diag(torch.logspace(0, 1, d, dtype=torch.float64) ** torch.tensor(condition).log10()) @ v


@torch.no_grad()
def change_basis(module: nn.Module, pairs: Sequence[Pair], condition: float = 1e3, seed: int = 0) -> nn.Module:
    """G -> G A^-1 and H -> H Aᵀ for a random A per head; the blocks are the transposes of G and H."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for pair in pairs:
        views = [
            [p.view(tensors[p.name].data, pair.heads, pair.in_planes) for p in side if p.name in tensors]
            for side in (pair.left, pair.right)
        ]
        for place in itertools.product(*map(range, views[0][0].shape[:-3])):  # head, and plane
            a = random_matrix(views[0][0].shape[-3], condition, pair.in_planes, generator)
            for blocks, matrix in zip(views, (torch.linalg.inv(a).mT, a), strict=True):
                for block in blocks:
                    block[place] = torch.einsum("ij,jsc->isc", matrix, block[place].double()).to(block.dtype)
    return module


def dense_hessian(landscape: LossLandscape, geometry: Any) -> Tensor:
    with landscape.measurement():
        chart = landscape.chart(geometry)
        eye = torch.eye(chart.num_coordinates, dtype=landscape.dtype)
        return torch.stack([chart.hvp(landscape.hvp, e, gradient=landscape.gradient) for e in eye])


# -------------------------------------------------------------------------------------------------------- invariance


@each_model
def test_no_change_of_basis_moves_an_eigenvalue(name):
    module, loss_fn, batch = build(name)
    pairs = pairs_of(module)
    assert len(pairs) == {"decoder": 4}.get(name, 2)
    changed = change_basis(module, pairs)
    losses = [float(loss_fn(m, batch).detach()) for m in (module, changed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)  # the same function: the pairs are right
    landscapes = [LossLandscape(m, [batch], loss_fn) for m in (module, changed)]
    one, other = (torch.linalg.eigvalsh(dense_hessian(landscape, "attention")) for landscape in landscapes)
    scale = float(one.abs().max())
    torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("name", ["encoder", "gpt2", "llama"])
def test_in_single_precision(name):
    module, loss_fn, batch = build(name, torch.float32)
    values = []
    for m in (module, change_basis(module, pairs_of(module))):
        metric = TopEigenvalues(k=3, geometry="attention", tol=1e-3)
        metric.update(LossLandscape(m, [batch], loss_fn))
        values.append(metric.compute())
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4 * float(values[0].max()))


@pytest.mark.parametrize("geometry", ["euclidean", "layer", "filter", "element"])
def test_the_other_geometries_move(geometry):
    module, loss_fn, batch = build("encoder")
    values = []
    for m in (module, change_basis(module, pairs_of(module), condition=30)):
        metric = TopEigenvalues(geometry=geometry, which="LM", tol=1e-6)
        metric.update(LossLandscape(m, [batch], loss_fn))
        values.append(float(metric.compute()))
    assert abs(values[1] / values[0] - 1) > 0.05


def test_any_matrix_moves_rotary_queries_and_keys_so_only_planes_are_taken():
    module, loss_fn, batch = build("llama")
    pairs = pairs_of(module)
    assert [pair.in_planes for pair in pairs] == [True, False]
    wrong = [Pair(pair.left, pair.right, pair.heads) for pair in pairs]
    before, after = (float(loss_fn(m, batch).detach()) for m in (module, change_basis(module, wrong, 3.0)))
    assert abs(after / before - 1) > 1e-3


# ------------------------------------------------------------------------------------------------------ dense oracles


def power(gram: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.clamp_min(1e-300) ** exponent) @ vectors.mT


def test_the_chart_is_the_formula_written_down_head_by_head():
    module, loss_fn, batch = build("encoder")
    landscape = LossLandscape(module, [batch], loss_fn)
    chart: Any = landscape.chart("attention")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(landscape.num_parameters, generator=generator, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    found = dict(zip(names, landscape.unflatten(chart.displacement(z)), strict=True))
    wanted = dict(zip(names, [piece.clone() for piece in landscape.unflatten(z)], strict=True))
    w, b = module.self_attn.in_proj_weight.detach(), module.self_attn.in_proj_bias.detach()
    for head, kind in itertools.product(range(2), range(3)):
        rows = slice(4 * kind + 2 * head, 4 * kind + 2 * head + 2)
        g = torch.cat([w[rows], b[rows, None]], dim=1).mT  # one column per coordinate of the head
        z_g = torch.cat([wanted["self_attn.in_proj_weight"][rows], wanted["self_attn.in_proj_bias"][rows, None]], 1).mT
        moved = z_g @ power(g.mT @ g, 0.5)
        wanted["self_attn.in_proj_weight"][rows], wanted["self_attn.in_proj_bias"][rows] = (
            moved.mT[:, :4],
            moved.mT[:, 4],
        )
    out = module.self_attn.out_proj.weight.detach()
    for head in range(2):
        columns = slice(2 * head, 2 * head + 2)
        h = out[:, columns]
        z_h = wanted["self_attn.out_proj.weight"][:, columns]
        wanted["self_attn.out_proj.weight"][:, columns] = z_h @ power(h.mT @ h, 0.5)
    paired = {"self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight"}
    for name, p in module.named_parameters():
        expected = wanted[name] if name in paired else wanted[name] * p.detach().norm()
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chart.coordinates(chart.displacement(z)), z, rtol=1e-8, atol=1e-10)


def test_every_measure_works_in_it():
    module, loss_fn, batch = build("encoder")
    landscape = LossLandscape(module, [batch], loss_fn)
    exact = dense_hessian(landscape, "attention")
    torch.testing.assert_close(exact, exact.mT, rtol=1e-8, atol=1e-10)
    trace = HessianTrace("attention", num_products=2 * len(exact))
    trace.update(landscape)
    torch.testing.assert_close(trace.compute(), exact.trace(), rtol=1e-8, atol=0)
    worst = WorstCaseSharpness(0.01, "attention")
    worst.update(landscape)
    assert float(worst.compute()) > 0
    assert torch.isfinite(
        torch.as_tensor(loss_surface(landscape, "random", "attention", radius=0.1, num_points=3).loss)
    ).all()


# ----------------------------------------------------------------------------------------- tied, frozen, rank-deficient


class Tied(nn.Module):
    """Queries and keys share a weight, but not the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 2), nn.Linear(4, 2)
        self.key.weight = self.query.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).mT, dim=-1) @ x


TIED = [Pair((Part("query.weight"), Part("query.bias")), (Part("key.weight"), Part("key.bias")))]


def test_tied_factors_share_their_matrix_and_keep_the_rotations():
    torch.manual_seed(0)
    module, x = Tied().double(), torch.randn(3, 5, 4).double()
    rotated = copy.deepcopy(module)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    with torch.no_grad():
        for p in (rotated.query.weight, rotated.query.bias, rotated.key.bias):
            p.copy_(turn @ p)
    values = []
    for m in (module, rotated):
        landscape = LossLandscape(m, [x], lambda m, x: mean_square(m(x)))
        values.append(torch.linalg.eigvalsh(dense_hessian(landscape, AttentionGeometry(TIED))))
    torch.testing.assert_close(values[1], values[0], rtol=1e-8, atol=1e-10)


def test_frozen_factors_stand_still_and_count():
    module, loss_fn, batch = build("encoder")
    module.self_attn.in_proj_bias.requires_grad_(False)
    module.self_attn.out_proj.weight.requires_grad_(False)
    values = []
    for m in (module, change_basis(module, pairs_of(module))):
        values.append(torch.linalg.eigvalsh(dense_hessian(LossLandscape(m, [batch], loss_fn), "attention")))
    torch.testing.assert_close(values[1], values[0], rtol=1e-8, atol=1e-8 * float(values[0].abs().max()))


def test_dependent_columns_give_a_warning_and_numbers():
    module, loss_fn, batch = build("encoder")
    with torch.no_grad():
        module.self_attn.in_proj_weight[1] = 2 * module.self_attn.in_proj_weight[0]
        module.self_attn.in_proj_bias[1] = 2 * module.self_attn.in_proj_bias[0]
        module.self_attn.out_proj.weight[:, 2:] = 0
    values = []
    for m in (module, change_basis(module, pairs_of(module), condition=10)):
        landscape = LossLandscape(m, [batch], loss_fn)
        with pytest.warns(UserWarning, match="linearly dependent rows or columns within a head"):
            values.append(torch.linalg.eigvalsh(dense_hessian(landscape, "attention")))
        assert torch.isfinite(values[-1]).all()
    torch.testing.assert_close(values[1], values[0], rtol=1e-7, atol=1e-8 * float(values[0].abs().max()))
    with pytest.warns(UserWarning, match="linearly dependent"), landscape.measurement():
        chart: Any = landscape.chart("attention")
    v = torch.randn(chart.num_coordinates, dtype=torch.float64)
    reachable = chart.displacement(v)
    torch.testing.assert_close(chart.displacement(chart.coordinates(reachable)), reachable, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="Expected a change of weights that this geometry can make"):
        chart.coordinates(v)


# ------------------------------------------------------------------------------------------------- declared, and errors


class LoRA(nn.Module):
    """A frozen weight and a product of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 4).requires_grad_(False)
        self.lora_A = nn.Linear(5, 2, bias=False)
        self.lora_B = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.lora_B(self.lora_A(x))))


LORA = [Pair((Part("lora_A.weight"),), (Part("lora_B.weight", axis=1),))]


@pytest.mark.parametrize("rest", ["layer", "element", "filter", "euclidean"])
def test_lora_by_declaration(rest):
    torch.manual_seed(0)
    module, x = LoRA().double(), torch.randn(9, 5).double()
    values = []
    for m in (module, change_basis(module, LORA)):
        landscape = LossLandscape(m, [x], lambda m, x: mean_square(m(x)))
        values.append(torch.linalg.eigvalsh(dense_hessian(landscape, AttentionGeometry(LORA, rest))))
    torch.testing.assert_close(values[1], values[0], rtol=1e-8, atol=1e-8 * float(values[0].abs().max()))


def test_errors():
    module, loss_fn, batch = build("encoder")
    landscape = LossLandscape(module, [batch], loss_fn)
    with pytest.raises(ValueError, match=r"Expected `rest` to be one of .*, got 'path'"):
        AttentionGeometry(rest="path")
    with pytest.raises(ValueError, match=r"Expected names of parameters in `pairs`, got \['lora_A.weight'"):
        landscape.chart(AttentionGeometry(LORA))
    wrong = Pair((Part("self_attn.in_proj_weight"),), (Part("self_attn.out_proj.weight", 1),), heads=5)
    with pytest.raises(ValueError, match=r"Expected axis 0 of 'self_attn.in_proj_weight' to hold 5 heads of one size"):
        landscape.chart(AttentionGeometry([wrong]))
    plain = LossLandscape(nn.Linear(4, 2), [torch.randn(3, 4)], lambda m, x: m(x).square().mean())
    with pytest.raises(ValueError, match="Expected attention layers for the geometry 'attention', got Linear without"):
        plain.chart("attention")


def test_norms_of_queries_and_keys_and_unknown_rotary_planes_are_refused():
    from transformers import Qwen3Config, Qwen3Model

    sizes: Any = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = Qwen3Model(Qwen3Config(**sizes, **heads))
    landscape = LossLandscape(model, [tokens()], lambda m, x: mean_square(m(input_ids=x).last_hidden_state))
    with pytest.raises(ValueError, match=r"Qwen3Attention .*, which normalises queries and keys"):
        landscape.chart("attention")
    module, loss_fn, batch = llama(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    with pytest.raises(ValueError, match=r"LlamaAttention .* with rotary embeddings whose planes are not known"):
        LossLandscape(module, [batch], loss_fn).chart("attention")


# --------------------------------------------------------------------------------------------------------------- SAM


def test_a_step_of_sam_equals_the_dense_one_and_weights_come_back_bit_for_bit():
    module, loss_fn, batch = build("encoder")
    landscape, rho, lr = LossLandscape(module, [batch], loss_fn), 0.2, 0.1
    with landscape.measurement():
        chart: Any = landscape.chart("attention")
        s = torch.stack([chart.displacement(e) for e in torch.eye(chart.num_coordinates, dtype=torch.float64)])
        g = landscape.gradient()
    change = rho * s @ (s.mT @ g) / (s.mT @ g).norm()
    with landscape.displaced(change):
        gradient = landscape.gradient()
    before = [p.detach().clone() for p in module.parameters()]
    expected = torch.cat([p.flatten() for p in before]) - lr * gradient
    loss_fn(module, batch).backward()
    with perturbed(list(module.parameters()), rho, "attention", module) as norm:
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(module.parameters(), before, strict=True)])
        torch.testing.assert_close(moved, change, rtol=1e-8, atol=1e-12)
        assert norm == pytest.approx(float(change.norm()), rel=1e-8)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    optimizer = SAM(torch.optim.SGD(module.parameters(), lr), rho, "attention", module)

    def closure() -> Tensor:
        loss = loss_fn(module, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-12)
