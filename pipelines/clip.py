"""Systems whose autoencoder makes one latent tensor of a clip, end to end: clips to latents and back, and new clips from noise, alone or
after another (spec, pvdm.md and hvdm.md).

Letters: b clips, S frames of a clip, e channels of its latent.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffusion import build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.replacement import Replacement
from pipelines.loading import Loaded, Weights, diffusion_of, is_official, understood
from pipelines.sampling import Sampling, in_groups, sample
from pipelines.saved import Saveable
from utils.config import to_dict
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import read_card


class ClipPipeline(Saveable):
    """An autoencoder of clips and, for generation, a denoiser of its latents, which may be told of the clip before."""

    usual: ClassVar[Sampling]
    """What the released checkpoints are sampled with."""
    null: ClassVar[Mapping[str, float]] = {"previous": 0.0}
    """Inputs of the denoiser that guidance takes away, and what they are without."""

    def __init__(
        self,
        ae: Loaded,
        denoiser: Loaded | None = None,
        *,
        pairs: bool = False,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """`pairs`: `encode_latents` takes two clips in a row. Raises UserError when the denoiser was not trained on the latents of `ae`."""
        self.ae, self.denoiser, self.pairs = ae, denoiser, pairs
        self.device = torch.device(device)
        self.precision = precision
        latent: Mapping[str, Any] = {}
        if denoiser is not None:
            self._check_family(ae, denoiser)
            denoiser.module.to(self.device)
            latent = denoiser.card.get("latent", {})
        self.scale, self.shift = float(latent.get("scale", 1.0)), float(latent.get("shift", 0.0))
        """Latents are (what the autoencoder makes - shift) * scale; the releases' are what it makes."""
        ae.module.to(self.device)

    def networks(self) -> dict[str, Loaded]:
        """Stage -> network."""
        return {"autoencoder": self.ae} | ({"denoiser": self.denoiser} if self.denoiser is not None else {})

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that go in and come out; with `pairs` the frames of two."""
        config = self.ae.config
        return config.clip_frames * (2 if self.pairs else 1), *config.image_size

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """(e, ...) of a clip."""

    @staticmethod
    @abstractmethod
    def told_latents(config: Any) -> str:
        """The latents of an autoencoder, or of a denoiser, in words; they fit when the words are the same."""

    @property
    def bounded(self) -> bool:
        """Whether latents are as the autoencoder makes them, which lie in [-1, 1]."""
        return (self.scale, self.shift) == (1.0, 0.0)

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0: none."""
        return self.denoiser.config.num_classes if self.denoiser is not None else 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the training data had any."""
        return list(self._data().get("classes", []))

    @property
    def fps(self) -> float:
        """Frame rate of what the networks were trained on: that of the stored clips, or of every n-th frame of them."""
        data = self._data()
        return float(data.get("fps", 8.0)) / data.get("frame_interval", 1)

    def identity(self) -> dict[str, Any]:
        """What ties stored latents to their autoencoder: plain values."""
        own = {"system": self.system, "sha256": self.ae.sha256, "weights": self.ae.weights, "path": str(Path(self.ae.path).absolute())}
        return own | {"model": to_dict(self.ae.config)}

    def encode_latents(self, video: Tensor) -> dict[str, Tensor]:
        """Clips b 3 S h w in [-1, 1] -> what a latent set stores: `latent` b e ...; with `pairs` two clips in a row, b 3 2S h w,
        and `previous` is the latent of the first. As the autoencoder makes them, in (-1, 1)."""
        latents = self.raw(video)
        if not self.pairs:
            return {"latent": latents[:, 0]}
        return {"previous": latents[:, 0], "latent": latents[:, 1]}

    def encode(self, video: Tensor) -> Tensor:
        """Clips b 3 S h w in [-1, 1] -> latents b e ... as the denoiser takes them."""
        return (self.raw(video)[:, 0] - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents b e ... as the denoiser makes them -> clips b 3 S h w in [-1, 1]."""
        with self._autocast():
            clips = self._method("decode")(latents.float() / self.scale + self.shift)
        return clips.float().clamp(-1, 1)

    def reconstruct(self, video: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Clips b 3 S h w in [-1, 1] -> the same through the autoencoder, which draws nothing: `rng` is there for systems that do."""
        return self.decode(self.encode(video))

    def generate(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        exact: bool = True,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Clips b 3 S h w in [-1, 1]: sample number `indices[i]` of class `labels[i]`, after the clip with the latent `previous[i]`.

        A sample is a function of (seed, its number, its condition). With `exact` to the last bit: each one goes through the networks
        alone, because a matrix product may round differently in a larger batch. Without, all go together: faster on a GPU, equal to
        rounding. Raises UserError for a class that the model does not know.
        """
        latents = self.generate_latents(indices, labels, seed=seed, sampling=sampling, exact=exact, previous=previous)
        return self.decode_each(latents, exact)

    def generate_latents(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        exact: bool = True,
        clip: int = 0,
        previous: Tensor | None = None,
    ) -> Tensor:
        """The latents b e ... of such clips. Each `clip` of a long video has noise of its own; `previous` b e ..., None: no clip before."""
        return self._drawn(indices, labels, seed=seed, sampling=sampling, exact=exact, clip=clip, previous=previous)

    def decode_each(self, latents: Tensor, exact: bool = True) -> Tensor:
        """Latents b e ... -> clips b 3 S h w in [-1, 1], with `exact` each for itself."""
        return torch.cat([self.decode(part) for part in latents.split(1 if exact else len(latents))])

    def _drawn(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        *,
        seed: int,
        sampling: Sampling | None,
        exact: bool,
        clip: int,
        previous: Tensor | None,
        told: Mapping[str, int] | None = None,
        guides: Mapping[str, tuple[float, float]] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """As `generate_latents`. `told`: further inputs of the denoiser, the same for all samples. `guides`: those among them that have a
        guidance of their own, (scale, value without). `known`: latents b e k ... of the first frames, at which they are held."""
        if self.denoiser is None:
            raise UserError("generation needs a denoiser, not the autoencoder alone")
        if previous is not None and not self.denoiser.config.conditional:
            raise UserError(
                f"the denoiser {self.denoiser.path} knows no previous clip (model.conditional is off), so it cannot go on after one"
            )
        model: Callable[..., Tensor] = self.denoiser.module
        for name, (scale, without) in (guides or {}).items():
            model = ClassifierFreeGuidance(model, scale, {name: without})
        sampling = sampling or self.usual
        made = []
        for group, rng, given in in_groups(indices, labels, None, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device):
            always = {name: torch.full((len(group),), value, device=self.device) for name, value in (told or {}).items()}
            if previous is not None:
                always["previous"] = previous[group].to(self.device)
            taken = understood(self.denoiser, given, sampling.guidance) | {name: always.pop(name) for name in self.null if name in always}
            stream = f"denoiser/clip-{clip}" if clip else "denoiser"
            made.append(self._sample(model, rng, stream, sampling, taken, always, None if known is None else known[group]))
        return torch.cat(made)

    def _sample(
        self,
        model: Callable[..., Tensor],
        rng: SampleRng,
        stream: str,
        sampling: Sampling,
        condition: Mapping[str, Tensor],
        always: Mapping[str, Tensor],
        known: Tensor | None = None,
    ) -> Tensor:
        assert self.denoiser is not None
        process = diffusion_of(self.denoiser)
        if known is not None:
            model = Replacement(model, build(process), known, rng.normal(f"{stream}/known", tuple(known.shape[1:])))
        with self._autocast():
            made = sample(model, process, self.latent_shape, rng, stream, sampling, condition=condition, always=always, null=self.null)
        return made if known is None else torch.cat([known.to(made), made[:, :, known.shape[2] :]], dim=2)

    @torch.no_grad()
    def raw(self, video: Tensor) -> Tensor:
        """Clips b 3 (n S) h w in [-1, 1] -> b n e ... in (-1, 1) as the autoencoder makes them, each clip of S frames for itself."""
        clips = video.split(self.ae.config.clip_frames, dim=2)
        with self._autocast():
            return torch.stack([self._method("encode")(clip).float() for clip in clips], dim=1)

    def _method(self, name: Literal["encode", "decode"]) -> Callable[[Tensor], Tensor]:
        """Of the autoencoder."""
        method: Callable[[Tensor], Tensor] = getattr(self.ae.module, name)
        return method

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _data(self) -> Mapping[str, Any]:
        cards = [part.card for part in (self.denoiser, self.ae) if part is not None]
        return next((card["data"] for card in cards if "data" in card), {})

    def _check_family(self, ae: Loaded, denoiser: Loaded) -> None:
        """Raises UserError when the denoiser was trained on the latents of another autoencoder, or has not their size."""
        trained = denoiser.card.get("ae", {}).get("sha256") or ae.sha256
        if trained != ae.sha256:
            raise UserError(
                f"the denoiser {denoiser.path} was trained on another autoencoder ({trained[:12]}...) than {ae.path} ({ae.sha256[:12]}...)"
            )
        makes, has = self.told_latents(denoiser.config), self.told_latents(ae.config)
        if makes != has:
            raise UserError(f"the denoiser {denoiser.path} makes latents of {makes}, the autoencoder {ae.path} has {has}")


def autoencoder_of(denoiser: str | Path, ae: str | Path, weights: Weights) -> tuple[str | Path, Weights]:
    """Path and weights of the autoencoder that a denoiser was trained on; where there is no denoiser, or it does not say, those given.

    `ae` may be left out where the denoiser's export names one that is still there. Raises UserError.
    """
    card = read_card(denoiser).get("ae", {}) if denoiser and not is_official(denoiser) else {}
    if not ae:
        if not card.get("path"):
            raise UserError(f"the autoencoder of {denoiser} is not known: give --ae")
        if not Path(card["path"]).exists():
            raise UserError(f"the autoencoder of {denoiser} was {card['path']}, which is not there: give --ae")
        ae = card["path"]
    return ae, card.get("weights") or weights
