"""What `sample.py` asks of a system: settings that all of them have, and a job that makes sample number i."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pipelines.sampling import Sampler
from pipelines.video_files import Format
from utils.config import flag
from utils.errors import ConfigError, UserError

Mode = Literal["short", "long", "image", "i2v"]
EXACT_BATCH = 4
"""Samples per turn where each goes through the networks alone: more would only be written later."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What every system's sampling can be told. A system's own adds its models, and refuses what it does not have."""

    system: str = ""
    """Which of the toolkit's systems; told from the runs where it is not given."""
    run: str = flag("", "results-dir")
    """Results folder of the training runs: the newest finished models in it that belong together are taken.
    The same as a bare first argument, which is what works under torchrun too (it may take --run for one of its own flags)."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights (where there are any), or the last ones."""
    out: Path = Path("samples")
    """Folder to write to. Samples that are already there with the same settings are kept."""
    num_videos: int = flag(16, "num-samples")
    """Videos to generate."""
    mode: Mode = "short"
    """short: clips as long as in training. long: videos of --num-frames frames, made clip after clip and written as they come. One that
    was stopped goes on at its last clip, whose latents are kept in <out>/latents; more --num-frames make it longer. image: the same,
    beginning at a given picture (HVDM, VIDM); i2v is its older name."""
    num_frames: int = 0
    """Frames of a video; 0: as many as in training. A short clip may be cut, a long video has any number (the last clip is cut)."""
    image: tuple[str, ...] = ()
    """--mode image: pictures (PNG, JPEG, ...) at which the videos begin, of any size (the centre is cut out and resized), or folders of
    them; sample number i takes picture i, again from the first when there are no more."""
    continue_from: str = ""
    """Long, image: a folder of shorter videos of the same settings; theirs are copied and go on in --out, as if made there from the
    start."""
    classes: tuple[str, ...] = flag((), "class-labels")
    """Classes by number or name, in turn; none given, or `all`: all of them."""
    seed: int = flag(0, "global-seed")
    """Seed of all noise. Sample number i of a seed is the same clip whatever else is generated with it."""
    steps: int | None = None
    """Denoising steps; none: as many as the system's release takes."""
    sampler: Sampler = "auto"
    """ddim, ddpm (ancestral) or dpm++ (DPM-Solver++(2M)); of a flow euler or heun. auto: ddim, of a flow euler."""
    guidance_scale: float | None = None
    """Guidance towards the condition, eps_u + s (eps_c - eps_u); 1: none. none: the system's usual one."""
    batch_size: str = "auto"
    """Videos that a process makes at a time. auto: 4 with --exact, for which more gain nothing; with --no-exact as many as memory holds,
    found out while they are made. Where memory runs out all the same, it is halved and goes on."""
    exact: bool = True
    """Each clip alone through the networks, so that it is the same to the last bit with any batch size and number of processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks."""
    fps: float = 0.0
    """Frame rate of the files; 0: that of the training clips."""
    keep_latents: bool = True
    """Keep <out>/latents of long videos that are done, from which they can be made longer; those of a video that was stopped are kept."""
    format: tuple[Format, ...] = ("mp4",)
    """Files of a video, one or more: mp4, gif (the frames of a long video are held in memory for it), png (a folder of pictures, exact)."""
    gif: bool = False
    """The same as adding gif to --format."""
    gallery: bool = True
    """Write <out>/index.html, a page that shows all videos of the folder."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    modes: ClassVar[tuple[str, ...]] = ("short", "long")
    """Those that the system has; one that others have too it may refuse for a reason of its own."""
    lacks: ClassVar[Mapping[str, str]] = {"image": "its videos begin at no picture, those of hvdm and vidm can"}
    """Settings of all systems that this one does not have, and why."""
    usual_guidance: ClassVar[float] = 1.0
    """Where none is given."""

    def __post_init__(self) -> None:
        if self.mode == "i2v":
            object.__setattr__(self, "mode", "image")

    @property
    def long(self) -> bool:
        """Whether samples are made clip after clip."""
        return self.mode != "short"

    @property
    def recorded_mode(self) -> str:
        """What settings.json calls the mode."""
        return self.mode

    @property
    def guidance(self) -> float:
        """Scale of the guidance."""
        return self.usual_guidance if self.guidance_scale is None else self.guidance_scale

    @property
    def formats(self) -> tuple[Format, ...]:
        """Each one of the files' formats once."""
        wanted: tuple[Format, ...] = (*self.format, *(("gif",) if self.gif else ()))
        return tuple(dict.fromkeys(wanted))

    @property
    def together(self) -> int | None:
        """Samples that a process makes at a time; None: as many as memory holds. Exact long videos are made one by one, so that stopping
        loses no more than one clip."""
        if self.exact and self.long:
            return 1
        return self.asked_batch

    @property
    def asked_batch(self) -> int | None:
        """The batch size as a number; None: to be found."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        return EXACT_BATCH if self.exact else None

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        for name, reason in self.lacks.items():
            if getattr(self, name) not in ((), None) and not (name == "guidance_scale" and self.guidance == 1):
                raise ConfigError(f"--{name.replace('_', '-')} is not for {self.system}: {reason}")
        if self.mode not in self.modes:
            raise ConfigError(f"--mode {self.mode}: {self.system} makes {' and '.join(self.modes)} videos only")
        self.at_least(1, "num_videos", "steps")
        self.at_least(0, "num_frames")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ConfigError(f"--batch-size {self.batch_size}: a whole number from 1, or auto")
        if not 0 <= self.fps < float("inf"):
            raise ConfigError(f"--fps {self.fps}: above 0, or 0 for that of the training clips")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"--guidance-scale {self.guidance}: a number, 1 for none")
        if not self.formats:
            raise ConfigError("--format: at least one of mp4, gif, png")
        if self.mode == "image" and not self.image:
            raise ConfigError("--mode image: which picture? give --image FILE")
        self.check_length()

    def check_length(self) -> None:
        """Raises ConfigError for long videos that do not say how long, and for what short ones do not have."""
        if self.mode == "long" and not self.num_frames:
            raise ConfigError("--mode long: how long? give --num-frames N")
        if self.mode == "short" and self.continue_from:
            raise ConfigError("--continue-from goes with --mode long: short clips have nothing to go on with")

    def at_least(self, lowest: int, *names: str) -> None:
        """Raises ConfigError for the first of the named settings that is given and below `lowest`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {lowest}")


