"""What `sample.py` needs to know of Latte: its settings, its exports, how sample number i is made, and how it came about."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.jobs import SampleConfig, Strip, choose_classes, class_name, in_turn, load_vectors, numbered
from pipelines.latte import LattePipeline
from pipelines.loading import diffusion_of
from pipelines.runs import find_family
from pipelines.sampling import Sampler, Sampling, count_steps
from utils.config import flag, to_dict
from utils.errors import ConfigError
from utils.media import grid

DEFAULT_STEPS = {"ddpm": 250, "flow": 50}
"""Steps where none are given: the official release's, and what the straighter paths of a flow need."""


@dataclasses.dataclass(frozen=True)
class LatteSampleConfig(SampleConfig):
    """Generates clips with Latte."""

    system: str = "latte"
    """Which of the toolkit's systems."""
    denoiser: str = flag("", "ckpt")
    """Denoiser in place of that in --run: an export or run folder, or a checkpoint of either release (.pt, .pth)."""
    ae: str = ""
    """Frame VAE in place of that in --run: an export or run folder, or the tutorial's checkpoint (.pth)."""
    vae: str = flag("", "pretrained-model-path")
    """Folder of the image VAE (diffusers) that the denoiser was trained on, in place of a frame VAE."""
    chunk: int = 16
    """Frames per pass through the autoencoder; less needs less memory."""
    steps: int | None = flag(None, "num-sampling-steps")
    """Denoising steps; none: 250, of a flow 50."""
    respacing: str = ""
    """Which steps of training are taken, in place of --steps: "50" evenly, "10,15,20" per equal section, "ddim50" at one stride."""
    sampler: Sampler = flag("auto", "sample-method")
    """ddim, ddpm (ancestral, both releases' own) or dpm++ (DPM-Solver++(2M)); of a flow euler or heun. auto: ddim, of a flow euler."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    guidance_scale: float | None = flag(None, "cfg-scale")
    """Guidance towards the class or vector, eps_u + s (eps_c - eps_u); 1, the usual: none. The official release takes 7 for UCF-101."""
    cfg_channels: int | None = None
    """Channels that are guided; none: all."""
    cond: tuple[str, ...] = ()
    """Models of condition vectors (text features): .npy files with one vector each, taken in turn."""
    n_frames: int = 0
    """Frames of a clip; 0: --num-frames, or as trained. The network takes any number, but quality drops; --mode long keeps it."""
    overlap: int = 0
    """Long videos: frames that a clip shares with the one before it, which are held fixed while the others are sampled; 0: half of them."""
    image_size: tuple[int, int] = (0, 0)
    """Height and width; 0 0: as trained (256 256 for released checkpoints). The network takes others, but quality drops."""
    num_heads: int = 0
    """Attention heads of a released checkpoint whose width is that of no named size."""
    denoising_strip: int = 0
    """Moments of the sampling at which the estimate of the clean clip is shown, side by side, in strip.png and strip.mp4; 0: no strip."""
    strip_samples: int = 4
    """The first samples that the strip shows, a row each."""
    save_trajectory: Literal["none", "xt", "x0"] = "none"
    """A further video of each sample, <name>-trajectory.mp4: its frames side by side as the steps go. xt: three channels of the noisy
    latents; x0: the decoded estimates of the clean clip."""
    trajectory_every: int = 10
    """Steps from one picture of it to the next."""
    names: Literal["numbers", "tutorial"] = "numbers"
    """File names. tutorial: the first clip is sample_output_0.mp4 as in that release, the others sample_output_0-<number>.mp4. Its
    sample_output_<step>.mp4 of all other steps are --save-trajectory xt in one video."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.run and not self.denoiser:
            raise ConfigError("what to sample from? give --run FOLDER (the --results-dir of training), or --denoiser and --ae or --vae")
        if self.ae and self.vae:
            raise ConfigError("--ae and --vae: give one of them, the denoiser was trained on one")
        self.at_least(1, "chunk", "cfg_channels", "strip_samples", "trajectory_every")
        self.at_least(0, "n_frames", "num_heads", "denoising_strip", "overlap")
        if self.mode == "long" and (self.denoising_strip or self.save_trajectory != "none"):
            raise ConfigError("--mode long: --denoising-strip and --save-trajectory show how a clip came about, a long video has many")
        if self.mode == "short" and self.overlap:
            raise ConfigError(f"--overlap {self.overlap} goes with --mode long: a short clip is alone")
        if self.mode == "short" and self.n_frames and self.num_frames:
            raise ConfigError(f"--n-frames {self.n_frames} and --num-frames {self.num_frames}: give one of them, both are those of a clip")
        if min(self.image_size) < 0 or (0 in self.image_size and any(self.image_size)):
            raise ConfigError(f"--image-size {' '.join(map(str, self.image_size))}: height and width, or 0 0 for those of training")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        if self.steps and self.respacing:
            raise ConfigError(f"--steps {self.steps} and --respacing {self.respacing}: give one of them")


