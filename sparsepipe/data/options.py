"""The options that datasets take, beside their name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from sparsepipe.settings import Section


class NoOptions(Section):
    """For datasets that leave nothing to choose."""


class HoldOutOptions(Section):
    """For datasets that may come without a test split."""

    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The part of the samples that becomes the test split: stratified, and the same whatever the run's seed."""


class ImageOptions(HoldOutOptions):
    """For datasets of encoded images."""

    size: PositiveInt | None = None
    """Resize the shorter side to this many pixels and crop the centre square."""
    channels: Literal[1, 3] | None = None
    """Convert to greyscale or to RGB; by default, what the images are."""


class TableOptions(ImageOptions):
    """For tables with a column of encoded images and one of labels."""

    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    """By default `test`, else `validation`; where there is neither, a part of the training split."""


class HubOptions(TableOptions):
    """For datasets that the `datasets` library loads."""

    config: str | None = None
    revision: str | None = None
    """Branch, tag or commit of the dataset."""


class EdgeOptions(Section):
    """For graphs whose edges are predicted."""

    features: Literal["product", "ends"] = "product"
    """Of a pair of nodes: `product` multiplies their vectors coordinate by coordinate, for a network that scores pairs;
    `ends` puts the vectors of both side by side, spread over the graph, for one that encodes nodes."""
    dimensions: PositiveInt = 16
    """Of a node's vector (spectral embedding)."""
    hops: Annotated[int, Field(ge=0)] = 2
    """`ends`: how far the graph convolution reaches."""
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The part of the edges that is held out from the graph as positive training samples."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The part of the edges that is held out from the graph as positive test samples."""
    negatives: Literal["degree", "uniform"] = "degree"
    """How the nodes of pairs without an edge are drawn: as often as they occur in held-out edges, so that their degrees
    give nothing away, or each alike."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the division and of the negative samples."""
