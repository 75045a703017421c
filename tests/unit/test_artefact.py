"""Artefacts: complete or absent, never half; digests; names that cannot lead out of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from sparsepipe import artefact, folders
from sparsepipe.artefact import Artefact
from sparsepipe.errors import ArtefactError


class Config(BaseModel):
    level: int = 1


def make(folder: Path, content: str = "hello", stage: str = "demo") -> Artefact:
    with artefact.draft(folder, stage, Config(), {"source": "sha256:0"}) as building:
        (building.folder / "sub").mkdir()
        (building.folder / "sub" / "file.txt").write_text(content)
        building.metrics["answer"] = 42
    return Artefact.read(folder, stage)


def test_a_finished_artefact_reads_back(tmp_path: Path) -> None:
    made = make(tmp_path / "demo")
    assert made.metrics["answer"] == 42
    assert made.manifest.config == {"level": 1}
    assert made.manifest.inputs == {"source": "sha256:0"}
    assert made.manifest.outputs == {"sub/file.txt": f"sha256:{hashlib.sha256(b'hello').hexdigest()}"}
    assert made.file("sub/file.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    made.verify()


def test_the_time_that_the_block_took_is_a_metric_unless_it_says_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(artefact, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert make(tmp_path / "a").metrics["seconds"] == 2.5
    with artefact.draft(tmp_path / "b", "demo", Config(), {}) as building:
        building.metrics["seconds"] = 7.0
    assert Artefact.read(tmp_path / "b").metrics["seconds"] == 7.0


def test_the_digest_depends_on_content_and_stage_only(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.digest == second.digest
    assert make(tmp_path / "c", content="other").digest != first.digest
    assert make(tmp_path / "d", stage="another").digest != first.digest


def test_a_failed_stage_leaves_the_old_artefact_and_nothing_else(tmp_path: Path) -> None:
    old = make(tmp_path / "demo")
    with pytest.raises(ZeroDivisionError), artefact.draft(tmp_path / "demo", "demo", Config(), {}) as building:
        (building.folder / "half.txt").write_text("half")
        raise ZeroDivisionError
    assert Artefact.read(tmp_path / "demo").digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_resumable_stage_keeps_what_it_had(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        artefact.draft(tmp_path / "demo", "demo", Config(), {}, resumable=True) as building,
    ):
        (building.folder / "checkpoint").write_text("1")
        raise ZeroDivisionError
    with artefact.draft(tmp_path / "demo", "demo", Config(), {}, resumable=True) as building:
        assert (building.folder / "checkpoint").read_text() == "1"
    assert not (tmp_path / "demo.partial").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_kill_leaves_while_a_new_folder_takes_the_place_of_the_old_is_cleared_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    class KilledError(BaseException):
        pass

    old = make(tmp_path / "demo", content="old")
    replace, done = os.replace, 0

    def counting(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames and "manifest" not in Path(target).name:
            raise KilledError
        replace(source, target)
        done += "manifest" not in Path(target).name

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "replace", counting)
        if renames == 2:  # both are made, but the old folder is still there
            patch.setattr(shutil, "rmtree", _raise_where_it_exists(KilledError))
        with artefact.draft(tmp_path / "demo", "demo", Config(), {}, resumable=True) as building:
            (building.folder / "new.txt").write_text("new")
    hidden = tmp_path / ".demo.old"
    assert hidden.exists() == (renames > 0)
    if renames:
        assert Artefact.read(hidden).digest == old.digest
    made = make(tmp_path / "demo", content="newer")
    assert made.file("sub/file.txt").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def _raise_where_it_exists(error: type[BaseException]) -> Callable[..., None]:
    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            raise error

    return rmtree


def test_a_folder_with_foreign_files_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ArtefactError, match="holds other files"):
        make(folder)
    assert (folder / "photo.jpg").read_bytes() == b"x"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_a_file_that_somebody_put_into_an_artefact_is_not_lost(tmp_path: Path) -> None:
    made = make(tmp_path / "demo")
    (made.folder / "sub" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ArtefactError, match=r"the stage 'demo' did not write: sub/notes\.txt"):
        make(tmp_path / "demo", content="new")
    assert snapshot(tmp_path) == before
    (made.folder / "sub" / "notes.txt").unlink()
    assert make(tmp_path / "demo", content="new").file("sub/file.txt").read_text() == "new"


@pytest.mark.parametrize("litter", [".DS_Store", "._file.txt", "Thumbs.db", "desktop.ini"])
def test_what_a_file_manager_left_is_in_nobodys_way(tmp_path: Path, litter: str) -> None:
    for name in ("demo", ".demo.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / litter).write_text("icons")
    make(tmp_path / "demo", content="first")
    (tmp_path / "demo" / "sub" / litter).write_text("icons")
    second = make(tmp_path / "demo", content="second")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert not (tmp_path / "demo" / "sub" / litter).exists()
    assert list(second.manifest.outputs) == ["sub/file.txt"]


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("name", ["demo.partial", ".demo.old"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_happens_to_have_the_name_of_ours_is_not_lost(
    tmp_path: Path, resumable: bool, name: str, exists: bool
) -> None:
    if exists:
        make(tmp_path / "demo")
    (tmp_path / name / "year").mkdir(parents=True)
    (tmp_path / name / "year" / "photo.jpg").write_bytes(b"x")
    before = snapshot(tmp_path)
    with (
        pytest.raises(ArtefactError, match="sparsepipe did not make it"),
        artefact.draft(tmp_path / "demo", "demo", Config(), {}, resumable=resumable),
    ):
        pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", [folders.MARK, artefact.MANIFEST, "checkpoint.previous.safetensors", None])
def test_what_a_killed_run_left_is_cleared(tmp_path: Path, left: str | None) -> None:
    partial = tmp_path / "demo.partial"
    partial.mkdir()
    if left is not None:
        (partial / left).touch()
        (partial / "half.txt").write_text("half")
    assert [*make(tmp_path / "demo").manifest.outputs] == ["sub/file.txt"]
    assert {*snapshot(tmp_path)} == {"demo", "demo/manifest.json", "demo/sub", "demo/sub/file.txt"}


def test_a_kill_while_leftovers_are_deleted_leaves_them_known_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "demo.partial"
    (partial / "sub").mkdir(parents=True)
    (partial / "checkpoint.safetensors").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", _raise_where_it_exists(KeyboardInterrupt))
        make(tmp_path / "demo")
    assert (partial / "sub").exists()
    make(tmp_path / "demo")
    assert not partial.exists()


def test_a_run_that_fails_takes_the_folders_with_it_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(ZeroDivisionError),
        artefact.draft(tmp_path / "there" / "new" / "newer" / "demo", "demo", Config(), {}),
    ):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("here", [".", "sub"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str) -> None:
    made = make(tmp_path / "demo")
    monkeypatch.chdir(made.folder / here)
    before = snapshot(tmp_path)
    with pytest.raises(ArtefactError, match="current folder"):
        make(Path() if here == "." else Path(".."), content="new")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 2}'])
def test_an_unreadable_output_makes_way_in_a_run_folder_only(tmp_path: Path, content: str) -> None:
    for name, replaced in (("demo", True), ("demo-dense", True), ("other", False)):
        (tmp_path / folders.RECIPE_FILE).write_text("")
        made = make(tmp_path / name)
        (made.folder / artefact.MANIFEST).write_text(content)
        if replaced:
            assert make(tmp_path / name).digest == made.digest
            (made.folder / artefact.MANIFEST).write_text(content)
            (tmp_path / folders.RECIPE_FILE).unlink()
        before = snapshot(tmp_path)
        with pytest.raises(ArtefactError, match="nothing says what is in it"):
            make(tmp_path / name)
        assert snapshot(tmp_path) == before


def test_a_copy_is_the_same_artefact_and_takes_no_others_place(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source.folder / "notes.txt").write_text("mine")
    make(tmp_path / "demo", content="old")
    copied = artefact.copy(source, tmp_path / "demo")
    assert (copied.folder, copied.manifest) == (tmp_path / "demo", source.manifest)
    copied.verify()
    assert not (copied.folder / "notes.txt").exists()
    make(tmp_path / "another", stage="another")
    before = snapshot(tmp_path)
    with pytest.raises(ArtefactError, match="the stage 'another'"):
        artefact.copy(source, tmp_path / "another")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "..\\b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    made = make(tmp_path / "demo")
    path = made.folder / artefact.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["outputs"] = {name: "sha256:0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="leads out of its folder"):
        Artefact.read(made.folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "demo")
    (tmp_path / "secret").write_text("secret")
    target = made.folder / "sub" / "file.txt"
    target.unlink()
    target.symlink_to(tmp_path / "secret")
    with pytest.raises(ArtefactError, match="link"):
        Artefact.read(made.folder)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    made = make(tmp_path / "demo")
    made.file("sub/file.txt").write_text("tampered")
    with pytest.raises(ArtefactError, match=r"'sub/file\.txt' was changed"):
        made.verify()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "demo"}', '{"unknown": 1}'])
def test_a_malformed_manifest_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / artefact.MANIFEST).write_text(content)
    with pytest.raises(ArtefactError) as caught:
        Artefact.read(tmp_path)
    assert "manifest" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_wrong_stage_is_named(tmp_path: Path) -> None:
    make(tmp_path / "demo")
    with pytest.raises(ArtefactError, match="made by the stage 'demo', not by 'freeze'"):
        Artefact.read(tmp_path / "demo", "freeze")


def test_an_interrupted_run_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "train.partial").mkdir()
    with pytest.raises(ArtefactError, match="--resume"):
        Artefact.read(tmp_path / "train")


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), artefact.atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_find_takes_the_folder_itself_or_the_one_named_after_the_stage(tmp_path: Path) -> None:
    made = make(tmp_path / "demo")
    for source in (tmp_path, tmp_path / "demo"):
        found = artefact.find(source, "demo")
        assert found is not None
        assert found.digest == made.digest
    assert artefact.find(tmp_path, "freeze") is None


def test_the_output_of_another_stage_is_not_replaced(tmp_path: Path) -> None:
    old = make(tmp_path / "demo")
    with pytest.raises(ArtefactError, match="holds the output of the stage 'demo'"):
        make(tmp_path / "demo", stage="another")
    assert Artefact.read(tmp_path / "demo").digest == old.digest


def test_find_refuses_what_was_changed(tmp_path: Path) -> None:
    make(tmp_path / "demo").file("sub/file.txt").write_text("tampered")
    with pytest.raises(ArtefactError, match="was changed"):
        artefact.find(tmp_path, "demo")


def test_find_refuses_what_was_made_from_something_older(tmp_path: Path) -> None:
    source = make(tmp_path / "demo")
    with artefact.draft(tmp_path / "next", "next", Config(), {"demo": source.digest}):
        pass
    assert artefact.find(tmp_path, "next") is not None
    make(tmp_path / "demo", content="made anew")
    with pytest.raises(ArtefactError, match="made from another 'demo'"):
        artefact.find(tmp_path, "next")


def test_a_missing_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not hold the metric 'files'"):
        make(tmp_path / "demo").metric("files")
