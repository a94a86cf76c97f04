"""The kinds of checks: which runs of a case are compared with which."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import random
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from fuzz.base import KINDS, Base, Case, Data, Pipeline
from fuzz.fingerprint import difference, fingerprint
from lightning_flatness import FlatnessMonitor, LossSurfaceMonitor, SharpnessAwareMinimization

Callbacks = Callable[[], list[pl.Callback]]


class Recorder(pl.loggers.Logger):
    """Keeps what is logged."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.records: list[tuple[int | None, dict[str, Any]]] = []
        self.path = path
        self.user_calls: list[str] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    @property
    def log_dir(self) -> str:
        return self.path

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))


class Hooks(pl.Callback):
    """Keeps the names of the hooks that the Trainer calls, in their order."""

    def __init__(self) -> None:
        self.called: list[str] = []


def _recording(name: str) -> Callable[..., None]:
    def hook(self: Hooks, *args: Any, **kwargs: Any) -> None:
        self.called.append(name)

    return hook


for _name in [n for n in vars(pl.Callback) if n.startswith("on_") and "checkpoint" not in n]:
    setattr(Hooks, _name, _recording(_name))


def train(case: Case, make_callbacks: Callbacks, reference: Any = None) -> tuple[dict[str, Any], list[str]]:
    """Train a case with some callbacks; return its fingerprint and the warnings that it gave."""
    with (
        tempfile.TemporaryDirectory() as path,
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("always")
        if not case.resume:
            return _fit(case, make_callbacks, path, {}, {}, reference), [str(w.message) for w in caught]
        if case.resume == "epoch":
            early, late, name = {"max_epochs": 1}, {"max_epochs": 2}, "epoch=0-step=4.ckpt"
            saving = pl.callbacks.ModelCheckpoint(path, save_top_k=-1)
        else:
            early, late, name = {"max_steps": 6}, {"max_epochs": 2}, "epoch=0-step=2.ckpt"
            saving = pl.callbacks.ModelCheckpoint(path, every_n_train_steps=2, save_top_k=-1)
        _fit(case, lambda: [*make_callbacks(), saving], path, early | {"enable_checkpointing": True}, {}, reference)
        found = sorted(Path(path).glob("*.ckpt"), key=lambda p: int(re.search(r"step=(\d+)", p.name)[1]))[:1]
        assert found, f"no checkpoint {name}"
        return _fit(case, make_callbacks, path, late, {"ckpt_path": found[0], "weights_only": False}, reference), [
            str(w.message) for w in caught
        ]


def _fit(
    case: Case, make_callbacks: Callbacks, path: str, options: dict[str, Any], fit: dict[str, Any], reference: Any
) -> dict[str, Any]:
    _seed(case.seed)
    module_class = case.mixed(Base)
    module = (reference.wrap(module_class) if reference else module_class)()
    if reference:
        module.__class__.__name__ = module_class.__name__
    pipeline = case.mixed(Pipeline)(case.mixed(Data))
    recorder, hooks, own = Recorder(path), Hooks(), case.callbacks()
    settings: dict[str, Any] = {
        "accelerator": os.environ.get("FLATNESS_ACCELERATOR", "cpu"),
        "devices": 1,
        "logger": recorder,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": path,
    }
    settings |= {k: v(path) if callable(v) else v for k, v in case.merged("trainer").items()} | options
    others = [] if settings["logger"] is recorder else [_LoggedTo(recorder)]
    run = pl.Trainer(**settings, callbacks=[*make_callbacks(), *own, *others, hooks])
    data: dict[str, Any] = {"datamodule": pipeline}
    if not pipeline.is_datamodule:
        data = {"train_dataloaders": pipeline.train_dataloader(), "val_dataloaders": pipeline.val_dataloader()}
    run.fit(module, **data, **fit)
    if _children():
        gc.collect()
    result = fingerprint(run, module, pipeline, [*own, hooks], recorder.records)
    result["torch/children"] = len(_children()) if not getattr(pipeline, "persistent", False) else 0
    return result


class _LoggedTo(pl.Callback):
    """Keeps what other loggers than the recorder are given."""

    def __init__(self, recorder: Recorder) -> None:
        self._records = recorder.records

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            original = logger.log_metrics

            def recorded(metrics: dict[str, float], step: int | None = None, original: Any = original) -> None:
                self._records.append((step, {k: float(v) for k, v in metrics.items()}))
                original(metrics, step)

            logger.log_metrics = recorded  # type: ignore[method-assign]


def _children() -> list[Any]:
    import multiprocessing

    return multiprocessing.active_children()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def monitor_of(case: Case) -> list[pl.Callback]:
    """Return the monitor of a case: the default one in two of three cases."""
    rng = random.Random(case.seed)
    options: dict[str, Any] = {"probe_size": rng.choice((6, 16))}
    own = case.merged("monitor")
    if len(case.features) > 1 and not own.keys() - {"loss_fn"}:
        variant = rng.choice(("", "", "", "", "", "", "steps", "train", "val", "finite", "all", "surface"))
        if variant == "surface":
            return [LossSurfaceMonitor(num_directions=1, num_points=3, **options, **own)]
        variants: dict[str, dict[str, Any]] = {
            "": {},
            "steps": {"every_n_steps": 2},
            "train": {"mode": "train"},
            "val": {"split": "val", "probe_size": 4},
            "finite": {"engine": "finite_difference"},
            "all": {"metrics": "all"},
        }
        options |= variants[variant]
    return [FlatnessMonitor(**(options | own))]


def sam_of(case: Case, rho: float, **options: Any) -> list[pl.Callback]:
    """Return the SAM of a case."""
    rng = random.Random(case.seed)
    geometry = rng.choice(("euclidean", "euclidean", "element", "layer"))
    return [SharpnessAwareMinimization(rho, geometry, interval=rng.choice((1, 1, 2)), **options)]


def check(kind: str, case: Case) -> str:
    """Return what is wrong with a case; empty if nothing is."""
    assert kind in (*KINDS, "baseline"), kind
    try:
        with _quiet(), deadline(100):
            return _CHECKS[kind](case)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "lightning_flatness" in f.filename), frames[-1])
        short = " ".join(str(error).split())[:300]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {short}"


