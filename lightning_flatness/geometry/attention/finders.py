"""Pairs of the attention layers that are known: torch's own, and those of Hugging Face's GPT-2, BERT, ViT and Llama."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_flatness.geometry.attention.pairs import Pair, Part
from lightning_flatness.geometry.base import UndefinedGeometryError

_ROTARY_HALVES = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
"""Rotary embeddings of these turn the planes of coordinates ``i`` and ``i + d/2``."""


def pairs_of(module: nn.Module) -> list[Pair]:
    """Return the pairs of all attention layers that are known, with names of parameters in ``module``.

    Raises:
        UndefinedGeometryError: If a layer has norms of queries and keys, or rotary embeddings whose planes are not
            known.
    """
    pairs: list[Pair] = []
    for name, child in module.named_modules():
        finder = _finder(child)
        if finder is not None:
            pairs += finder(f"{name}." if name else "", child)
    return pairs


def _finder(module: nn.Module) -> Callable[[str, Any], list[Pair]] | None:
    if isinstance(module, nn.MultiheadAttention):
        return _torch
    names = {kind.__name__ for kind in type(module).__mro__}
    if "GPT2Attention" in names:
        return _gpt2
    if "BertAttention" in names:
        return _bert
    if "ViTAttention" in names and hasattr(module, "attention"):  # transformers 4
        return _old_vit
    if all(isinstance(getattr(module, f"{kind}_proj", None), nn.Linear) for kind in "qkvo"):
        return _projections if hasattr(module, "config") else None
    return None


def _both(name: str, **where: Any) -> tuple[Part, ...]:
    """Return weight and bias of a linear layer that produces coordinates."""
    return Part(f"{name}.weight", **where), Part(f"{name}.bias", **where)


def _torch(prefix: str, layer: nn.MultiheadAttention) -> list[Pair]:
    size, heads = layer.embed_dim, layer.num_heads
    is_fused = layer.in_proj_weight is not None  # one size of queries, keys and values

    def rows(i: int, kind: str, *extra: Part) -> tuple[Part, ...]:
        start, stop = i * size, (i + 1) * size
        separate = Part(f"{prefix}{kind}_proj_weight")
        weight = Part(f"{prefix}in_proj_weight", 0, start, stop) if is_fused else separate
        return weight, Part(f"{prefix}in_proj_bias", 0, start, stop), *extra

    query = rows(0, "q")
    key, value = rows(1, "k", Part(f"{prefix}bias_k", 2)), rows(2, "v", Part(f"{prefix}bias_v", 2))
    out = (Part(f"{prefix}out_proj.weight", 1),)
    return [Pair(query, key, heads), Pair(value, out, heads)]


def _gpt2(prefix: str, layer: Any) -> list[Pair]:
    """Hugging Face's Conv1D stores (inputs, outputs); one of them makes queries, keys and values."""
    size, heads = layer.embed_dim, layer.num_heads

    def rows(name: str, i: int) -> tuple[Part, ...]:
        start, stop = i * size, (i + 1) * size
        return Part(f"{prefix}{name}.weight", 1, start, stop), Part(f"{prefix}{name}.bias", 0, start, stop)

    crosses = bool(layer.is_cross_attention)
    query = rows("q_attn", 0) if crosses else rows("c_attn", 0)
    key, value = rows("c_attn", 0 if crosses else 1), rows("c_attn", 1 if crosses else 2)
    out = (Part(f"{prefix}c_proj.weight", 0),)
    return [Pair(query, key, heads), Pair(value, out, heads)]


def _bert(prefix: str, layer: Any) -> list[Pair]:
    return _named(prefix, "self", layer.self.num_attention_heads)


def _old_vit(prefix: str, layer: Any) -> list[Pair]:
    return _named(prefix, "attention", layer.attention.num_attention_heads)


def _named(prefix: str, inner: str, heads: int) -> list[Pair]:
    query, key, value = (_both(f"{prefix}{inner}.{kind}") for kind in ("query", "key", "value"))
    return [Pair(query, key, heads), Pair(value, (Part(f"{prefix}output.dense.weight", 1),), heads)]


def _projections(prefix: str, layer: Any) -> list[Pair]:
    """Layers with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, maybe fewer heads of keys than of queries."""
    config, kind = layer.config, type(layer).__name__
    if any(isinstance(getattr(layer, f"{which}_norm", None), nn.Module) for which in "qk"):
        raise _undefined(
            f"{kind} ({prefix.rstrip('.')!r}), which normalises queries and keys: they do not enter as a product "
            "alone, and no change of basis leaves the function alone"
        )
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    is_rotary = "position_embeddings" in inspect.signature(layer.forward).parameters
    if is_rotary and (kind not in _ROTARY_HALVES or _rotary_share(config) != 1):
        raise _undefined(
            f"{kind} ({prefix.rstrip('.')!r}) with rotary embeddings whose planes are not known. They leave only "
            "rotations and scalings of each plane"
        )
    shared = heads // groups
    query, key, value = _both(f"{prefix}q_proj", shared=shared), _both(f"{prefix}k_proj"), _both(f"{prefix}v_proj")
    out = (Part(f"{prefix}o_proj.weight", 1, shared=shared),)
    return [Pair(query, key, groups, is_rotary), Pair(value, out, groups)]


def _rotary_share(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return float(share or getattr(config, "partial_rotary_factor", None) or 1)


def _undefined(found: str) -> UndefinedGeometryError:
    return UndefinedGeometryError(
        f"Expected attention whose changes of basis are known for the geometry 'attention', got {found}. Declare the "
        "pairs that remain: AttentionGeometry(pairs=[Pair(...)]), or use the geometry 'layer'."
    )
