"""Starts a benchmark worker with the Python of another environment: `PYTHON -I bootstrap.py`.

Only this package is added to what that Python can import. The folder that it is installed in stays off the path: it
holds other packages, in versions that the other environment cannot use.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    spec = spec_from_file_location(PACKAGE.name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)])
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules[PACKAGE.name] = package
    spec.loader.exec_module(package)
    from sparsepipe.benchmark.worker import serve

    serve()
