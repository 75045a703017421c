"""Settings shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("sparsepipe", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("sparsepipe")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """A command that runs in this process sets it for its options, and for its number among several processes.

    Unset before the test, too: fixtures of wider scope, which run commands, come first.
    """
    logger = logging.getLogger("sparsepipe")
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data with real data is not here")
    return folder


@pytest.fixture(scope="module")
def decided_by_size() -> Iterator[None]:
    """The layers of most tests are too small for a sparse kernel to pay: what is stored decides instead of the time."""
    from sparsepipe.graph import choice, cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "relative_time", lambda work, stored, block, *rest: stored * (1 + 1 / block))
        patch.setattr(cost, "pays_below", lambda: 0.7)
        patch.setattr(choice, "worth_it", lambda gains, *rest: set(gains))
        yield
