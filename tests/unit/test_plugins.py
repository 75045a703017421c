"""The user's own code may fail in any way: that is one clear error of the given class."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsepipe.errors import DataError, ModelError
from sparsepipe.plugins import load_plugin


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("x = unknown\n", "NameError: name 'unknown' is not defined .*line 1"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0 .*line 2"),
        ("import a_missing_module\n", "No module named 'a_missing_module'"),
        ("raise KeyError\n", "KeyError"),
    ],
)
@pytest.mark.parametrize("error", [ModelError, DataError])
def test_a_module_that_fails_while_it_is_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    message: str,
    error: type[ModelError | DataError],
) -> None:
    (tmp_path / "failing_module.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing_module", raising=False)
    with pytest.raises(error, match=message):
        load_plugin("failing_module:function", error)
