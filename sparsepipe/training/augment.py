"""Augmentation of image batches: random crop, mirror and cutout for each sample, on tensors, on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Draws:
    """The random choices for n samples, each int64 [n]."""

    top: Tensor
    """First row of the crop in the padded image."""
    left: Tensor
    """First column of the crop in the padded image."""
    mirror: Tensor
    """1 where the image is mirrored left-right, else 0."""
    row: Tensor
    """Row of the centre of the cutout."""
    column: Tensor
    """Column of the centre of the cutout."""

    def select(self, rows: slice) -> Draws:
        """The choices for some of the samples."""
        return Draws(self.top[rows], self.left[rows], self.mirror[rows], self.row[rows], self.column[rows])

    def to(self, device: torch.device) -> Draws:
        moved = [getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__]
        return Draws(*moved)


@dataclass(frozen=True)
class Augmentation:
    """What to do to training images, as a recipe has it.

    Attributes:
        crop: pad each side by this many zero pixels, then crop to the old size at a random place.
        flip: mirror left-right with probability one half.
        cutout: side of a square, in pixels, that is set to zero around a random pixel; it may reach over the edge
            (DeVries and Taylor, arXiv 1708.04552).
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    @property
    def active(self) -> bool:
        return bool(self.crop or self.flip or self.cutout)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """Random choices for `count` images of `height` x `width` pixels."""

        def below(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator)

        offsets = 2 * self.crop + 1
        return Draws(below(offsets), below(offsets), below(2), below(height), below(width))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augmented copies of images [n, H, W, C] of any number type."""
        if self.crop or self.flip:
            images = self._crop_and_flip(images, draws)
        if self.cutout:
            images = self._cut_out(images, draws)
        return images

    def _crop_and_flip(self, images: Tensor, draws: Draws) -> Tensor:
        count, height, width, channels = images.shape
        device = images.device
        # pad counts from the last dimension: channels, columns, rows
        padded = functional.pad(images, (0, 0, self.crop, self.crop, self.crop, self.crop)) if self.crop else images
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            columns = torch.where(draws.mirror[:, None] == 1, width - 1 - columns, columns)
        rows = torch.arange(height, device=device).expand(count, height)
        if self.crop:
            rows, columns = rows + draws.top[:, None], columns + draws.left[:, None]
        # One flat list of pixels is several times faster than indexing three dimensions.
        first_rows = torch.arange(count, device=device)[:, None] * padded.shape[1]
        pixels = (first_rows + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]
        chosen = padded.reshape(-1, channels).index_select(0, pixels.reshape(-1))
        return chosen.reshape(count, height, width, channels)

    def _cut_out(self, images: Tensor, draws: Draws) -> Tensor:
        _, height, width, _ = images.shape

        def inside(centre: Tensor, size: int) -> Tensor:
            first = centre[:, None] - self.cutout // 2
            position = torch.arange(size, device=images.device)
            return (position >= first) & (position < first + self.cutout)

        square = inside(draws.row, height)[:, :, None] & inside(draws.column, width)[:, None, :]
        return images.masked_fill(square[..., None], 0)
