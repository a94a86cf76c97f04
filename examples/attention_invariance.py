"""Attention and its free basis: which sharpness stays when a transformer's heads change their coordinates.

    python examples/attention_invariance.py

Trains a small character transformer on the sources of Python's own standard library, then multiplies the queries of
every head by a random invertible matrix and its keys by the inverse of the transpose, and the same for values and the
output projection. The network computes the same. A table and a picture show which measures change.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from style import draw_factors
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import AttentionGeometry, InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.metrics import FlatnessMetric

LENGTH = 48


def standard_library(num_characters: int = 400_000) -> Tensor:
    """Return the beginning of the standard library's sources, module after module, as ASCII codes."""
    text, used = "", 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text, used = text + path.read_text(encoding="utf-8", errors="ignore"), used + 1
        if len(text) >= num_characters:
            break
    return torch.tensor([min(ord(c), 127) for c in text[:num_characters]])


class Transformer(nn.Module):
    """Two layers of causal attention over characters."""

    def __init__(self, size: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, size), nn.Embedding(LENGTH, size)
        layer = nn.TransformerEncoderLayer(size, num_heads, 2 * size, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(size, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        logits: Tensor = self.head(self.layers(h, mask=mask, is_causal=True))
        return logits


def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next character."""
    return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def windows(text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return random pieces of the text."""
    starts = torch.randint(len(text) - LENGTH - 1, (size,), generator=generator)
    return torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()])


def train(text: Tensor, num_steps: int) -> Transformer:
    """Train with Adam."""
    torch.manual_seed(0)
    module, generator = Transformer(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_fn(module, windows(text, 32, generator))
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return module.eval()


@torch.no_grad()
def with_other_bases(module: Transformer, condition: float, seed: int = 0) -> Transformer:
    """Give every head other coordinates of its queries and keys, and of its values and output projection."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    for layer in module.layers.layers:
        attention: Any = layer.self_attn
        weight, bias = attention.in_proj_weight.double(), attention.in_proj_bias.double()
        out, size, d = attention.out_proj.weight.double(), attention.embed_dim, attention.head_dim
        for first in range(0, size, d):
            q, k, v = (slice(i * size + first, i * size + first + d) for i in range(3))
            a, b = _matrix(d, condition, generator), _matrix(d, condition, generator)
            for rows, matrix in ((q, torch.linalg.inv(a).mT), (k, a), (v, torch.linalg.inv(b).mT)):
                weight[rows], bias[rows] = matrix @ weight[rows], matrix @ bias[rows]
            out[:, first : first + d] = out[:, first : first + d] @ b.mT
        attention.in_proj_weight.copy_(weight)
        attention.in_proj_bias.copy_(bias)
        attention.out_proj.weight.copy_(out)
    return module


def _matrix(d: int, condition: float, generator: torch.Generator) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(-0.5, 0.5, d, dtype=torch.float64) ** torch.tensor(condition, dtype=torch.float64).log10()
    matrix: Tensor = u @ torch.diag(values) @ v
    return matrix


def metrics() -> dict[str, FlatnessMetric]:
    """Return a sharpness in each geometry."""
    return {
        "weights (lambda_max)": TopEigenvalues(tol=1e-3),
        "layer (invariant sharpness)": InvariantSharpness(tol=1e-3),
        "filter": TopEigenvalues(geometry="filter", tol=1e-3),
        "element": TopEigenvalues(geometry="element", tol=1e-3),
        "attention": TopEigenvalues(geometry="attention", tol=1e-3),
        "attention, rest per element": TopEigenvalues(geometry=AttentionGeometry(rest="element"), tol=1e-3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--sequences", type=int, default=32, help="sequences to measure on")
    parser.add_argument("--condition", type=float, default=30.0, help="condition number of the changes of basis")
    parser.add_argument("--out", type=Path, default=Path("logs/attention_invariance"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    text = standard_library()
    module = train(text, args.steps)
    after = with_other_bases(module, args.condition)
    probe = windows(text, args.sequences, torch.Generator().manual_seed(1))
    results = []
    for network in (module, after):
        landscape, found = LossLandscape(network, [probe], loss_fn), {}
        with landscape.measurement():
            found["loss"] = float(landscape.loss())
            for name, metric in metrics().items():
                metric.update(landscape)
                found[name] = float(metric.compute().squeeze())
        results.append(found)
    before, now = results
    lines = [
        f"A transformer of {sum(p.numel() for p in module.parameters())} weights on the sources of Python "
        f"{platform.python_version()}, after {args.steps} steps; every head in other coordinates (condition number "
        f"{args.condition:g}):", "", "| | before | after | factor |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {name} | {before[name]:.4g} | {now[name]:.4g} | {now[name] / before[name]:.4g} |" for name in before]
    text_ = "\n".join(lines) + "\n"
    (args.out / "attention_invariance.md").write_text(text_)
    factors = {name: now[name] / before[name] for name in before if name != "loss"}
    title = "The same transformer in other coordinates: which sharpness stays"
    draw_factors(factors, args.out / "attention_invariance.png", "sharpness after the change of basis / before", title)
    print(f"\n{text_}\nTook {time.perf_counter() - start:.0f} s. Table and picture are in {args.out}.", file=sys.stdout)


if __name__ == "__main__":
    main()
