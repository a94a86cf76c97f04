"""All features, from the files that define them."""

from fuzz import callbacks, datasets, hugging_face, modules, optimizers, state, steps, trainers
from fuzz.base import FEATURES, draw_case, known_limits

__all__ = ["FEATURES", "callbacks", "datasets", "draw_case", "hugging_face", "known_limits", "modules", "optimizers",
           "state", "steps", "trainers"]  # fmt: skip
