"""No test reads or leaves anything in the user's own cache; long tests come first."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

_NUMBERS = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process begins with its share of the long tests, so that none of them is what the others wait for at the end."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = iter([item for item in items if not item.get_closest_marker("slow")])
    shares = [slow[number::count] for number in range(count)]
    size = -(-len(items) // count)  # pytest-xdist gives each process that many, and lets it steal from the others later
    items[:] = [item for share in shares for item in [*share, *itertools.islice(fast, max(0, size - len(share)))]] + list(fast)


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_cache(_caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Features that one test computes are not there for the next."""
    monkeypatch.setenv("KINOFORM_CACHE", str(_caches / str(next(_NUMBERS))))
    yield


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the videos of folders that were read for their frames."""
    from evaluation.videos import FolderVideos  # here, as most tests need none of what it imports

    found: list[int] = []
    plain = FolderVideos.read

    def counted(self: FolderVideos, number: int, picks: Sequence[int]) -> np.ndarray:
        if len(picks) > 1:  # one frame is read for the size
            found.append(number)
        return plain(self, number, picks)

    monkeypatch.setattr(FolderVideos, "read", counted)
    return found
