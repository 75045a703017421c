"""The recipe: what is read, what overrides do, and what errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsepipe import pipeline, recipe
from sparsepipe.errors import RecipeError

MINIMAL = {"model": "resnet20", "data": "mnist5k"}


def parse(*overrides: str, **table: object) -> recipe.Recipe:
    return recipe.parse({**MINIMAL, **table}, overrides)


def test_short_form_and_table_mean_the_same() -> None:
    assert parse(model="resnet20") == parse(model={"name": "resnet20"})


def test_an_override_replaces_a_table_inside_of_a_section() -> None:
    for text, value in (("er", "er"), ('{"0" = 2, "*" = 1}', {"0": 2, "*": 1})):
        changed = parse(f"method.distribution={text}", method={"name": "rigl", "distribution": {"*": 3.0}})
        assert changed.method.options["distribution"] == value


def test_an_override_of_a_named_section_changes_the_name_and_keeps_the_options() -> None:
    changed = parse("method=rigl", method={"name": "dst-ee", "sparsity": 0.9})
    assert changed.method.name == "rigl"
    assert changed.method.options == {"sparsity": 0.9}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=3", 3),
        ("optimizer.lr=1e-2", 0.01),
        ("optimizer.nesterov=false", False),
        ("data=cifar10:/some/dir", "cifar10:/some/dir"),
        ('data="quoted"', "quoted"),
        ("bench.threads=[1, 2]", (1, 2)),
    ],
)
def test_override_values_are_toml_where_possible_and_text_otherwise(override: str, value: object) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    found = getattr(parse(override), section)
    assert getattr(found, key or "name") == value


def test_an_option_of_a_short_form_section_can_be_set() -> None:
    assert parse("model.width=8").model.options == {"width": 8}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("bench.threads=1,2", ["bench.threads", "it should be a list, as [1, 2]"]),
        ("name=2024", ["'name' = 2024", "text, in quotes"]),
        ("train.epoch=3", ["train.epoch", "did you mean 'epochs'", "batch_size"]),
        ("trian.epochs=3", ["trian", "did you mean 'train'"]),
        ("train.epochs=0", ["train.epochs", "0", "greater than 0"]),
        ("optimizer=lamb", ["optimizer.name", "'sgd'", "'adamw'"]),
        ("train.validation=1.5", ["train.validation", "1.5", "less than 1"]),
        ("export.targets=['tflite']", ["export.targets", "'dense'", "'portable'"]),
        ("export={targets=['portable'], precision='int8'}", ["export.precision", "portable", "dense, universal"]),
        ("export={targets=['dense', 'portable'], precision='int8'}", ["export.precision", "portable"]),
        ("seed.x=1", ["seed"]),
        ("name=../outside", ["name", "folder"]),
        ('name="x\\u0000y"', ["'name'", "control characters"]),
        ('name="two\\nlines"', ["'name'", "control characters"]),
        ("method=[1, 2]", ["'method' = [1, 2]: it should be a name, or a section of a name and its options"]),
        ("train=3", ["'train' = 3: it should be a section", "epochs"]),
        ("bench.threads=[]", ["'bench.threads' = []: it should have at least one entry"]),
        (f"name={'ä' * 128}", ["'name'", "256", "bytes"]),
        ("nonsense", ["nonsense", "key=value"]),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(override: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(override, seed=0)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.threads=[0]", "recipe: 'bench.threads.0' = 0: input should be greater than 0."),
        (
            "export.targets=['dens']",
            "recipe: 'export.targets.0' = 'dens': input should be 'dense', 'portable' or 'universal'.",
        ),
    ],
)
def test_a_bad_entry_of_a_list_is_told_once(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(override)
    assert str(caught.value) == message


def test_a_missing_section_is_named() -> None:
    with pytest.raises(RecipeError, match="the key 'data' is missing"):
        recipe.parse({"model": "mlp"})


@pytest.mark.parametrize("content", [b"model = ", b"\xff\xfe\x00", b"[model\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.toml: The recipe is not valid TOML"):
        recipe.load(path)


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes('model = "resnet20"\r\ndata = "mnist5k"\r\n'.encode("utf-8-sig"))
    assert recipe.load(path) == parse()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml"):
        recipe.load(tmp_path / "none.toml")


def test_a_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    original = parse("method.c=1e-3", "augment.crop=2", method={"name": "dst-ee", "overrides": [{"layers": "fc"}]})
    recipe.write(original, tmp_path / "recipe.toml")
    assert recipe.load(tmp_path / "recipe.toml") == original
    assert recipe.digest(recipe.load(tmp_path / "recipe.toml")) == recipe.digest(original)


def test_the_digest_changes_with_every_setting() -> None:
    variants = [parse(), parse("seed=1"), parse("train.epochs=3"), parse("method.c=1.0"), parse("data=digits")]
    assert len({recipe.digest(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    "export",
    [
        {"precision": "int8"},
        {"precision": "int8", "targets": ("dense", "portable", "universal")},  # as a run's recipe names the default
        {"precision": ("int8", "fp32"), "targets": ("dense", "portable")},
        {"precision": "fp32", "targets": ("portable",)},
    ],
)
def test_int8_beside_targets_that_have_it_is_allowed(export: dict[str, Any]) -> None:
    assert parse(export=export).export.targets == export.get("targets", ("dense", "portable", "universal"))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["export.precision=int8"], "int8 needs samples"),
        (["export.precision=['fp32','int8']"], "int8 needs samples"),
        (["export.precision=int8", "export.max_drop=1", "train.precision=int8-qat"], "max_drop"),
        (["export.precision=int8", "train.precision=int8-qat"], None),
        (["export.precision=int8", "export.calibrate=digits"], None),
        (["export.max_drop=1"], None),
    ],
)
def test_a_chain_to_int8_needs_samples_from_the_recipe(
    overrides: list[str], word: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = parse(*overrides)
    monkeypatch.setattr(pipeline, "stages", lambda recipe, *, force: [])
    if word is None:
        assert pipeline.run(loaded, tmp_path) == {}
        return
    with pytest.raises(RecipeError, match=rf"^export\.calibrate: .*{word}") as caught:
        pipeline.run(loaded, tmp_path)
    assert "--" not in str(caught.value), "a recipe has no options of the command line"


def test_every_example_recipe_is_valid() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))
    assert examples
    for path in examples:
        recipe.load(path)
