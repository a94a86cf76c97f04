"""What the study of lambda_max trains: the settings of its five findings, each once, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from to_accuracy import AccuracyRecipe


@dataclass(frozen=True)
class Grid:
    """Settings of a study.

    Attributes:
        base: What all settings have in common.
        lrs: Learning rates of plain SGD, in rising order.
        batch_sizes: Batch sizes of plain SGD, in rising order.
        diagonal: Pairs of learning rate and batch size with one ratio.
        rhos: Of SAM, at the largest learning rate.
        sam_batch_sizes: Batch sizes of SAM, and of the SGD that it is compared with, in rising order.
        dropouts: Probabilities, the first of them 0, the last excessive, in rising order.
        moderate_dropout: What the excessive one is compared with.
        dropout_place: Learning rate and batch size of the runs with dropout.
        norm_lrs: Learning rates of the convolutional network with and without BatchNorm.
        norm_batch_sizes: Its batch sizes.
        norm_num_train: Its training samples.
        momentum_places: Pairs for the convolutional network with a momentum of 0.9, which the paper does not have.
        num_between: Points up to the next iterate, for BatchNorm at the smallest learning rate.
    """

    base: AccuracyRecipe
    lrs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    diagonal: tuple[tuple[float, int], ...]
    rhos: tuple[float, ...]
    sam_batch_sizes: tuple[int, ...]
    dropouts: tuple[float, ...]
    moderate_dropout: float
    dropout_place: tuple[float, int]
    norm_lrs: tuple[float, ...]
    norm_batch_sizes: tuple[int, ...]
    norm_num_train: int
    momentum_places: tuple[tuple[float, int], ...] = ()
    num_between: int = 8

    @property
    def sam_lr(self) -> float:
        """The learning rate of SAM, and of the SGD that it is compared with."""
        return self.lrs[-1]

    @property
    def norm_places(self) -> list[tuple[float, int]]:
        """All pairs of learning rate and batch size of the convolutional network."""
        return [(lr, size) for size in self.norm_batch_sizes for lr in self.norm_lrs]

    def on(self, data: str) -> Grid:
        """Return the same settings for other data."""
        return replace(self, base=replace(self.base, data=data))

    def settings(self) -> dict[str, AccuracyRecipe]:
        """All settings by name: findings share some."""
        found = {}
        places = [(lr, size) for size in self.batch_sizes for lr in self.lrs]
        places += [*self.diagonal, *[(self.sam_lr, size) for size in self.sam_batch_sizes]]
        for lr, size in dict.fromkeys(places):
            found[plain(lr, size)] = replace(self.base, lr=lr, batch_size=size)
        for size in self.sam_batch_sizes:
            for rho in self.rhos:
                found[sam(rho, size)] = replace(self.base, lr=self.sam_lr, batch_size=size, rho=rho)
        lr, size = self.dropout_place
        for p in self.dropouts:
            found[dropout(p)] = replace(self.base, lr=lr, batch_size=size, dropout=p)
        for lr, size in self.norm_places:
            recipe = replace(self.base, lr=lr, batch_size=size, network="vgg", num_train=self.norm_num_train)
            found[convolutional(lr, size)] = recipe
            between = self.num_between if lr == self.norm_lrs[0] else 0
            found[batch_norm(lr, size)] = replace(recipe, batch_norm=True, num_between=between)
        for lr, size in self.momentum_places:
            recipe = replace(
                self.base, lr=lr, batch_size=size, momentum=0.9, network="vgg", num_train=self.norm_num_train
            )
            found[with_momentum(convolutional(lr, size))] = recipe
            found[with_momentum(batch_norm(lr, size))] = replace(recipe, batch_norm=True)
        return found


def plain(lr: float, batch_size: int) -> str:
    return f"lr {lr:g}, batch {batch_size}"


def sam(rho: float, batch_size: int) -> str:
    return f"SAM rho {rho:g}, batch {batch_size}"


def dropout(p: float) -> str:
    return f"dropout {p:g}"


def convolutional(lr: float, batch_size: int) -> str:
    return f"VGG, lr {lr:g}, batch {batch_size}"


def batch_norm(lr: float, batch_size: int) -> str:
    return f"VGG with BatchNorm, lr {lr:g}, batch {batch_size}"


def with_momentum(name: str) -> str:
    return f"{name}, momentum"


FULL = Grid(
    AccuracyRecipe(lr=0.0, batch_size=0),
    lrs=(0.1, 0.2, 0.3),  # at 0.4 some runs diverge
    batch_sizes=(50, 250, 1000, 5000),
    diagonal=((0.1, 50), (0.2, 100), (0.3, 150)),
    rhos=(0.025, 0.05, 0.1),
    sam_batch_sizes=(50, 200, 1000, 2500),
    dropouts=(0.0, 0.1, 0.2, 0.5, 0.6, 0.7),
    moderate_dropout=0.2,
    dropout_place=(0.2, 250),
    norm_lrs=(0.05, 0.1, 0.2),
    norm_batch_sizes=(100, 500),
    norm_num_train=5000,
    momentum_places=((0.02, 100), (0.02, 500)),
)
QUICK = Grid(
    AccuracyRecipe(lr=0.0, batch_size=0, accuracy=90.0, max_epochs=100, num_train=1000, num_test=1000, num_probe=250),
    lrs=(0.1, 0.4),
    batch_sizes=(50, 250),
    diagonal=((0.1, 50), (0.4, 200)),
    rhos=(0.05,),
    sam_batch_sizes=(50, 250),
    dropouts=(0.0, 0.2, 0.5),
    moderate_dropout=0.2,
    dropout_place=(0.4, 50),
    norm_lrs=(0.05, 0.2),
    norm_batch_sizes=(50,),
    norm_num_train=1000,
    num_between=3,
)
