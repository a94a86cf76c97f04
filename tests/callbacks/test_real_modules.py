"""Modules as people write them: Lightning's demos, attention, a ResNet, an LSTM, compiled, bf16, pytorch_lightning."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, trainer
from helpers.training import fit
from lightning.pytorch.demos import LightningTransformer, Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_flatness import FlatnessMonitor, InvariantSharpness, LossLandscape, TopEigenvalues


def measured(path: Path, module: Any, data: Any, **options: Any) -> dict[str, float]:
    torch.manual_seed(0)
    monitor = FlatnessMonitor(probe_size=16)
    run = fit(path, monitor, module=module, data=(data,), logger=False, max_epochs=1, limit_train_batches=2, **options)
    return {k: float(v) for k, v in run.callback_metrics.items()}


def assert_product_is_right(landscape: LossLandscape) -> None:
    """Against central differences of the gradient, written anew, in float64."""
    v = torch.randn(landscape.num_parameters, dtype=landscape.dtype, generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    with landscape.displaced(1e-5 * v):
        forward = landscape.gradient()
    with landscape.displaced(-1e-5 * v):
        backward = landscape.gradient()
    numeric = (forward - backward) / 2e-5
    product = landscape.hvp(v)
    assert landscape.engine != "finite_difference"
    torch.testing.assert_close(product, numeric, rtol=1e-4, atol=1e-6 * float(numeric.abs().max()))
    with landscape.measurement():
        landscape.hvp(v)
        torch.testing.assert_close(landscape.hvp(v), product, rtol=1e-8, atol=1e-12)


class Words(Dataset[tuple[Tensor, Tensor]]):
    """Sequences for the demo transformer, without a download."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(50, (13,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


def test_boring_model(tmp_path):
    values = measured(tmp_path, BoringModel(), None)
    assert values["flatness/invariant_sharpness"] > 0


class OfflineTransformer(LightningTransformer):
    """The demo, without the download of its data."""

    def prepare_data(self) -> None: ...


def test_lightning_transformer(tmp_path):
    values = measured(tmp_path, OfflineTransformer(vocab_size=50), DataLoader(Words(), batch_size=4))
    assert values["flatness/lambda_max"] > 0
    assert values["flatness_errors/lambda_max_residual"] <= 0.0301 * values["flatness/lambda_max"]


def test_the_product_of_the_demo_transformer():
    torch.manual_seed(0)
    module = Transformer(vocab_size=20, ninp=16, nhead=2, nhid=16, nlayers=1).double()
    tokens = torch.randint(20, (4, 9))

    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        return F.nll_loss(m(batch[:, :-1], batch[:, 1:]), batch[:, 1:].reshape(-1))

    assert_product_is_right(LossLandscape(module, [tokens], loss_fn))


class Block(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_channels),
            nn.Softplus(),  # smooth, so that finite differences are an oracle
            nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x + self.body(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), Block(4), nn.AvgPool2d(2), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_resnet_with_batchnorm(mode):
    batches = [(torch.randn(n, 1, 8, 8).double(), torch.randint(3, (n,))) for n in (6, 5)]
    landscape = LossLandscape(resnet().double(), batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), mode=mode)
    assert_product_is_right(landscape)


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = cell(3, 5, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(cell):
    torch.manual_seed(0)
    module = Recurrent(cell)
    x, y = torch.randn(4, 6, 3), torch.randn(4, 2)
    single = LossLandscape(module, [(x, y)], lambda m, b: F.mse_loss(m(b[0]), b[1]), engine="exact")
    product = single.hvp(torch.ones(single.num_parameters))
    double = LossLandscape(module.double(), [(x.double(), y.double())], lambda m, b: F.mse_loss(m(b[0]), b[1]))
    assert_product_is_right(double)
    expected = double.hvp(torch.ones(double.num_parameters, dtype=torch.float64)).float()
    torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5))
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_activation_checkpointing(mode):
    torch.manual_seed(0)
    landscape = LossLandscape(
        Checkpointed().double(), [torch.randn(8, 4).double()], lambda m, x: m(x).pow(3).mean(), mode=mode
    )
    assert_product_is_right(landscape)


def test_old_style_weight_and_spectral_norm_leave_no_graph_behind():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(5, 2))
        )
    module.double()
    before = module[0].weight
    assert_product_is_right(LossLandscape(module, [torch.randn(8, 4).double()], lambda m, x: m(x).pow(3).mean()))
    assert module[0].weight is before


