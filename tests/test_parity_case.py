"""The parity runner itself: it must fail on whatever an adapter overlooks."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import command
from tests.parity.case import Case

ROOT = Path(__file__).parent.parent


def write_case(folder: Path, tensors=None, config=None, system="diffusion", module="lsm", name="case") -> Case:
    path = folder / f"{name}.safetensors"
    tensors = {"in/x": torch.ones(2), "out/y": torch.tensor([1.0, 100.0])} if tensors is None else tensors
    metadata = {"system": system, "module": module, "case": name, "config": json.dumps(config or {})}
    save_file(tensors, str(path), metadata=metadata)
    return Case(path)


def test_a_complete_check_passes(tmp_path):
    case = write_case(tmp_path, config={"dim": 4, "ae": {"depth": 2, "size": [1, 2]}})
    assert case.config("dim") == 4 and dict(case.config("ae")) == {"depth": 2, "size": [1, 2]} and case.config("absent", 7) == 7
    case.input("x")
    case.expect("y", torch.tensor([1.0, 100.0005]), rel=1e-5)
    case.finish()


@pytest.mark.parametrize(
    ("actual", "options", "message"),
    [
        (torch.tensor([1.0, 100.1]), {}, "out/y: off by"),
        (torch.tensor([1.001, 100.0]), {"each": True}, "out/y: off by"),
        (torch.tensor([1.0, float("nan")]), {}, "out/y: off by"),
        (torch.tensor([[1.0, 100.0]]), {}, "out/y: shape"),
        (torch.tensor([1, 100]), {}, "out/y: torch.int64"),
    ],
)
def test_a_difference_fails(tmp_path, actual, options, message):
    case = write_case(tmp_path)
    case.input("x")
    case.expect("y", actual, rel=1e-4, **options)
    with pytest.raises(AssertionError, match=message):
        case.finish()


def test_infinities_must_be_the_same(tmp_path):
    case = write_case(tmp_path, {"out/y": torch.tensor([float("inf"), 1.0])})
    case.expect("y", torch.tensor([float("inf"), 1.0]))
    case.finish()
    case.expect("y", torch.tensor([-float("inf"), 1.0]))
    with pytest.raises(AssertionError, match="infinities"):
        case.finish()


def test_what_was_not_looked_at_fails(tmp_path):
    case = write_case(tmp_path, config={"dim": 4, "ae": {"depth": 2, "size": 3}})
    case.input("x")
    assert case.config("ae")["size"] == 3
    with pytest.raises(AssertionError) as error:
        case.finish()
    assert all(name in str(error.value) for name in ("3 problems", "out/y: not used", "field dim", "field ae.depth"))


def test_what_is_not_recorded_is_passed_over(tmp_path):
    case = write_case(tmp_path)
    case.input("x")
    case.expect("absent", torch.ones(1))
    case.expect_grad("absent", None)
    case.expect("y", torch.tensor([1.0, 100.0]))
    case.finish()


def test_gradient_norms(tmp_path):
    case = write_case(tmp_path, {"grad_norm/a": torch.tensor([5.0]), "grad_norm/b": torch.tensor([1.0])})
    case.expect_grad_norms({"a": torch.tensor([3.0, 4.0])})
    with pytest.raises(AssertionError, match="grad_norm/b: ours has no gradient"):
        case.finish()


def run_folder(folder: Path) -> subprocess.CompletedProcess:
    line = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/parity/test_parity.py"]
    return command(line, PARITY_DIR=str(folder))


def test_unknown_modules_and_systems_fail(tmp_path):
    write_case(tmp_path, system="diffusion", module="no such module", name="module")
    write_case(tmp_path, system="no such system", name="system")
    (tmp_path / "broken.safetensors").write_bytes(b"not a case")
    result = run_folder(tmp_path)
    assert result.returncode == 1 and "3 failed, 1 passed" in result.stdout, result.stdout
    assert "no adapter for system 'no such system'" in result.stdout


def test_a_missing_folder_fails(tmp_path):
    result = run_folder(tmp_path / "absent")
    assert result.returncode == 1 and "no *.safetensors" in result.stdout
