"""No test reads or leaves anything in the user's own cache."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_cache(_caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Features that one test computes are not there for the next."""
    monkeypatch.setenv("KINOFORM_CACHE", str(_caches / str(next(_NUMBERS))))
    yield