@dataclasses.dataclass(frozen=True)
class Strip:
    """How some samples came about: clips at several moments of the sampling."""

    clips: Tensor
    """(samples * moments) 3 t h w in [-1, 1], the moments of the first sample first."""
    moments: int


class SampleJob(Protocol):
    """Makes sample number i. What it makes is a function of `settings()` alone, whatever else is made with it."""

    @property
    def labels(self) -> list[int]:
        """Classes that the samples take in turn; empty: there are none."""

    @property
    def fps(self) -> float:
        """Frame rate of the files."""

    @property
    def n_frames(self) -> int:
        """Frames of a clip."""

    @property
    def endings(self) -> tuple[str, ...]:
        """What follows a sample's name in the names of its videos: "" for the clip, and one for each further video."""

    @property
    def draws(self) -> int:
        """How many draws from diffusion models make a clip."""

    @property
    def notes(self) -> list[str]:
        """What the user should know before it starts, a line each."""

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the models have none."""

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""

    def generate(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """Ending -> videos b 3 t h w in [-1, 1] of these samples."""

    def strip(self) -> Strip | None:
        """How the first samples came about, where that was asked for."""

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""


@runtime_checkable
class PictureJob(Protocol):
    """What can make videos that begin at a picture."""

    def picture(self, index: int) -> Tensor:
        """The picture 3 h w in [-1, 1] at which a sample begins."""

    def seen_picture(self, index: int) -> Tensor:
        """The same through the autoencoder alone, the best that a sample can begin with."""


def numbered(index: int, label: int | None) -> str:
    """The usual file name of a sample, without ending."""
    return f"{index:06d}" if label is None else f"{index:06d}-class{label:03d}"


def in_turn(labels: Sequence[int], index: int) -> int | None:
    """Class of a sample when they take `labels` in turn; None when there are none."""
    return labels[index % len(labels)] if labels else None


def choose_classes(wanted: Sequence[str], known: int, names: Sequence[str]) -> list[int]:
    """Numbers of the classes asked for by number or name; of all `known` ones when none is, or `all`. Raises UserError."""
    if not known:
        if wanted:
            raise UserError("--classes: these models know no classes")
        return []
    if not wanted or tuple(wanted) == ("all",):
        return list(range(known))
    return [_class_number(item, known, names) for item in wanted]


def load_vectors(paths: Sequence[str], width: int, model: str) -> Tensor | None:
    """Condition vectors (n, width) float32 of .npy files with one each, of any shape; None for a model that takes none.

    Raises UserError for files that are not that, and when the model takes vectors and there are none.
    """
    if not width:
        if paths:
            raise UserError(f"--cond: {model} takes no condition vectors")
        return None
    if not paths:
        raise UserError(f"{model} is conditioned on vectors: give --cond FILE.npy ..., one vector of {width} numbers each, taken in turn")
    rows = []
    for path in paths:
        try:
            row = np.load(path, allow_pickle=False)
            values = torch.from_numpy(np.asarray(row, dtype=np.float32).reshape(-1).copy())
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"--cond {path} cannot be read as an array: {str(error).splitlines()[0]}") from None
        if len(values) != width or not bool(values.isfinite().all()):
            raise UserError(f"--cond {path} holds {len(values)} numbers, {model} takes {width} finite ones")
        rows.append(values)
    return torch.stack(rows)


def class_name(names: Sequence[str], label: int | None) -> str:
    """Name of a class, where there is one."""
    return names[label] if label is not None and label < len(names) else ""


def _class_number(item: str, known: int, names: Sequence[str]) -> int:
    if item in names:
        return names.index(item)
    if item.isdecimal() and int(item) < known:
        return int(item)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise UserError(f"--classes {item}: no such class; 0 to {known - 1}" + (f", or {listed}" if names else ""))
