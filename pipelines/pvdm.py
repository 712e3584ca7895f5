"""PVDM end to end: clips to the latents of their three planes and back, and new clips from noise, alone or after another (spec, pvdm.md).

Letters: b clips, S frames of a clip, e channels and L positions of its latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from models.autoencoders.pvdm import PVDMAutoencoder
from pipelines.loading import Loaded, Weights, diffusion_of, is_official, understood
from pipelines.pvdm_loading import load_pvdm_autoencoder, load_pvdm_denoiser
from pipelines.sampling import Sampling, in_groups, sample
from utils.config import to_dict
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import read_card

PVDM_SAMPLING = Sampling(eta=1.0, clip=True, keep_eps=True, respacing="trailing400")
"""What the released checkpoints are sampled with."""


class PVDMPipeline:
    """An autoencoder of three planes and, for generation, a denoiser of its latents."""

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
            _check_family(ae, denoiser)
            denoiser.module.to(self.device)
            latent = denoiser.card.get("latent", {})
        self.scale, self.shift = float(latent.get("scale", 1.0)), float(latent.get("shift", 0.0))
        """Latents are (planes - shift) * scale; the release's are the planes themselves."""
        ae.module.to(self.device)

    @classmethod
    def from_exports(
        cls,
        denoiser: str | Path = "",
        ae: str | Path = "",
        *,
        weights: Weights = "ema",
        ae_weights: Weights = "ema",
        image_size: tuple[int, int] | None = None,
        num_heads: int = 8,
        pairs: bool = False,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> "PVDMPipeline":
        """From exports, run folders or official checkpoints (model_last.pth, ema_model_<it>.pth). `ae` may be left out where the
        denoiser's export names one that is still there.

        `weights` (ema or model) counts for the denoiser; the autoencoder's are those that it was trained on, or `ae_weights` when the
        autoencoder stands alone. `image_size` and `num_heads` count for official checkpoints (`pipelines.pvdm_loading`).
        Raises UserError when something is missing or does not belong together.
        """
        card = read_card(denoiser).get("ae", {}) if denoiser and not is_official(denoiser) else {}
        if not ae:
            if not card.get("path"):
                raise UserError(f"the autoencoder of {denoiser} is not known: give --ae")
            if not Path(card["path"]).exists():
                raise UserError(f"the autoencoder of {denoiser} was {card['path']}, which is not there: give --ae")
            ae = card["path"]
        first = load_pvdm_autoencoder(ae, card.get("weights") or ae_weights, image_size)
        second = load_pvdm_denoiser(denoiser, first.config, weights, num_heads=num_heads) if denoiser else None
        return cls(first, second, pairs=pairs, device=device, precision=precision)

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that go in and come out; with `pairs` the frames of two."""
        config = self.ae.config
        return config.clip_frames * (2 if self.pairs else 1), *config.image_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(e, L) of a clip."""
        return self.ae.config.embed_dim, self.ae.config.latent_size

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
        """Frame rate of the training clips."""
        return float(self._data().get("fps", 8.0))

    def identity(self) -> dict[str, Any]:
        """What ties stored latents to their autoencoder: plain values."""
        own = {"system": "pvdm", "sha256": self.ae.sha256, "weights": self.ae.weights, "path": str(Path(self.ae.path).absolute())}
        return own | {"model": to_dict(self.ae.config)}

    def encode_latents(self, video: Tensor) -> dict[str, Tensor]:
        """Clips b 3 S h w in [-1, 1] -> what a latent set stores: `latent` b e L; with `pairs` two clips in a row, b 3 2S h w, and
        `previous` is the latent of the first. Planes as they are, in (-1, 1)."""
        latents = self._planes(video)
        if not self.pairs:
            return {"latent": latents[:, 0]}
        return {"previous": latents[:, 0], "latent": latents[:, 1]}

    def encode(self, video: Tensor) -> Tensor:
        """Clips b 3 S h w in [-1, 1] -> latents b e L as the denoiser takes them."""
        return (self._planes(video)[:, 0] - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents b e L as the denoiser makes them -> clips b 3 S h w in [-1, 1]."""
        with self._autocast():
            clips = cast(PVDMAutoencoder, self.ae.module).decode(latents.float() / self.scale + self.shift)
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
        sampling: Sampling = PVDM_SAMPLING,
        exact: bool = True,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Clips b 3 S h w in [-1, 1]: sample number `indices[i]` of class `labels[i]`, after the clip with the latent `previous[i]`.

        A sample is a function of (seed, its number, its condition). With `exact` to the last bit: each one goes through the networks
        alone, because a matrix product may round differently in a larger batch. Without, all go together: faster on a GPU, equal to
        rounding. Raises UserError for a class that the model does not know.
        """
        latents = self.generate_latents(indices, labels, seed=seed, sampling=sampling, exact=exact, previous=previous)
        return torch.cat([self.decode(part) for part in latents.split(1 if exact else len(latents))])

    def generate_latents(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling = PVDM_SAMPLING,
        exact: bool = True,
        clip: int = 0,
        previous: Tensor | None = None,
    ) -> Tensor:
        """The latents b e L of such clips. Each `clip` of a long video has noise of its own; `previous` b e L, None: no clip before."""
        if self.denoiser is None:
            raise UserError("generation needs a denoiser, not the autoencoder alone")
        if previous is not None and not self.denoiser.config.conditional:
            raise UserError(
                f"the denoiser {self.denoiser.path} knows no previous clip (model.conditional is off), so it cannot go on after one"
            )
        groups = in_groups(indices, labels, None, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device)
        return torch.cat(
            [
                self._latents(rng, given | ({} if previous is None else {"previous": previous[group].to(self.device)}), sampling, clip)
                for group, rng, given in groups
            ]
        )

    def _latents(self, rng: SampleRng, given: Mapping[str, Tensor], sampling: Sampling, clip: int) -> Tensor:
        assert self.denoiser is not None
        labels = {name: value for name, value in given.items() if name != "previous"}
        before = {name: value for name, value in given.items() if name == "previous"}
        condition = understood(self.denoiser, labels, sampling.guidance) | before
        stream = f"denoiser/clip-{clip}" if clip else "denoiser"
        process = diffusion_of(self.denoiser)
        with self._autocast():
            return sample(
                self.denoiser.module, process, self.latent_shape, rng, stream, sampling, condition=condition, null={"previous": 0.0}
            )

    @torch.no_grad()
    def _planes(self, video: Tensor) -> Tensor:
        """Clips b 3 (n S) h w in [-1, 1] -> b n e L in (-1, 1), each clip of S frames for itself."""
        clips = video.split(self.ae.config.clip_frames, dim=2)
        with self._autocast():
            return torch.stack([cast(PVDMAutoencoder, self.ae.module).encode(clip).float() for clip in clips], dim=1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _data(self) -> Mapping[str, Any]:
        cards = [part.card for part in (self.denoiser, self.ae) if part is not None]
        return next((card["data"] for card in cards if "data" in card), {})


def _check_family(ae: Loaded, denoiser: Loaded) -> None:
    """Raises UserError when the denoiser was trained on the latents of another autoencoder, or has not their size."""
    trained = denoiser.card.get("ae", {}).get("sha256") or ae.sha256
    if trained != ae.sha256:
        raise UserError(
            f"the denoiser {denoiser.path} was trained on another autoencoder ({trained[:12]}...) than {ae.path} ({ae.sha256[:12]}...)"
        )
    model, first = denoiser.config, ae.config
    if (model.in_channels, model.plane_shapes) != (first.embed_dim, first.plane_shapes):
        told = [
            f"{channels} channels on planes of {_planes(shapes)}"
            for channels, shapes in ((model.in_channels, model.plane_shapes), (first.embed_dim, first.plane_shapes))
        ]
        raise UserError(f"the denoiser {denoiser.path} makes latents of {told[0]}, the autoencoder {ae.path} has {told[1]}")


def _planes(shapes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{rows}x{columns}" for rows, columns in shapes)