def test_the_second_derivative_of_fused_weight_norm_is_still_wrong():
    """The reason for DifferentiableWeightNorm; when this fails, it can go."""
    v, g = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.ones(1, 1)

    def hessian_column(weight_norm: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(weight_norm(v, g)[0, 0], v, create_graph=True)
        return torch.autograd.grad(gradient[0, 0], v)[0]

    assert not torch.allclose(
        hessian_column(lambda v, g: torch._weight_norm(v, g, 0)), hessian_column(lambda v, g: v * g / v.norm())
    )


def test_parametrizations():
    torch.manual_seed(0)
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
    assert_product_is_right(LossLandscape(module, [torch.randn(8, 4).double()], lambda m, x: m(x).pow(3).mean()))


@pytest.mark.slow
def test_a_compiled_module_is_measured_as_the_eager_one(tmp_path):
    class Silent(Classifier):  # dynamo of torch 2.13 cannot trace self.log
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    torch.manual_seed(0)
    module = Silent()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    eager = measured(tmp_path, module, loader(shuffle=False))
    module.load_state_dict(state)
    compiled = measured(tmp_path, torch.compile(module), loader(shuffle=False))
    for key in ("flatness/lambda_max", "flatness/invariant_sharpness"):
        assert compiled[key] == pytest.approx(eager[key], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_submodule_stays_compiled():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    module = nn.ModuleDict({"net": torch.compile(inner)})
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    module["net"](batch[0]).sum().backward()
    landscape = LossLandscape(module, [batch], lambda m, b: F.cross_entropy(m["net"](b[0]), b[1]))
    plain = LossLandscape(inner, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    v = torch.ones(landscape.num_parameters)
    torch.testing.assert_close(landscape.hvp(v), plain.hvp(v))
    frames = torch._dynamo.utils.counters["frames"]["total"]
    module["net"](batch[0]).sum().backward()
    assert torch._dynamo.utils.counters["frames"]["total"] == frames


def test_bf16_mixed_precision_is_measured_in_float32(tmp_path):
    seen: list[torch.dtype] = []

    class Watching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            seen.append(logits.dtype)
            return F.cross_entropy(logits.float(), batch[1])

    values = measured(tmp_path, Watching(), loader(), precision="bf16-mixed")
    assert values["flatness/lambda_max"] > 0
    assert set(seen) == {torch.bfloat16, torch.float32}
    data = Plain()
    module = Watching()
    metric = TopEigenvalues()
    metric.update(LossLandscape(module, [(data.x, data.y)]))
    assert seen[-1] == torch.float32


def test_true_double_precision(tmp_path):
    values = measured(tmp_path, Classifier(), loader(), precision="64-true")
    assert values["flatness/lambda_max"] > 0


def test_values_of_bfloat16_weights_say_that_rounding_is_larger_than_the_tolerance(tmp_path):
    with pytest.warns(UserWarning, match=r"errors of its products .rounding, .* exceed its `tol`: .*_residual"):
        values = measured(tmp_path, Classifier(), loader(), precision="bf16-true")
    assert values["flatness/lambda_max"] > 0


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")
def test_trainer_and_module_from_pytorch_lightning(tmp_path):
    import pytorch_lightning

    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = pytorch_lightning.Trainer(
        max_epochs=2,
        callbacks=[FlatnessMonitor()],
        logger=pytorch_lightning.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    run.fit(Old(), loader())
    assert run.callback_metrics["flatness/lambda_max"] > 0
    lines = (Path(run.logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("flatness/lambda_max")
    assert len([line for line in lines[1:] if line.split(",")[column]]) == 3


def test_gan_like_modules_with_several_optimizers_need_a_loss(tmp_path):
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(6, 3), nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.b(self.a(batch[0])).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in ((self.a, 0.1), (self.b, 0.2))], []

    monitor = FlatnessMonitor(loss_fn=lambda m, batch: m.b(m.a(batch[0])).square().mean())
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(Two(), loader())
    metrics = run.callback_metrics
    assert float(metrics["flatness/edge_of_stability"]) == pytest.approx(0.1 * float(metrics["flatness/lambda_max"]))


def test_a_reparametrized_loss_in_float32_and_float64_agree():
    """Ten thousand parameters in float32 against the same in float64."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    module = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 5))
    values = []
    for dtype in (torch.float32, torch.float64):
        batches = list(zip(TensorDataset(x.to(dtype), y)[:][0].split(24), y.split(24), strict=True))
        metric = InvariantSharpness(tol=1e-4)
        metric.update(LossLandscape(module.to(dtype), batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])))
        values.append(metric.compute().double())
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