def _check_baseline(case: Case) -> str:
    return difference(train(case, list)[0], train(case, list)[0])


def _check_monitor(case: Case) -> str:
    watched, caught = train(case, lambda: monitor_of(case))
    found = difference(train(case, list)[0], watched)
    limits = [f for f in case.features if f.warns]
    if found and limits and all(any(re.search(f.warns, message) for message in caught) for f in limits):
        return ""
    return found


def _check_sam0(case: Case) -> str:
    return difference(train(case, list)[0], train(case, lambda: sam_of(case, 0.0))[0])


def _check_sam(case: Case) -> str:
    from fuzz.reference import PlainSAM

    once = train(case, lambda: sam_of(case, 0.1))[0]
    if case.all_features("effects") and (found := difference(train(case, list)[0], once, counts_only=True)):
        return f"not as often as without SAM: {found}"
    if not case.all_features("reference"):
        found = difference(once, train(case, lambda: sam_of(case, 0.1))[0])
        return found and f"not the same twice: {found}"
    sam = sam_of(case, 0.1)[0]
    plain = PlainSAM(sam.rho, sam.geometry, sam.interval)
    found = difference(train(case, lambda: [plain.callback()], plain)[0], once)
    return found and f"not as in a plain SAM: {found}"


def _check_sam_monitor(case: Case) -> str:
    alone = train(case, lambda: sam_of(case, 0.1))[0]
    return difference(alone, train(case, lambda: [*monitor_of(case), *sam_of(case, 0.1)])[0])


def _check_sam_previous(case: Case) -> str:
    from fuzz.reference import PlainPrevious

    once = train(case, lambda: sam_of(case, 0.1, ascent="previous"))[0]
    if not case.all_features("reference"):
        found = difference(once, train(case, lambda: sam_of(case, 0.1, ascent="previous"))[0])
        return found and f"not the same twice: {found}"
    sam: Any = sam_of(case, 0.1)[0]
    plain = PlainPrevious(sam.rho, sam.geometry, sam.interval)
    found = difference(train(case, lambda: [plain], plain)[0], once)
    return found and f"not as in a plain loop: {found}"


_CHECKS = {
    "baseline": _check_baseline,
    "monitor": _check_monitor,
    "sam0": _check_sam0,
    "sam": _check_sam,
    "sam_monitor": _check_sam_monitor,
    "sam_previous": _check_sam_previous,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise after some seconds: a run that hangs is a failure."""

    def late(*args: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
