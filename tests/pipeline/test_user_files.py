"""What a user has is never lost: no verb replaces or deletes a file that sparsepipe did not write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from sparsepipe.artefact import Artefact
from sparsepipe.cli.main import sparsepipe
from sparsepipe.errors import SparsepipeError

RECIPE = """# what I found out
model = { name = "mlp", width = 16 }
data = "digits"
[train]
epochs = 1
threads = 1
[bench]
seconds = 0.1
"""


def call(*arguments: object) -> str:
    done = CliRunner().invoke(sparsepipe, [*map(str, arguments)])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def refused(*arguments: object) -> str:
    """What a verb says that refuses its input."""
    done = CliRunner().invoke(sparsepipe, [*map(str, arguments)])
    assert isinstance(done.exception, SparsepipeError), done.output + str(done.exception)
    return str(done.exception)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    call("run", recipe, "--out", out)
    return out


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_stage_folder_with_a_broken_manifest_is_made_again(recipe: Path, run_folder: Path, finished: Path) -> None:
    for stage in ("freeze", "report"):
        (run_folder / stage / "manifest.json").write_text("{")
    call("run", recipe, "--out", run_folder)
    for stage in ("freeze", "report"):
        Artefact.read(run_folder / stage, stage).verify()
    assert Artefact.read(run_folder / "freeze").digest == Artefact.read(finished / "freeze").digest


@pytest.mark.parametrize(("stage", "metric"), [("export", "files"), ("validate", "passed")])
def test_a_manifest_without_metrics_is_one_clear_line(recipe: Path, run_folder: Path, stage: str, metric: str) -> None:
    manifest = json.loads((run_folder / stage / "manifest.json").read_text())
    (run_folder / stage / "manifest.json").write_text(json.dumps({**manifest, "metrics": {}}))
    if stage == "export":
        shutil.rmtree(run_folder / "validate")
    assert f"'{metric}'" in refused("run", recipe, "--out", run_folder)


@pytest.mark.parametrize("name", ["bench", "validate.partial", ".report.old"])
def test_a_folder_in_the_way_of_any_stage_is_refused_before_the_first(recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert name in refused("run", recipe, "--out", tmp_path / "run")
    assert contents(tmp_path) == before


def test_files_beside_an_output_are_no_matter_where_nothing_is_made_again(recipe: Path, run_folder: Path) -> None:
    (run_folder / "export" / "notes.txt").write_text("mine")
    call("run", recipe, "--out", run_folder)
    before = contents(run_folder)
    assert "notes.txt" in refused("run", recipe, "--out", run_folder, "--force")
    assert "notes.txt" in refused("export", run_folder)
    assert contents(run_folder) == before


@pytest.mark.parametrize("verb", ["train", "run"])
def test_the_recipe_in_the_output_folder_stays_as_the_user_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    written = tmp_path / "recipe.toml"
    written.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert "its copy with the changed settings" in refused(verb, "recipe.toml", "--out", ".", "--set", "seed=4")
    assert [*tmp_path.iterdir()] == [written]
    call(verb, "recipe.toml", "--out", ".")
    assert written.read_text() == RECIPE


def test_a_search_for_a_sparsity_does_not_write_into_the_recipe(tmp_path: Path) -> None:
    written = tmp_path / "recipe.toml"
    written.write_text(RECIPE.replace("[train]", 'method = "str"\n[train]'))
    before = contents(tmp_path)
    assert "recipe.toml" in refused("train", written, "--out", tmp_path, "--target-sparsity", "0.1")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "train.partial"])
def test_a_search_for_a_sparsity_deletes_no_folder_of_somebody_else(recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    search = ("train", recipe, "--set", "method=str", "--target-sparsity", "0.1", "--out", tmp_path)
    assert name in refused(*search)
    assert contents(tmp_path) == before


def test_a_search_for_a_sparsity_deletes_no_interrupted_training(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "train.partial").mkdir()
    (tmp_path / "train.partial" / "checkpoint.safetensors").write_bytes(b"steps")
    before = contents(tmp_path)
    search = ("train", recipe, "--set", "method=str", "--target-sparsity", "0.1", "--out", tmp_path)
    assert "--restart" in refused(*search)
    assert contents(tmp_path) == before


def test_a_page_takes_the_place_of_no_file_but_its_own(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    source = tmp_path / "b.json"
    source.write_bytes((finished / "bench" / "bench.json").read_bytes())
    (tmp_path / "notes.md").write_text("mine")
    before = contents(tmp_path)
    (tmp_path / "link.json").symlink_to(source)
    assert "this source" in refused("report", source, "--out", tmp_path / "b.html")
    assert "this source" in refused("report", source, "--out", tmp_path / "link.html")
    (tmp_path / "link.json").unlink()
    assert "notes.md" in refused("report", source, "--out", tmp_path / "notes.html")
    assert contents(tmp_path) == before
    page = tmp_path / "page.html"
    for title in ("first", "second"):
        call("report", source, "--out", page, "--title", title)
        assert page.with_suffix(".md").read_text().startswith(f"# {title}\n")
    page.with_suffix(".md").write_text("mine")
    assert "page.md" in refused("report", source, "--out", page)
    page.with_suffix(".json").write_text("[]")
    page.with_suffix(".md").unlink()
    assert "page.json" in refused("report", source, "--out", page)
