"""How products with the Hessian are made: engines behind one interface, and the choice among them."""

from lightning_flatness.engines.base import BatchedLoss, Engine, EngineName, check_engine
from lightning_flatness.engines.graphs import GraphStore
from lightning_flatness.engines.selection import Products

__all__ = ["BatchedLoss", "Engine", "EngineName", "GraphStore", "Products", "check_engine"]
