"""Augmentation: what it does to marked images, and that randomness is keyed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from sparsepipe.training.augment import Augmentation, Draws  # noqa: E402
from sparsepipe.training.seeds import generator  # noqa: E402

HEIGHT, WIDTH = 6, 8


def marked(count: int) -> Tensor:
    """Images [n, 6, 8, 2] in which every pixel tells where it is: row + 1 in channel 0, column + 1 in channel 1."""
    rows, columns = torch.meshgrid(torch.arange(1, HEIGHT + 1), torch.arange(1, WIDTH + 1), indexing="ij")
    image = torch.stack([rows, columns], dim=-1).to(torch.uint8)
    return image.expand(count, HEIGHT, WIDTH, 2).clone()


def draws(augmentation: Augmentation, count: int, step: int = 0) -> Draws:
    return augmentation.draw(count, HEIGHT, WIDTH, generator(0, "test", step))


def test_each_sample_is_cropped_at_its_own_place_with_zeros_around() -> None:
    augmentation = Augmentation(crop=2)
    chosen = draws(augmentation, 64)
    images = augmentation.apply(marked(64), chosen)
    assert images.shape == (64, HEIGHT, WIDTH, 2)
    assert images.dtype == torch.uint8
    for image, top, left in zip(images, chosen.top.tolist(), chosen.left.tolist(), strict=True):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                source = (row + top - 2, column + left - 2)
                inside = 0 <= source[0] < HEIGHT and 0 <= source[1] < WIDTH
                expected = [source[0] + 1, source[1] + 1] if inside else [0, 0]
                assert image[row, column].tolist() == expected
    assert {(top, left) for top, left in zip(chosen.top.tolist(), chosen.left.tolist(), strict=True)} > {(2, 2)}
    assert chosen.top.min() == 0
    assert chosen.top.max() == 4


def test_about_half_of_the_samples_are_mirrored() -> None:
    augmentation = Augmentation(flip=True)
    chosen = draws(augmentation, 400)
    images = augmentation.apply(marked(400), chosen)
    mirrored = torch.tensor([torch.equal(image, marked(1)[0].flip(1)) for image in images])
    kept = torch.tensor([torch.equal(image, marked(1)[0]) for image in images])
    assert bool((mirrored ^ kept).all())
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("size", [1, 3, 4])
def test_cutout_zeroes_a_square_that_may_reach_over_the_edge(size: int) -> None:
    augmentation = Augmentation(cutout=size)
    images = augmentation.apply(marked(200), draws(augmentation, 200))
    areas = set()
    for image in images:
        rows, columns = (image[..., 0] == 0).nonzero(as_tuple=True)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert len(rows) == height * width, "not a rectangle"
        assert max(height, width) <= size
        areas.add(height * width)
        untouched = image[..., 0] != 0
        assert torch.equal(image[untouched], marked(1)[0][untouched])
    assert size * size in areas
    assert (len(areas) > 1) == (size > 1)


def test_crop_then_mirror_then_cutout_combine() -> None:
    both = Augmentation(crop=1, flip=True, cutout=2)
    chosen = draws(both, 32)
    expected = Augmentation(flip=True).apply(Augmentation(crop=1).apply(marked(32), chosen), chosen)
    expected = Augmentation(cutout=2).apply(expected, chosen)
    assert torch.equal(both.apply(marked(32), chosen), expected)


def test_the_same_key_gives_the_same_images_and_another_key_others() -> None:
    augmentation = Augmentation(crop=2, flip=True, cutout=3)

    def images(step: int) -> Tensor:
        return augmentation.apply(marked(16), draws(augmentation, 16, step))

    assert torch.equal(images(3), images(3))
    assert not torch.equal(images(3), images(4))


def test_switching_one_part_on_leaves_the_draws_of_the_others() -> None:
    plain, full = draws(Augmentation(crop=2), 16), draws(Augmentation(crop=2, flip=True, cutout=3), 16)
    assert torch.equal(plain.top, full.top)
    assert torch.equal(plain.left, full.left)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws(Augmentation(crop=2), 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_not_changed() -> None:
    augmentation = Augmentation(crop=1, flip=True, cutout=2)
    images = marked(4)
    augmentation.apply(images, draws(augmentation, 4))
    assert torch.equal(images, marked(4))


def test_active_says_whether_there_is_anything_to_do() -> None:
    assert not Augmentation().active
    assert all(Augmentation(**{key: 1}).active for key in ("crop", "cutout"))  # type: ignore[arg-type]
    assert Augmentation(flip=True).active


def test_a_resized_crop_shows_the_part_that_was_drawn() -> None:
    augmentation = Augmentation(resized_crop=0.2)
    images = torch.arange(16 * 16 * 2, dtype=torch.float32).reshape(1, 16, 16, 2).expand(3, -1, -1, -1)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    parts = torch.stack([whole, torch.tensor([0.5, 0.25, 0.5, 0.5]), torch.tensor([0.0, 0.25, 1.0, 0.5])])
    chosen = replace(draws(augmentation, 3), part=parts)
    found = augmentation.apply(images, chosen)
    torch.testing.assert_close(found[0], images[0])
    for image, (rows, columns) in zip(
        found[1:], [(slice(8, 16), slice(4, 12)), (slice(16), slice(4, 12))], strict=True
    ):
        part = images[:1, rows, columns].permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(part, (16, 16), mode="bilinear", align_corners=False)
        inner = slice(1, -1)  # at its edges the part takes in what is beside it
        torch.testing.assert_close(image[inner, inner], expected[0].permute(1, 2, 0)[inner, inner])


def test_parts_lie_inside_and_are_as_large_as_asked() -> None:
    augmentation = Augmentation(resized_crop=0.08)
    top, left, height, width = draws(augmentation, 4000).part.double().unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, aspect = height * width, width / height
    assert 0.08 - 1e-6 <= area.min() < 0.1
    assert area.max() > 0.95
    # Uniform between 0.08 and 1 where it fits, which with the aspect ratio exp(x) means below exp(-|x|).
    longest, smallest = math.log(4 / 3), 0.08
    first, second = (-math.expm1(-power * longest) / (power * longest) for power in (1, 2))
    mean = (second - smallest**2) / (2 * (first - smallest))
    assert area.mean().item() == pytest.approx(mean, abs=0.01)
    assert 0.75 - 1e-6 <= aspect.min() < 0.76
    assert 1.31 < aspect.max() <= 4 / 3 + 1e-6
    images = marked(8)
    assert augmentation.apply(images, draws(augmentation, 8)).dtype == torch.uint8


def test_other_augmentations_draw_the_same_with_and_without_a_resized_crop() -> None:
    one, other = draws(Augmentation(crop=2), 16), draws(Augmentation(crop=2, resized_crop=0.5), 16)
    assert torch.equal(one.top, other.top)
    assert torch.equal(one.column, other.column)
