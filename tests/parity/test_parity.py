"""The parity runner: our code against recorded numbers, one test a safetensors file of PARITY_DIR (default: data/ beside this file).

A file says in its metadata which (system, module) it records and with which config; adapters_<system>.py knows how to check it.
An unknown (system, module), a tensor nobody looked at and a config field nobody read are failures.
"""

import importlib
import os
from pathlib import Path

import pytest

from tests.parity.case import ADAPTERS, Adapter, Case

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("PARITY_DIR") or HERE / "data")
FILES = sorted(FOLDER.glob("*.safetensors"))
CASES = [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * path.stem.endswith("_full")) for path in FILES]
"""Networks of the release's size take their time."""


def find_adapter(system: str, module: str) -> Adapter | None:
    """The check of (system, module), or None."""
    if (HERE / f"adapters_{system}.py").is_file():
        importlib.import_module(f"tests.parity.adapters_{system}")
    return ADAPTERS.get((system, module))


def test_folder_has_cases():
    assert FILES, f"no *.safetensors in PARITY_DIR {FOLDER}"


@pytest.mark.parametrize("path", CASES)
def test_parity(path: Path):
    case = Case(path)
    check = find_adapter(case.system, case.module)
    assert check is not None, f"{path.name}: no adapter for system {case.system!r}, module {case.module!r}"
    check(case)
    for name, error in case.agreement.items():
        print(f"{error:9.2e}  {name}")  # shown by pytest -rP
    case.finish()
