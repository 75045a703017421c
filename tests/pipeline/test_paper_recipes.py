"""The recipes of the paper's experiments train, for a few steps, on generated data in the layout that they name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
image = pytest.importorskip("PIL.Image")

from sparsepipe import recipe as recipes  # noqa: E402
from sparsepipe.artefact import Artefact, read_json  # noqa: E402
from sparsepipe.comparison import plan  # noqa: E402
from sparsepipe.reporting.markdown import block  # noqa: E402
from sparsepipe.settings import check  # noqa: E402
from sparsepipe.stages import train  # noqa: E402

RECIPES = Path(__file__).parents[2] / "examples" / "paper"
RNG = np.random.default_rng(0)


def cifar(folder: Path, classes: int) -> str:
    """The archive of CIFAR-10 or CIFAR-100 with six images in each of its files."""

    def part() -> dict[str, Any]:
        key = "labels" if classes == 10 else "fine_labels"
        labels = [0, 1, 0, 1, classes - 1, 2]
        return {"data": RNG.integers(0, 256, (6, 3072), np.uint8), key: labels}

    names = [f"class{number}" for number in range(classes)]
    if classes == 10:
        files = {f"data_batch_{number}": part() for number in range(1, 6)} | {"test_batch": part()}
        files["batches.meta"] = {"label_names": names}
    else:
        files = {"train": part(), "test": part(), "meta": {"fine_label_names": names}}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, 2))
    return f"cifar{classes}:{folder}"


def imagenet(folder: Path) -> str:
    """Folders of three classes with JPEG files of the usual proportions."""
    for split, count in (("train", 2), ("val", 1)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = RNG.integers(0, 256, (240, 320, 3), np.uint8)
                image.fromarray(pixels).save(folder / split / name / f"{number}.JPEG")
    return f"imagefolder:{folder}"


def graph(path: Path) -> str:
    """A text file of edges between 200 nodes in two blocks."""
    block = np.arange(200) % 2
    joined = RNG.random((200, 200)) < np.where(block[:, None] == block, 0.15, 0.02)
    np.savetxt(path, np.argwhere(np.triu(joined, 1)), fmt="%d", header="a comment")
    return f"edgelist:{path}"


CASES: dict[str, tuple[Callable[[Path], str], float, int]] = {
    "vgg19_cifar10": (lambda folder: cifar(folder, 10), 0.98, 10),
    "vgg19_cifar100": (lambda folder: cifar(folder, 100), 0.9, 2),
    "resnet50_cifar10": (lambda folder: cifar(folder, 10), 0.95, 10),
    "resnet50_cifar100": (lambda folder: cifar(folder, 100), 0.98, 2),
    "resnet50_imagenet": (imagenet, 0.8, 2),
    "links_ia_email": (graph, 0.98, 64),
    "links_ia_email_gnn": (graph, 0.98, 64),
    "links_wiki_talk": (graph, 0.8, 64),
}
"""Data, sparsity and batch size of each recipe: two steps of the large networks, whose mask updates take seconds."""


def test_there_is_a_case_for_each_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_sparse(name: str, tmp_path: Path) -> None:
    make, sparsity, batch = CASES[name]
    every = [
        *(f"data={make(tmp_path / 'data')}", f"method.sparsity={sparsity}", "method.update_every=1"),
        *("train.epochs=1", f"train.batch_size={batch}", "train.validation=0.34", "schedule.warmup=0"),
        "train.threads=1",
    ]
    recipe = recipes.load(RECIPES / f"{name}.toml", every)
    done = train.run(train.TrainConfig.from_recipe(recipe), {}, tmp_path / "train")
    assert isinstance(done, Artefact)
    assert done.metrics["sparsity"] == pytest.approx(sparsity, abs=2e-3)
    assert done.metrics["mask_updates"] >= 1
    # More weights were active at any time than are at once.
    assert done.metrics["exploration_rate"] > 1.001 * (1 - done.metrics["sparsity"])


def test_the_page_on_link_prediction_says_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    links = import_module("links")
    text = (RECIPES / "LINKS.md").read_text(encoding="utf-8")
    result = read_json(RECIPES.parents[1] / links.RESULT)
    for name, content in links.blocks(result).items():
        assert block(text, name, where="LINKS.md") == content, name
    assert all(file["passed"] for files in result["exported"].values() for file in files.values())


def test_every_row_of_link_prediction_is_of_the_recipe_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(RECIPES.parents[1])
    links = import_module("links")
    result = read_json(links.RESULT)
    rows = {(row["network"], row["name"]): row for row in result["rows"]}
    listed = 0
    for network, recipe in links.RECIPES.items():
        for grid in links.grids(network):
            for training in plan(recipe, grid, links.overrides("FILE"), links.OUT / network):
                row, config = rows[network, training.folder.name], training.stage.config
                kept = {**result["configs"][row["config"]], "method": row["method"], "seed": row["seed"]}
                kept["data"]["name"] = "edgelist:FILE"
                # Through the model, so that a setting that recipes did not have yet counts as its default.
                before = check(type(config), kept, where=row["name"])
                assert before.model_dump() == config.model_dump(), row["name"]
                listed += 1
    assert listed == len(rows)
