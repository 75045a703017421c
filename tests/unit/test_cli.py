"""The command line: help, JSON on stdout, one paragraph and exit code 2 for every bad input."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.cli import main as cli

Invoke = Callable[..., tuple[int, str, str]]

NO_ONNX = "not an ONNX file, or it was cut off. Compare its size with the original, or export it again."


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsepipe", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def linear_onnx(path: Path, zeros: float = 0.9) -> Path:
    """y = x W + b with a 64x32 weight of which the fraction `zeros` is zero."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 32)).astype(np.float32)
    weight[generator.random(weight.shape) < zeros] = 0
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(32, np.float32), "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS)])
def test_every_verb_has_help(invoke: Invoke, verb: list[str]) -> None:
    code, out, _ = invoke(*verb, "--help")
    assert code == 0
    assert "Usage: sparsepipe" in out


def test_the_list_of_verbs_is_shown_without_importing_any(invoke: Invoke) -> None:
    code = "import sys; sys.argv = ['sparsepipe', '--help']\nfrom sparsepipe.cli import main\ntry: main.main()\n"
    code += "except SystemExit: pass\nprint([m for m in sys.modules if m.startswith('sparsepipe.cli.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['sparsepipe.cli.main']"


def test_a_process_told_to_end_cleans_up_first() -> None:
    code = """
import click, os, signal
from sparsepipe.cli import main

@click.command()
def ended():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("cleaned up")

main.sparsepipe = ended
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "cleaned up\n"
    assert done.stderr.split() == ["Error:", "Interrupted."]
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("verb", ["models", "methods", "datasets", "doctor"])
def test_listings_print_json_on_stdout_only(invoke: Invoke, verb: str) -> None:
    code, out, _ = invoke(verb, "--json")
    assert code == 0
    assert json.loads(out)
    code, out, _ = invoke(verb)
    assert code == 0
    assert out


def test_datasets_are_listed_with_their_options(invoke: Invoke) -> None:
    _, out, _ = invoke("datasets", "--json")
    options = {entry["name"]: entry["options"] for entry in json.loads(out)}
    assert options["imagefolder"] == ["test_fraction", "size", "channels"]
    assert options["plugin"] == []
    _, out, _ = invoke("datasets")
    assert re.search(r"imagefolder:DIR .* test_fraction, size, channels ", out)


def test_models_takes_a_wildcard(invoke: Invoke) -> None:
    _, out, _ = invoke("models", "resnet*", "--json")
    names = [entry["name"] for entry in json.loads(out)]
    assert {"resnet20", "resnet32", "resnet56"} <= set(names)
    assert all(name.startswith("resnet") for name in names)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "none.toml"], ["none.toml", "no such recipe"]),
        (["train", "{bad_toml}"], ["not valid TOML"]),
        (["train", "{recipe}", "--set", "train.epoch=1"], ["train.epoch", "did you mean 'epochs'"]),
        (["train", "{recipe}", "--set", "model=resnet21"], ["resnet21", "resnet20"]),
        (["train", "{recipe}", "--set", "data=mnist"], ["mnist", "mnist5k"]),
        (["train", "{recipe}", "--set", "data=cifar10:/no/such/dir"], ["/no/such/dir"]),
        (["train", "{recipe}", "--set", "method=dstee"], ["dstee", "dst-ee"]),
        (["compare", "{recipe}", "--methods", "dst-ee,rigle"], ["'rigle'", "did you mean 'rigl'", "Methods: dst-ee"]),
        (["emc", "{recipe}", "--methods", "foo"], ["'foo'", "Methods: dst-ee"]),
        (["train", "{recipe}", "--set", "method.sparsty=0.5"], ["sparsty", "sparsity"]),
        (["train", "{recipe}", "--set", "method.sparsity=1.5"], ["method: 'sparsity'", "1.5"]),
        (["train", "{recipe}", "--set", "method.sparsity=abc"], ["method: 'sparsity' must be a number", "'abc'"]),
        (["bench", "{onnx}", "--threads", "0"], ["bench: 'threads.0' = 0: input should be greater than 0."]),
        (["train", "{recipe}", "--set", "method.pattern=3y1"], ["3y1"]),
        (["train", "{recipe}", "--set", "model.widht=3"], ["widht"]),
        (["train", "{recipe}", "--resume", "--restart"], ["--resume", "--restart"]),
        (["train", "{recipe}", "--set", "model=no_such_module:build"], ["no_such_module"]),
        (["freeze", "{folder}"], ["'train'"]),
        (["convert", "{folder}"], ["'freeze'"]),
        (["export", "{folder}", "--format", "onnx"], ["'convert'"]),
        (["export", "{text}", "--out", "{folder}/o"], [NO_ONNX]),
        (["export", "{empty}", "--out", "{folder}/o"], [NO_ONNX]),
        (["export", "{onnx}"], ["--out"]),
        (["export", "{onnx}", "--opset", "3", "--out", "{folder}/o"], ["opset", "3"]),
        (["validate", "{text}", "--against", "{onnx}"], [NO_ONNX]),
        (["validate", "{onnx}", "--against", "{cut}"], [NO_ONNX]),
        (["bench", "{text}"], [NO_ONNX]),
        (["bench", "{cut}"], [NO_ONNX]),
        (["bench", "{empty}"], [NO_ONNX]),
        (["profile", "{text}"], [NO_ONNX]),
        (["inspect", "{cut}"], [NO_ONNX]),
        (["inspect", "/dev/null"], ["neither a file nor a folder"]),
        (["train", "{recipe}", "--set", "data=npz:{text}"], ["Python objects, or it is of another kind", "savez"]),
        (["bench", "{onnx}", "--threads", "1000"], ["1000 threads cannot be measured", "core"]),
        (["profile", "{onnx}", "--threads", "1000"], ["1000 threads cannot be measured", "core"]),
        (["run", "{recipe}", "--set", "bench.threads=[1, 1000]"], ["1000 threads cannot be measured", "core"]),
        (["export", "{onnx}", "--max-drop", "0", "--out", "{folder}/o"], ["--max-drop belongs to --precision int8"]),
        (["export", "{onnx}", "--calibrate", "none", "--out", "{folder}/o"], ["--calibrate belongs to"]),
        (["export", "{onnx}", "--calibration", "minmax", "--out", "{folder}/o"], ["--calibration belongs to"]),
        (
            ["export", "{onnx}", "--measure-seconds", "9", "--out", "{folder}/o"],
            ["--measure-seconds belongs to --measure"],
        ),
        (["export", "{onnx}", "--model", "a:b", "--out", "{folder}/o"], ["--model belongs to a run folder"]),
        (["export", "{onnx}", "--target", "dense", "--isa", "any", "--out", "{folder}/o"], ["--isa belongs to"]),
        (
            [
                *("export", "{onnx}", "--target", "dense", "--target", "portable", "--target", "universal"),
                *("--precision", "int8", "--calibrate", "digits", "--out", "{folder}/o"),
            ],
            ["--target portable has no int8 form"],
        ),
        (["freeze", "{folder}", "--model", "resnet20"], ["--model belongs to a checkpoint from elsewhere"]),
        (["freeze", "{folder}", "--set", "garbage"], ["--set belongs to a checkpoint from elsewhere"]),
        (["train", "{recipe}", "--target-sparsity", "0.5", "--tolerance", "-1"], ["--tolerance", "-1"]),
        (["train", "{recipe}", "--trials", "3"], ["--trials belongs to --target-sparsity"]),
        (["report", "{folder}"], ["No stage"]),
        (["inspect", "{text}"], ["text.txt"]),
        (["frobnicate"], ["frobnicate"]),
        (["run"], ["RECIPE"]),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    invoke: Invoke, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "bad.toml").write_text("model = [")
    (tmp_path / "r.toml").write_text('model = "mlp"\ndata = "digits"\n[train]\nepochs = 1\n')
    (tmp_path / "text.txt").write_text("not a model")
    (tmp_path / "folder").mkdir()
    whole = linear_onnx(tmp_path / "m.onnx")
    (tmp_path / "cut.onnx").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "empty.onnx").touch()
    places = {
        "cut": tmp_path / "cut.onnx",
        "empty": tmp_path / "empty.onnx",
        "bad_toml": tmp_path / "bad.toml",
        "recipe": tmp_path / "r.toml",
        "text": tmp_path / "text.txt",
        "folder": tmp_path / "folder",
        "onnx": whole,
    }
    given = [argument.format(**places) for argument in arguments]
    if given[0] in ("train", "compare", "emc"):
        given += ["--out", str(tmp_path / "out")]
    before = {*tmp_path.rglob("*")}
    code, out, err = invoke(*given)
    assert code == 2, err
    assert not out
    assert "Traceback" not in err
    assert "allow_pickle" not in err
    assert all(part in err for part in parts), err
    assert {*tmp_path.rglob("*")} == before, "something was left half-written"


def test_a_foreign_onnx_file_goes_through_every_verb_that_takes_one(invoke: Invoke, tmp_path: Path) -> None:
    model = linear_onnx(tmp_path / "foreign.onnx")
    out = tmp_path / "out"

    code, text, err = invoke("export", model, "--format", "onnx", "--out", out / "export", "--json")
    assert code == 0, err
    exported = json.loads(text)
    assert [layer["sparse"] for layer in exported["metrics"]["layers"]] == [True]
    portable = out / "export" / "model.portable.onnx"
    assert portable.stat().st_size < model.stat().st_size

    code, text, err = invoke("validate", portable, "--against", model, "--json")
    assert code == 0, err
    assert json.loads(text)["passed"] is True

    code, text, err = invoke("inspect", portable, "--json")
    assert code == 0, err
    weight = np.count_nonzero(numpy_helper.to_array(onnx.load(model).graph.initializer[0]))
    assert [layer["nnz"] for layer in json.loads(text)["layers"] if layer["size"] == 64 * 32] == [weight]

    code, text, err = invoke("convert", model, "--out", out / "convert", "--json")
    assert code == 0, err
    metrics = json.loads(text)["metrics"]
    assert metrics["bytes_after"] < metrics["bytes_before"]

    code, text, err = invoke("bench", model, portable, "--seconds", "0.2", "--json")
    assert code == 0, err
    assert len(json.loads(text)["results"]) == 2


def test_the_opset_of_a_foreign_file_stays_unless_another_is_asked_for(invoke: Invoke, tmp_path: Path) -> None:
    source = linear_onnx(tmp_path / "theirs.onnx")
    for flags, expected in (((), 17), (("--opset", 15), 15), (("--set", "export.opset=16"), 16)):
        code, out, _ = invoke("export", source, "--out", tmp_path / str(expected), "--json", *flags)
        assert (code, json.loads(out)["metrics"]["opset"]) == (0, expected)


@pytest.mark.usefixtures("decided_by_size")
def test_a_universal_file_is_a_source_as_any_other(invoke: Invoke, tmp_path: Path) -> None:
    """It goes through the verbs, and what comes out agrees with what it was made from."""
    source = linear_onnx(tmp_path / "theirs.onnx")
    assert invoke("export", source, "--target", "universal", "--out", tmp_path / "once")[0] == 0
    universal = tmp_path / "once" / "model.universal.onnx"
    assert invoke("export", universal, "--out", tmp_path / "twice")[0] == 0
    files = [tmp_path / "twice" / f"model.{target}.onnx" for target in ("dense", "portable", "universal")]
    code, out, _ = invoke("validate", *files, universal, "--against", source, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    code, out, _ = invoke("inspect", universal)
    assert code == 0
    assert re.search(r"w\.weight +SparseLinear +auto +64x32 .* csr ", out)
    code, out, _ = invoke("bench", universal, files[0], "--seconds", "0.05", "--json")
    assert (code, [row["note"] for row in json.loads(out)["results"] if not row["samples"]]) == (0, [])
    code, out, _ = invoke("convert", universal, "--out", tmp_path / "converted", "--json")
    assert (code, json.loads(out)["metrics"]["bytes_before"]) == (0, 64 * 32 * 4)


def test_sizes_that_a_file_leaves_open_are_given_by_one_option(invoke: Invoke, tmp_path: Path) -> None:
    """The network flattens images of any size, but its weight fits sides of 8 only; the default would be 224."""
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w_"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(np.eye(192, 5, dtype=np.float32), "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert invoke("validate", path, "--against", path)[0] == 2
    assert invoke("bench", path, "--seconds", "0.05")[0] == 2
    for shape in ("2x3x8x8", "image=2x3x8x8"):
        code, out, _ = invoke("validate", path, "--against", path, "--input", shape, "--json")
        assert (code, json.loads(out)["passed"]) == (0, True)
    code, out, _ = invoke("bench", path, "--seconds", "0.05", "--input", "2x3x8x8")
    assert code == 0
    assert "Inputs: image 2x3x8x8." in out
    code, out, _ = invoke("bench", path, "--seconds", "0.05", "--set", "bench.input=[2, 3, 8, 8]", "--json")
    assert [(row["batch"], row["inputs"]) for row in json.loads(out)["results"]] == [
        (2, {"image": ["float32", [2, 3, 8, 8]]})
    ]


def test_validate_exits_with_1_when_outputs_differ(invoke: Invoke, tmp_path: Path) -> None:
    first, second = linear_onnx(tmp_path / "a.onnx", 0.9), linear_onnx(tmp_path / "b.onnx", 0.5)
    code, text, _ = invoke("validate", second, "--against", first, "--json")
    assert code == 1
    assert json.loads(text)["passed"] is False


def test_a_dataset_on_the_command_line_has_options_as_in_a_recipe(invoke: Invoke, tmp_path: Path) -> None:
    model = linear_onnx(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(64, 64)), y=np.arange(64) % 32)
    data, half = f"npz:{tmp_path / 'd.npz'}", ("--set", "data.test_fraction=0.5")
    _, text, err = invoke("validate", model, "--against", model, "--data", data, *half, "--json")
    assert json.loads(text)["candidates"][0]["samples"] == 32, err
    static = ("--target", "dense", "--precision", "int8", "--calibrate", data)
    assert invoke("export", model, *static, *half, "--out", tmp_path / "out", "--json")[0] == 0
    calibrated = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]["calibrate"]
    assert calibrated == {"name": data, "test_fraction": 0.5}
    code, _, err = invoke("validate", model, "--against", model, "--data", data, "--set", "data.test_fracton=0.5")
    assert code == 2
    assert "did you mean 'test_fraction'" in err


def test_a_verb_never_replaces_another_stage_or_guesses_where_to_write(invoke: Invoke, tmp_path: Path) -> None:
    model = linear_onnx(tmp_path / "m.onnx")
    assert invoke("convert", model, "--out", tmp_path / "mine")[0] == 0
    before = (tmp_path / "mine" / "manifest.json").read_bytes()
    for verb in ("export", "bench"):
        code, _, err = invoke(verb, model, "--out", tmp_path / "mine")
        assert code == 2
        assert "stage 'convert'" in err
    assert (tmp_path / "mine" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("verb", ["freeze", "convert", "export"])
@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_without_a_name_of_its_own_is_an_input_like_any_other(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, folder: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    code, _, err = invoke(verb, folder)
    assert code == 2
    assert "There is no finished output of" in err


def test_the_current_folder_is_never_replaced(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_onnx(tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    code, _, err = invoke("export", "../m.onnx", "--out", ".")
    assert code == 2
    assert "is the current folder" in err
    assert {path.name for path in tmp_path.rglob("*")} == {"m.onnx", "out"}
    assert invoke("export", "../m.onnx", "--out", "new")[0] == 0


def test_tables_align_numbers_to_the_right_and_sentences_that_begin_with_one_to_the_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sparsepipe.cli import common

    common.print_table(
        ["layer", "bytes", "p50", "why"],
        [
            ["a", "9 B", "0.3 (0.2–0.4)", "90.0% zeros; smaller"],
            ["b", "12.1 kB", None, "0.0% zeros, in blocks of 4 x 1"],
        ],
    )
    first, second = (line for line in capsys.readouterr().out.splitlines() if "zeros" in line)
    assert first.index("9 B") + len("9 B") == second.index("12.1 kB") + len("12.1 kB")
    assert first.index(")") == second.index("–")
    assert first.index("90.0%") == second.index("0.0%")


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", "Error: Interrupted. `sparsepipe train --resume` goes on with the training.\n"),
        ("run", "Error: Interrupted. The same command goes on with what is not finished.\n"),
        ("bench", "Error: Interrupted.\n"),
    ],
)
def test_an_interruption_is_told_how_to_go_on_only_where_that_is_possible(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, verb: str, said: str
) -> None:
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.sparsepipe, "main", interrupted)
    assert invoke(verb) == (130, "", said)


def test_names_in_a_table_are_text_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsepipe.cli import common

    names = ["a[/b].onnx", "[ab]: c", "[red]", "d:x:", "e\\"]
    for title in names:
        common.print_table(names, [names], title=title)
        title_line, header, _, row = (line for line in capsys.readouterr().out.splitlines() if line.strip())
        assert title_line.strip() == title
        assert all(name in header and name in row for name in names)


def test_a_progress_bar_shows_its_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from sparsepipe import progress

    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=120, height=20)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.bar("Measure a[/b].onnx", 2) as running:
        running.advance(note="c[/d]")
    assert "Measure a[/b].onnx" in written.getvalue()
    assert "c[/d]" in written.getvalue()


def test_log_lines_in_a_file_are_whole_and_have_their_time(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "x" * 60
    (tmp_path / "r.toml").write_text('model = "mlp"\ndata = "digits"\n')
    code, _, err = invoke("run", tmp_path / "r.toml", "--out", tmp_path / long, "--set", f"data=npz:{long}.npz")
    assert code == 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d train", err.splitlines()[0])


def test_a_verb_writes_beside_its_input_whatever_way_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsepipe.artefact import Artefact, draft
    from sparsepipe.cli import common
    from sparsepipe.recipe import Bench

    with draft(tmp_path / "run" / "freeze", "freeze", Bench(), {}):
        pass
    monkeypatch.chdir(tmp_path)
    assert common.output_folder(None, Artefact.read(Path("run/freeze")), "convert") == Path("run/convert")
    monkeypatch.chdir(tmp_path / "run" / "freeze")
    for here in (Path(), Path("../freeze")):
        assert common.output_folder(None, Artefact.read(here), "convert").resolve() == tmp_path / "run" / "convert"
    (tmp_path / "run" / "freeze" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "run" / "freeze" / "inner")
    assert common.output_folder(None, Artefact.read(Path("..")), "convert").resolve() == tmp_path / "run" / "convert"


@pytest.mark.parametrize("name", ["benchmarks/peers.json", "results/kernels.json"])
def test_the_tables_of_a_suite_are_printed_and_nothing_else_happens(invoke: Invoke, tmp_path: Path, name: str) -> None:
    source = tmp_path / "suite.json"
    source.write_bytes((Path(__file__).parents[2] / "examples" / name).read_bytes())
    code, out, err = invoke("report", source, "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(source.read_text())
    code, out, _ = invoke("report", source)
    assert code == 0
    assert "| ResNet-50 224 |" in out
    for option in ("--out", "--title"):
        code, out, err = invoke("report", source, option, tmp_path / "page")
        assert (code, out) == (2, "")
        assert f"{option} belongs to" in err
    assert list(tmp_path.iterdir()) == [source]


def test_flags_win_over_set_and_set_over_the_recipe(tmp_path: Path) -> None:
    from sparsepipe.artefact import draft
    from sparsepipe.cli import common
    from sparsepipe.recipe import Bench

    with draft(tmp_path / "run" / "export", "export", Bench(), {}) as building:
        (building.folder / "model.onnx").write_bytes(b"")
    (tmp_path / "run" / "recipe.toml").write_text(
        'model = "mlp"\ndata = "digits"\n[bench]\nseconds = 2.0\nthreads = [2]\nbatch = [4]\n'
    )
    found = common.section(
        tmp_path / "run" / "export" / "model.onnx", "bench", ["bench.threads=[3]", "bench.batch=[5]"], {"batch": (6,)}
    )
    assert (found.seconds, found.threads, found.batch) == (2.0, (3,), (6,))
    assert common.section(None, "bench", [], {}) == Bench()
