"""Peak memory of making one long video with PVDM, HVDM or VIDM at several lengths, and its seconds: memory does not grow with the length.

Each length runs in a process of its own, through the same code as `sample.py --mode long`: clips one after the other, their latents
kept on the disk, frames written as they come. VIDM makes frames instead, and begins anew (--reanchor) every --clip-frames. Networks
have random weights, which need as much memory as trained ones. A process that holds all frames until it writes them would need the
last column besides.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import machine
from diffusion import DiffusionConfig
from models import resolve
from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.official.released import RELEASED_CLIPS
from models.unets.plane_unet import PlaneUNet
from models.unets.vidm_content import ContentUNet
from models.unets.vidm_motion import MotionUNet
from models.unets.volume_unet import VolumeUNet
from pipelines.hvdm_sample import HVDMSampleConfig, HVDMSampleJob
from pipelines.long import write_videos
from pipelines.pvdm_sample import PVDMSampleConfig, PVDMSampleJob
from pipelines.vidm_sample import VIDMSampleConfig, VIDMSampleJob
from utils.config import to_dict
from utils.weights import read_export, write_export

MIB = 2**20
LATENT: dict[str, tuple[type, type, type]] = {
    "pvdm": (PVDMAEConfig, PVDMAutoencoder, PlaneUNet),
    "hvdm": (HVDMAEConfig, HVDMAutoencoder, VolumeUNet),
}
"""Systems of latents: config of the autoencoder, and both networks."""
SIZES = {
    ("pvdm", "tiny"): (64, 1, "PVDM-S", 32),
    ("pvdm", "paper"): (384, 8, "PVDM-L", 256),
    ("hvdm", "tiny"): (64, 1, "HVDM-S", 32),
    ("hvdm", "paper"): (384, 5, "HVDM-L", 192),
}
"""Width and depth of the autoencoder; denoiser and its first width."""
FRAME_SIZES: dict[str, dict[str, int]] = {"tiny": {"model_channels": 32, "num_res_blocks": 1, "num_head_channels": 32}, "paper": {}}
"""VIDM's networks: changes to the named ones."""


class System(NamedTuple):
    """What a system is measured with."""

    export: Callable[[Path, argparse.Namespace], None]
    """Leaves its networks with random weights in a folder, as training does."""
    settings: Callable[[argparse.Namespace, int], Any]
    """Settings of sampling a video of so many frames."""
    job: Callable[[Any, torch.device], Any]
    """What samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256, 512], help="lengths of the video")
    parser.add_argument("--system", choices=SYSTEMS, default="pvdm")
    parser.add_argument(
        "--size", choices=["tiny", "paper"], default="tiny", help="networks: the paper's, or narrow ones over clips as large"
    )
    parser.add_argument("--image-size", type=int, default=256, help="side of the frames")
    parser.add_argument("--clip-frames", type=int, default=16, help="frames of a clip; VIDM: of training")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[2, 2], help="denoising steps of the first clip (VIDM: frame) and of the others"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # of a process that measures one length
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args)))
        return
    sizes = f"frames of {args.image_size}x{args.image_size}, steps {args.steps}"
    print(f"{machine(torch.device(args.device))}\n{args.size} networks of {args.system}, {sizes}")
    with tempfile.TemporaryDirectory() as folder:
        SYSTEMS[args.system].export(Path(folder), args)
        peaks = [report(frames, Path(folder), args) for frames in args.frames]
    print(f"{args.frames[-1]} frames need {peaks[-1] / peaks[0]:.3f} times the memory of {args.frames[0]}")


def export_latent(root: Path, args: argparse.Namespace) -> None:
    """An autoencoder and a denoiser."""
    width, depth, name, channels = SIZES[args.system, args.size]
    ae_config, autoencoder, unet = LATENT[args.system]
    ae = ae_config(dim=width, image_size=(args.image_size,) * 2, n_frames=args.clip_frames, depth=depth)
    model = resolve(name, latent_res=ae.grid, latent_frames=ae.clip_frames, model_channels=channels)
    card = {"system": args.system, "stage": "autoencoder", "model": to_dict(ae)}
    write_export(root / "000-ae" / "export", {"model": autoencoder(ae).state_dict()}, card)
    first = {"sha256": read_export(root / "000-ae")[2], "weights": "ema", "path": str(root / "000-ae")}
    card = {"system": args.system, "stage": "denoiser", "model": to_dict(model), "ae": first, **RELEASED_CLIPS}
    write_export(root / "001-denoiser" / "export", {"model": unet(model).state_dict()}, card)


def export_frames(root: Path, args: argparse.Namespace) -> None:
    """A generator of first frames and one of next frames."""
    given: dict[str, Any] = {"image_size": (args.image_size,) * 2, **FRAME_SIZES[args.size]}
    content, motion = resolve("VIDM-content", **given), resolve("VIDM-motion", **given, video_timesteps=args.clip_frames)
    told = {"diffusion": to_dict(DiffusionConfig()), "data": {"n_frames": args.clip_frames, "fps": 10.0}}
    for stage, config, network in (("content", content, ContentUNet), ("motion", motion, MotionUNet)):
        card = {"system": args.system, "stage": stage, "model": to_dict(config), **told}
        write_export(root / f"000-{stage}" / "export", {"model": network(config).state_dict()}, card)


def latent_settings(kind: type) -> Callable[[argparse.Namespace, int], Any]:
    """Of a system of latents."""

    def settings(args: argparse.Namespace, frames: int) -> Any:
        steps, following = args.steps
        return kind(run=str(args.run), mode="long", num_frames=frames, steps=steps, next_steps=following)

    return settings


def frame_settings(args: argparse.Namespace, frames: int) -> VIDMSampleConfig:
    """Of VIDM."""
    first, others = args.steps
    return VIDMSampleConfig(run=str(args.run), num_frames=frames, content_steps=first, motion_steps=others, reanchor=True)


SYSTEMS = {
    "pvdm": System(export_latent, latent_settings(PVDMSampleConfig), PVDMSampleJob),
    "hvdm": System(export_latent, latent_settings(HVDMSampleConfig), HVDMSampleJob),
    "vidm": System(export_frames, frame_settings, VIDMSampleJob),
}


def report(frames: int, root: Path, args: argparse.Namespace) -> float:
    """One line of one length, made in a new process; its peak of memory in bytes."""
    line = [sys.executable, "-m", "benchmarks.long_video", "--run", root, "--frames", frames, "--device", args.device]
    line += ["--system", args.system]
    done = subprocess.run([*map(str, line), "--steps", *map(str, args.steps)], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    held = frames * 3 * args.image_size**2 * 4
    device = f", {found['device'] / MIB:7.1f} MiB on the device" if found["device"] else ""
    what = f"{frames:5d} frames: {found['memory'] / MIB:7.1f} MiB at most{device}, {found['seconds']:.1f} s"
    print(f"{what}; all frames as numbers: {held / MIB:.1f} MiB", flush=True)
    return float(found["device"] or found["memory"])


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of this process after making one video."""
    device, (frames,) = torch.device(args.device), args.frames
    system = SYSTEMS[args.system]
    job = system.job(system.settings(args, frames), device)
    started = time.perf_counter()
    write_videos(job, [0], args.run / f"out-{frames}", frames, device, lambda: None)
    taken = time.perf_counter() - started
    return {"memory": peak_memory(), "device": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, "seconds": taken}


def peak_memory() -> int:
    """Most bytes that this process has had in memory. (Of Linux; `resource` counts those of the process before `exec` too.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