class LatteSampleJob:
    """Makes sample number i. What it makes is a function of `settings()` alone."""

    draws = 1

    def __init__(self, config: LatteSampleConfig, device: torch.device, pipeline: LattePipeline | None = None) -> None:
        """`pipeline`: networks that are there already, of the same settings. Raises UserError or ConfigError in one line."""
        self.config = config
        self.pipeline = pipeline or _open(config, device)
        denoiser = self.pipeline.denoiser
        assert denoiser is not None
        self.process = diffusion_of(denoiser)
        self.sampling = Sampling(
            steps=config.steps or min(DEFAULT_STEPS[self.process.process], self.process.steps),
            sampler=config.sampler,
            eta=config.eta,
            guidance=config.guidance,
            cfg_channels=config.cfg_channels,
            respacing=config.respacing,
        ).resolved(self.process)
        self.steps = count_steps(self.process, self.sampling)
        if config.denoising_strip > self.steps:
            raise ConfigError(f"--denoising-strip {config.denoising_strip}: the sampling has {self.steps} steps to show")
        self.labels = choose_classes(config.classes, self.pipeline.num_classes, self.pipeline.classes)
        self.cond = load_vectors(config.cond, denoiser.config.cond_dim, denoiser.path)
        self.fps = config.fps or self.pipeline.fps
        self.n_frames = config.n_frames or (config.num_frames if config.mode == "short" else 0) or self.pipeline.clip_shape[0]
        self.overlap = config.overlap or self.n_frames // 2
        if config.mode == "long" and not 0 < self.overlap < self.n_frames:
            raise ConfigError(f"--overlap {self.overlap}: a clip has {self.n_frames} frames, of which some must be shared and some be new")
        self.endings = ("",) if config.save_trajectory == "none" else ("", "-trajectory")
        self.notes = self._notes()

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the model has none."""
        return in_turn(self.labels, index)

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        if self.config.names == "tutorial":
            return "sample_output_0" if index == 0 else f"sample_output_0-{index:06d}"
        return numbered(index, self.label(index))

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""
        return class_name(self.pipeline.classes, label)

    def generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The clips b 3 t h w in [-1, 1], and their trajectories b 3 moments H W where those are wanted."""
        shown: list[list[Tensor]] = [[] for _ in indices]
        every = self.config.trajectory_every

        def watch(rows: list[int], k: int, x: Tensor, x0: Tensor) -> None:
            if (k + 1) % every == 0 or k + 1 == self.steps:
                for row, noisy, clean in zip(rows, x, x0, strict=True):
                    shown[row].append(self._picture(noisy, clean))

        clips = self._clips(indices, watch if len(self.endings) > 1 else None)
        return {"": clips} | ({"-trajectory": torch.stack([torch.stack(row, dim=1) for row in shown])} if shown and shown[0] else {})

    def new_frames(self, clip: int) -> int:
        """All frames of the first clip are new, then those that do not overlap."""
        return self.n_frames - self.overlap if clip else self.n_frames

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """Latents b C t h' w' of clip number `clip` of these samples; its first frames are the last ones of `previous`."""
        return self.pipeline.generate_latents(
            indices,
            **self._conditions(indices),
            seed=self.config.seed,
            sampling=self.sampling,
            n_frames=self.n_frames,
            exact=self.config.exact,
            clip=clip,
            known=None if previous is None else previous[:, :, -self.overlap :],
        )

    def decode_clip(self, latents: Tensor, clip: int) -> Tensor:
        """Its new frames, b 3 t h w in [-1, 1]."""
        new = latents[:, :, -self.new_frames(clip) :]
        return torch.cat([self.pipeline.decode(part) for part in new.split(1 if self.config.exact else len(new))])

    def strip(self) -> Strip | None:
        """The estimates of the first samples at evenly spread steps, the last of which is the clip."""
        count = self.config.denoising_strip
        if not count:
            return None
        moments = {round((number + 1) * self.steps / count) - 1 for number in range(count)}
        rows: list[list[Tensor]] = [[] for _ in range(min(self.config.strip_samples, self.config.num_videos))]

        def watch(positions: list[int], k: int, x: Tensor, x0: Tensor) -> None:
            if k in moments:
                for position, clean in zip(positions, x0, strict=True):
                    rows[position].append(self.pipeline.decode(clean[None])[0].cpu())

        self._clips(range(len(rows)), watch)
        return Strip(torch.stack([clip for row in rows for clip in row]), count)

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        config, pipeline = self.config, self.pipeline
        assert pipeline.denoiser is not None
        trajectory = {} if len(self.endings) == 1 else {"trajectory": config.save_trajectory, "trajectory_every": config.trajectory_every}
        return {
            "system": "latte",
            "seed": config.seed,
            "classes": self.labels,
            "cond_sha256": [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in self.cond] if self.cond is not None else [],
            "weights": config.weights,
            "ae_weights": pipeline.autoencoder["weights"],
            "ae_kind": pipeline.codec.kind,
            "sha256": {"ae": pipeline.codec.sha256, "denoiser": pipeline.denoiser.sha256},
            "model": to_dict(pipeline.denoiser.config),
            "diffusion": to_dict(self.process),
            "latent": {"scale": pipeline.scale, "shift": pipeline.shift},
            "sampling": self.sampling.settings(self.process),
            "n_frames": self.n_frames,
            "image_size": list(pipeline.clip_shape[1:]),
            "chunk": config.chunk,
            "exact": config.exact,
            "precision": config.precision,
            "device": pipeline.device.type,
            "fps": self.fps,
            "names": config.names,
            **trajectory,
            **({"overlap": self.overlap} if config.mode == "long" else {}),
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        assert self.pipeline.denoiser is not None
        return {"ae": self.pipeline.autoencoder["path"], "denoiser": self.pipeline.denoiser.path}

    def _clips(self, indices: Sequence[int], watch: Callable[[list[int], int, Tensor, Tensor], None] | None) -> Tensor:
        return self.pipeline.generate(
            indices,
            **self._conditions(indices),
            seed=self.config.seed,
            sampling=self.sampling,
            n_frames=self.n_frames,
            exact=self.config.exact,
            watch=watch,
        )

    def _conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """Classes and vectors of these samples."""
        labels = [self.labels[i % len(self.labels)] for i in indices] if self.labels else None
        return {"labels": labels, "cond": None if self.cond is None else self.cond[[i % len(self.cond) for i in indices]]}

    def _picture(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """One moment of a sample's trajectory, 3 H W: all frames of the clip side by side."""
        if self.config.save_trajectory == "x0":
            frames = self.pipeline.decode(clean[None])[0]
        else:
            channels = [min(channel, len(noisy) - 1) for channel in range(3)]  # of latents with fewer, the last one again
            factor = self.pipeline.codec.factor
            frames = noisy[channels].clamp(-1, 1).repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        return grid(frames.transpose(0, 1)).cpu()

    def _notes(self) -> list[str]:
        """What is worth a warning."""
        denoiser = self.pipeline.denoiser
        assert denoiser is not None
        notes = []
        if self.config.guidance != 1 and not denoiser.config.num_classes and not denoiser.config.cond_dim:
            notes.append(f"warning: --guidance-scale {self.config.guidance:g} does nothing: the denoiser has no condition")
        trained = denoiser.card["model"].get("n_frames", 16)
        if self.n_frames != trained:
            notes.append(f"warning: clips of {self.n_frames} frames, the denoiser was trained on {trained}: quality drops")
        size = tuple(denoiser.card["model"].get("input_size", denoiser.config.input_size))
        if denoiser.config.input_size != size:
            asked, known = ("x".join(map(str, value)) for value in (denoiser.config.input_size, size))
            notes.append(f"warning: latents of {asked}, the denoiser was trained on {known}: quality drops")
        return notes


def _open(config: LatteSampleConfig, device: torch.device) -> LattePipeline:
    """The networks that the settings name. Raises UserError or ConfigError in one line."""
    # A denoiser that is named brings its own autoencoder.
    found = find_family(config.run, "latte") if config.run and not config.denoiser else {}
    ae = config.ae or ("" if config.vae else found.get("autoencoder", ""))
    return LattePipeline.from_exports(
        config.denoiser or found["denoiser"],
        ae,
        vae=config.vae,
        weights=config.weights,
        image_size=config.image_size if all(config.image_size) else None,
        num_heads=config.num_heads,
        chunk=config.chunk,
        device=device,
        precision=config.precision,
    )
