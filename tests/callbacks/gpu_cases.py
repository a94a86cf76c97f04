"""What has to hold on a GPU beside ``accelerator_cases.py``; ``pytest -m gpu`` runs it in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_flatness import FlatnessMonitor, LossLandscape, LossSurfaceMonitor, SharpnessAwareMinimization

NUM_SAMPLES, NUM_CLASSES = 96, 5
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")


class Images(nn.Sequential):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self) -> None:
        blocks = [self.block(3, 8), self.block(8, 16)]
        super().__init__(*blocks, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(64, NUM_CLASSES))

    @staticmethod
    def block(width: int, following: int) -> nn.Sequential:
        convolution = nn.Conv2d(width, following, 3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(following), nn.ReLU(), nn.Dropout2d(0.1))


class Sequences(nn.Module):
    """Rows of the images as a sequence, through fused attention with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(36, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.embedding(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(self.encoder(rows).mean(dim=1))


class Recurrent(nn.Module):
    """Rows of the images through cuDNN's LSTM, which is differentiated once only.

    Without its dropout, whose generator is cuDNN's own: no seed makes two runs of a process the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(36, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


NETWORKS = {"images": Images, "sequences": Sequences, "recurrent": Recurrent}


class Module(pl.LightningModule):
    """Noise on the device, a schedule, a network."""

    def __init__(self, network: str = "images", *, compiled: bool = False) -> None:
        super().__init__()
        self.net = NETWORKS[network]()
        self.run_net: Any = torch.compile(self.net) if compiled else self.net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.run_net(x + 0.01 * torch.randn_like(x)), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def samples(device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, 3, 12, 12, generator=generator)
    return x.to(device), torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator).to(device)


def workers() -> Any:
    return DataLoader(TensorDataset(*samples()), 16, shuffle=True, num_workers=2, pin_memory=True)


class OnTheDevice(Dataset[tuple[Tensor, Tensor]]):
    """Samples that lie on the GPU, drawn with noise of its generator: a forked process cannot read them."""

    def __init__(self) -> None:
        self.x, self.y = samples("cuda")

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn_like(self.x[index]), self.y[index]


class Batches:
    """An iterable of batches on the GPU, in an order of the GPU's generator."""

    def __init__(self) -> None:
        self.x, self.y = samples("cuda")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(NUM_SAMPLES, device="cuda").split(16):
            yield self.x[chosen], self.y[chosen]

    def __len__(self) -> int:
        return NUM_SAMPLES // 16


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(TensorDataset(*samples()), 16, shuffle=True),
    "workers": workers,
    "dataset on the GPU": lambda: DataLoader(OnTheDevice(), 16, shuffle=True),
    "batches on the GPU": Batches,
}


def fit(
    *callbacks: pl.Callback, network: str = "images", compiled: bool = False, loader: str = "plain", **options: Any
) -> tuple[pl.Trainer, dict[str, Any]]:
    """Train on the GPU; return the Trainer, and all that training left."""
    pl.seed_everything(0, verbose=False)
    module = Module(network, compiled=compiled)
    settings = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "deterministic": True, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=list(callbacks), **(settings | quiet | options))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, LOADERS[loader]())
    left = {name: t.detach().clone() for name, t in module.state_dict().items()}
    for i, (p, state) in enumerate(trainer.optimizers[0].state.items()):
        left |= {f"optimizer {i} {key}": t for key, t in state.items()}
        left[f"gradient {i}"] = p.grad
    left["generator of the GPU"] = torch.cuda.get_rng_state()
    left["generator of the CPU"] = torch.get_rng_state()
    left["precision"] = dict(trainer.precision_plugin.state_dict())
    left["tf32"] = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    left["logged"] = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(("flatness", "sam"))}
    return trainer, left


def assert_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def watch(metrics: str = "default") -> FlatnessMonitor:
    return FlatnessMonitor(metrics, probe_size=32, on_error="raise")


def monitors() -> list[pl.Callback]:
    return [watch("all"), LossSurfaceMonitor(num_points=3, probe_size=32, on_error="raise")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_watching_changes_nothing(network, precision):
    plain, again = (fit(network=network, precision=precision)[1] for _ in range(2))
    assert_the_same(plain, again)  # else this test says nothing
    trainer, watched = fit(watch(), network=network, precision=precision)
    assert_the_same(plain, watched)
    assert trainer.callback_metrics["flatness/lambda_max"].isfinite()


@pytest.mark.parametrize("network", NETWORKS)
def test_all_measures_change_nothing(network):
    trainer, watched = fit(*monitors(), network=network)
    assert_the_same(fit(network=network)[1], watched)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("flatness/")}
    assert len(logged) > 10
    assert logged["flatness/lambda_max"] > 0


@pytest.mark.parametrize("loader", LOADERS)
def test_data_change_nothing(loader):
    watched = fit(watch(), loader=loader)[1]
    assert_the_same(fit(loader=loader)[1], watched)


@pytest.mark.parametrize(
    "options",
    [{"strategy": "ddp"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"detect_anomaly": True}],
    ids=["ddp", "accumulation", "anomaly"],
)
def test_trainers_change_nothing(options):
    watched = fit(watch(), SharpnessAwareMinimization(rho=0.0), **options)[1]
    assert_the_same(fit(**options)[1], watched)


def test_a_compiled_network_changes_nothing():
    watched = fit(watch(), compiled=True)[1]
    assert_the_same(fit(compiled=True)[1], watched)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ascent", ["gradient", "previous"])
def test_sam(precision, ascent):
    plain = fit(precision=precision)[1]
    assert_the_same(plain, fit(SharpnessAwareMinimization(rho=0.0, ascent=ascent), precision=precision)[1])
    alone, watched = (
        fit(SharpnessAwareMinimization(rho=0.1, ascent=ascent), *others, precision=precision)[1]
        for others in ([], [watch()])
    )
    assert_the_same(alone, watched)
    name = "net.0.0.weight"
    assert not torch.equal(plain[name], alone[name])


def test_curves_are_those_of_the_cpu():
    """The weights are trained on the GPU, and measured on it and on the CPU in float64."""
    trainer, _ = fit(precision="bf16-mixed")
    net: Any = trainer.lightning_module
    values = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        module = net.net.to(device, dtype)
        x, y = samples(device)
        landscape = LossLandscape(module, [(x.to(dtype), y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        torch.manual_seed(0)
        v = torch.randn(landscape.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        values.append(landscape.hvp(v.to(device, dtype)).double().cpu())
    assert (values[0] - values[1]).norm() < 1e-4 * values[1].norm()


def test_memory_is_given_back(tmp_path: Path):
    def allocated(*callbacks: pl.Callback) -> int:
        trainer, _ = fit(*callbacks, default_root_dir=tmp_path)
        del trainer
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    allocated()
    plain, watched = allocated(), allocated(watch(), SharpnessAwareMinimization(rho=0.05))
    assert watched <= plain + 2**20


def test_a_later_product_does_not_wait_for_the_device():
    module, (x, y) = Images().cuda(), samples("cuda")
    landscape = LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    v = torch.ones(landscape.num_parameters, device="cuda")
    with landscape.measurement():
        landscape.hvp(v)
        landscape.hvp(v)
        torch.cuda.set_sync_debug_mode("error")
        try:
            landscape.hvp(v)
        finally:
            torch.cuda.set_sync_debug_mode("default")
