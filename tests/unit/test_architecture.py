"""Who may import whom (the rules that keep the base install small and the rooms usable on their own)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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


TORCH_BEHIND = (PACKAGE / "graph" / "build.py", PACKAGE / "launch.py")
"""Files that import torch for some callers only: exporting a network, and under torchrun."""
STAGES = ("train", "freeze", "convert", "export", "validate", "bench", "report")


def nodes(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Every node of a file; with `types` also what only type checkers see."""
    yield tree
    hidden = isinstance(tree, ast.If) and not types and ast.unparse(tree.test) == "TYPE_CHECKING"
    for child in tree.orelse if hidden else ast.iter_child_nodes(tree):  # type: ignore[attr-defined]
        yield from nodes(child, types=types)


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function, as an absolute name."""
    for node in nodes(ast.parse(path.read_text()), types=types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module: str) -> Path | None:
    """The file of a module of the package; None for all others, and for the names of functions and classes."""
    place = ROOT.joinpath(*module.split("."))
    for name in ("cli", "models"):
        if place.is_relative_to(PACKAGE / name):
            place = ROOT / place.relative_to(PACKAGE)
    found = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in found if place.is_relative_to(ROOT) and file.is_file()), None)


def reached(start: list[Path], *, through: Callable[[Path], bool]) -> dict[Path, Path]:
    """Every file of the package that running these may import, however indirectly -> what imports it."""
    found, pending = {path: path for path in start}, list(start)
    while pending:
        path = pending.pop()
        for module in imports(path, types=False):
            file = file_of(module)
            if file is not None and file not in found and through(file):
                found[file] = path
                pending.append(file)
    return found


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("sparsepipe.") and "." in name}


@pytest.mark.parametrize("room", ["formats", "graph", "quantization", "runtime", "benchmark", "data"])
def test_rooms_of_the_base_install_do_not_import_torch(room: str) -> None:
    start = [path for path in files(room) if path not in TORCH_BEHIND]
    came_from = reached(start, through=lambda path: path not in TORCH_BEHIND)
    assert set(start) < set(came_from)
    for path in came_from:
        found = {name.split(".")[0] for name in imports(path)} & TORCH
        assert not found, f"{path} imports {found}, and {came_from[path]} imports that"


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_needs_a_later_one(stage: str) -> None:
    later = {PACKAGE / "stages" / f"{name}.py" for name in STAGES[STAGES.index(stage) + 1 :]}
    came_from = reached([PACKAGE / "stages" / f"{stage}.py"], through=lambda path: path.parent.name == "stages")
    assert not later & set(came_from), {path: came_from[path] for path in later & set(came_from)}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_nothing_of_stages_recipes_or_the_command_line(room: str) -> None:
    for path in files(room):
        assert not imported_rooms(path) & {"stages", "pipeline", "recipe", "cli"}, path


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
