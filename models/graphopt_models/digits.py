"""The handwritten digits that come with scikit-learn, in one fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

View = Literal["image", "rows"]
"""How a model sees a digit: as an image [1, 8, 8] or as a sequence of eight rows [8, 8]."""

CLASSES: Final = 10
SIDE: Final = 8
"""Height and width of an image in pixels."""

_BRIGHTEST: Final = 16.0  # the data set counts set pixels in blocks of 4 by 4
_SPLIT_SEED: Final = 0


@dataclass(frozen=True)
class Split:
    """One part of the data set.

    Attributes:
        image: float32 [n, 1, 8, 8], brightness in [0, 1].
        labels: int64 [n], the digit 0 to 9.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.float32]:
        """The images as sequences of rows, top first, float32 [n, 8, 8]."""
        return self.image[:, 0]

    def inputs(self, view: View) -> NDArray[np.float32]:
        """Return the images as a model with this view takes them, float32 [n, ...]."""
        return self.image if view == "image" else self.rows


@dataclass(frozen=True)
class Samples:
    """A split as `graphopt train` takes it: items are (input, label).

    Attributes:
        inputs: float32 [n, ...].
        labels: int64 [n], the digit 0 to 9.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], np.int64]:
        return self.inputs[index], self.labels[index]


@dataclass(frozen=True)
class Digits:
    """The data set: 60 % to train on, 15 % to choose an epoch by, 25 % to measure with."""

    train: Split
    validation: Split
    test: Split


def load() -> Digits:
    """Load the data set in its fixed split, with equal shares of each digit in every part."""
    images, labels = load_digits(return_X_y=True)
    image = (images / _BRIGHTEST).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    whole = Split(image, labels.astype(np.int64))
    rest, test = _divide(whole, second=0.25)
    train, validation = _divide(rest, second=0.2)
    return Digits(train, validation, test)


def samples(view: View = "image") -> tuple[Samples, Samples]:
    """The parts to train on and to choose an epoch by, as `graphopt train` takes them.

    Args:
        view: what the model takes.
    """
    data = load()
    train, validation = data.train, data.validation
    return (
        Samples(train.inputs(view), train.labels),
        Samples(validation.inputs(view), validation.labels),
    )


def _divide(split: Split, *, second: float) -> tuple[Split, Split]:
    """Divide into two parts, the second one with this share of the samples."""
    parts = train_test_split(
        split.image,
        split.labels,
        test_size=second,
        stratify=split.labels,
        random_state=_SPLIT_SEED,
    )
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])
