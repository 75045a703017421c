"""Nested samples: the first n of a fixed order that the seed decides, with labels that mean something or do not."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sparsepipe.data import ArraySplit, Dataset
from sparsepipe.errors import RecipeError
from sparsepipe.spec import Preprocessing

Labels = Literal["semantic", "random"]
Inputs = Literal["data", "random"]

MOST_RANDOM = 2**20
"""Random inputs never come to an end; this is where a search gives up."""


class NestedSamples:
    """Samples of which the first n are the same for every n.

    Args:
        dataset: gives the samples (of its training split), the shape and the classes.
        seed: of the order, and of what is random.
        labels: semantic, or random: each class as likely, whatever the sample.
        inputs: data, or random: independent standard normal values in the shape of the data.

    Raises:
        RecipeError: random inputs with semantic labels.
    """

    def __init__(self, dataset: Dataset, seed: int, *, labels: Labels, inputs: Inputs) -> None:
        if inputs == "random" and labels == "semantic":
            raise RecipeError(
                "Random inputs have no semantic labels.",
                where="--labels",
                advice="Use --labels random, or real inputs.",
            )
        self.dataset, self._seed, self._labels, self._inputs = dataset, seed, labels, inputs
        self.total = MOST_RANDOM if inputs == "random" else len(dataset.train)
        # RandomState's streams are frozen; those of numpy's newer generators may change with the version.
        self._order = np.random.RandomState(seed).permutation(len(dataset.train))
        channels = dataset.input_shape[0]
        identity = Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels)
        self.preprocessing = identity if inputs == "random" else dataset.preprocessing

    def first(self, count: int) -> ArraySplit:
        """The first `count` samples, in memory.

        Inputs are raw, for `preprocessing`: uint8 [n, H, W, C] or float32 [n, F]; random ones are float32 in either
        shape.
        """
        rows = self._order[:count].astype(np.int64)
        if self._labels == "random":
            labels = np.random.RandomState([self._seed, 1]).randint(len(self.dataset.classes), size=count)
        else:
            labels = np.asarray(self.dataset.train.labels)[rows]
        if self._inputs == "random":
            first, *rest = self.dataset.input_shape
            shape = (*rest, first)  # images have their channels last until they are prepared
            raw = np.random.RandomState([self._seed, 2]).standard_normal((count, *shape)).astype(np.float32)
        else:
            raw = self.dataset.train.load(rows)
        return ArraySplit(raw, labels.astype(np.int64))
