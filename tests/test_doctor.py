"""The doctor tells what is broken, and how to mend it, without breaking itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from losses import perceptual
from utils import doctor

ROOT = Path(__file__).resolve().parent.parent


def test_report_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "utils.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for subject in ("python", "torch", "webdataset", "pairing", "cpu", "distributed", "video", "lpips-vgg", "disk here"):
        assert f"] {subject} " in done.stdout
    assert "torchvision.ops.nms works" in done.stdout
    assert done.stdout.endswith("All that is needed is there.\n")


def test_a_mismatched_pair_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def broken(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    (finding,) = doctor.check_pairing()
    assert finding.state == "broken"
    assert finding.text.endswith("operator torchvision::nms does not exist")
    assert "one index" in finding.remedy


def test_a_missing_package_and_a_failing_check_are_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "no_such_module")

    def check_video() -> list[doctor.Finding]:
        raise OSError("no encoder")

    monkeypatch.setattr(doctor, "check_video", check_video)
    with pytest.raises(SystemExit) as caught:
        doctor.main()
    text = capsys.readouterr().out
    assert caught.value.code == 1
    assert "[FAIL] no-such-package  ModuleNotFoundError: No module named 'no_such_module'" in text
    assert "[FAIL] video            OSError: no encoder" in text
    assert text.endswith("Broken: no-such-package, video.\n")


def test_names_of_perceptual_weights_are_those_that_training_asks_for() -> None:
    asked_for = {kind: file.name for kind, file in perceptual.FILES.items() if not file.package}
    assert asked_for == doctor.TRUNKS


def test_perceptual_weights_are_found_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    states = {finding.subject: finding.state for finding in doctor.check_perceptual()}
    assert states == {"lpips-vgg": "note", "lpips-alex": "ok", "lpips-squeeze": "note"}


def test_requirements_are_what_the_doctor_checks() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.split(">=")[0].strip() for line in lines if line and not line.startswith("#")}
    assert listed - {"imageio-ffmpeg"} == set(doctor.PACKAGES)
