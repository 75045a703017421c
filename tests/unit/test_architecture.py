"""Who may import whom (the rules that keep the base install small and the rooms usable on their own)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sparsepipe"
ROOMS = (
    "sparsity",
    "integrations",
    "training",
    "data",
    "formats",
    "graph",
    "quantization",
    "runtime",
    "native",
    "benchmark",
    "reporting",
)
TORCH = {"torch", "lightning_fabric", "lightning"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function, as an absolute name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("sparsepipe.") and "." in name}


@pytest.mark.parametrize("room", ["formats", "graph", "quantization", "runtime", "benchmark", "data"])
def test_rooms_of_the_base_install_do_not_import_torch(room: str) -> None:
    for path in files(room):
        if path.name != "build.py":
            found = {name.split(".")[0] for name in imports(path)} & TORCH
            assert not found, f"{path} imports {found}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_nothing_of_stages_recipes_or_the_command_line(room: str) -> None:
    for path in files(room):
        assert not imported_rooms(path) & {"stages", "pipeline", "cli"}, path


def test_sparsity_imports_no_other_room() -> None:
    for path in files("sparsity"):
        assert imported_rooms(path) <= {"sparsity", "errors"}, path


def test_no_method_or_modifier_knows_another_one() -> None:
    homes = ("sparsepipe.sparsity.methods.", "sparsepipe.sparsity.modifiers.")
    for path in [*files("sparsity/methods"), *files("sparsity/modifiers")]:
        if path.stem not in ("combined", "registry"):
            known = {name for name in imports(path) if name.startswith(homes)}
            assert all(name.startswith(f"{homes[1]}combined") for name in known), path


def test_every_method_names_its_source_in_its_file() -> None:
    from sparsepipe.sparsity.modifiers.registry import MODIFIERS
    from sparsepipe.sparsity.registry import METHODS

    for info in [*METHODS.values(), *MODIFIERS.values()]:
        text = (ROOT / info.home.partition(":")[0].replace(".", "/")).with_suffix(".py").read_text()
        for source in re.findall(r"\d{4}\.\d{4,5}|10\.\d{4}/[\w.-]+", info.source):
            assert source in text, (info.name, source)


def test_integrations_import_only_sparsity() -> None:
    for path in files("integrations"):
        assert imported_rooms(path) <= {"sparsity", "errors"}, path


def test_stages_do_not_import_the_command_line_or_the_pipeline() -> None:
    for path in files("stages"):
        assert not imported_rooms(path) & {"cli", "pipeline"}, path


def test_cli_and_models_are_imported_by_their_installed_names_only() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "cli").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        assert not {name.split(".")[0] for name in imports(path)} & {"cli", "models"}, path


def test_light_modules_load_nothing_heavy() -> None:
    light = (
        "sparsepipe, sparsepipe.recipe, sparsepipe.artefact, sparsepipe.spec, sparsepipe.cli.main, "
        "sparsepipe.models.registry, sparsepipe.sparsity.registry, sparsepipe.data, sparsepipe.runtime"
    )
    heavy = ["torch", "scipy", "onnx", "onnxruntime", "matplotlib", "sklearn", "pandas", "pyarrow", "PIL"]
    code = f"import sys, {light}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    pytest.importorskip("torch")
    import sparsepipe

    for name in sparsepipe.__all__:
        assert getattr(sparsepipe, name) is not None
