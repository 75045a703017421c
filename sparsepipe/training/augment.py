"""Augmentation of image batches, on tensors, on their device: for each sample its own random crops, mirror, cutout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MAX_ASPECT = 4 / 3
"""Of the part that a resized crop takes; the smallest is its reciprocal."""
TRIES = 10
"""Parts that are drawn until one fits into the image, which the whole is taken for if none does."""


@dataclass(frozen=True)
class Draws:
    """The random choices for n samples, each int64 [n] where nothing else is said."""

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
    part: Tensor
    """Top, left, height and width of the part that is resized, as shares of the image's sides, float32 [n, 4]."""

    def select(self, rows: slice) -> Draws:
        """The choices for some of the samples."""
        return Draws(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def to(self, device: torch.device) -> Draws:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__}
        return Draws(**moved)


@dataclass(frozen=True)
class Augmentation:
    """What to do to training images, as a recipe has it.

    Attributes:
        crop: pad each side by this many zero pixels, then crop to the old size at a random place.
        flip: mirror left-right with probability one half.
        cutout: side of a square, in pixels, that is set to zero around a random pixel; it may reach over the edge
            (DeVries and Taylor, arXiv 1708.04552).
        resized_crop: take a random part of at least this share of the area, whose aspect ratio is that of the image
            times 3/4 to 4/3, and resize it to the size of the image; this comes first (Szegedy et al., arXiv 1409.4842,
            section 6). 0 for none.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    resized_crop: float = 0.0

    @property
    def active(self) -> bool:
        return bool(self.crop or self.flip or self.cutout or self.resized_crop)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """Random choices for `count` images of `height` x `width` pixels."""

        def below(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator)

        offsets = 2 * self.crop + 1
        return Draws(
            top=below(offsets),
            left=below(offsets),
            mirror=below(2),
            row=below(height),
            column=below(width),
            part=self._parts(count, generator) if self.resized_crop else torch.tensor([0.0, 0, 1, 1]).repeat(count, 1),
        )

    def _parts(self, count: int, generator: torch.Generator) -> Tensor:
        """Random parts [count, 4] of areas between `resized_crop` and 1 that lie inside the image."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator)

        area = self.resized_crop + (1 - self.resized_crop) * uniform(TRIES)
        aspect = MAX_ASPECT ** (2 * uniform(TRIES) - 1)
        sizes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1)
        sizes = torch.cat([sizes, torch.ones(count, 1, 2)], dim=1)
        first = (sizes <= 1).all(dim=-1).int().argmax(dim=1)
        size = sizes[torch.arange(count), first]
        return torch.cat([uniform(2) * (1 - size), size], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augmented copies of images [n, H, W, C] of any number type."""
        if self.resized_crop:
            images = _resized(images, draws.part)
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


def _resized(images: Tensor, parts: Tensor) -> Tensor:
    """The parts of images [n, H, W, C], resized to H x W bilinearly: pixels are only ever made larger."""
    top, left, height, width = parts.unbind(1)
    still = torch.zeros_like(top)
    # grid_sample's coordinates go from -1 to 1 across the image.
    columns = torch.stack([width, still, 2 * left + width - 1], dim=1)
    rows = torch.stack([still, height, 2 * top + height - 1], dim=1)
    planes = images.permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(torch.stack([columns, rows], dim=1), list(planes.shape), align_corners=False)
    sampled = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    return (sampled if images.is_floating_point() else sampled.round()).to(images.dtype).contiguous()
