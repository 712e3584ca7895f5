"""The space of an autoencoder that makes one latent tensor of a clip: latents of clips, and of what they go on from, encoded as training
goes or read from shards (spec, pvdm.md section 5.2, hvdm.md sections 6 and 8).

Letters: b samples, S frames of a clip, e channels of its latent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.task import Batch, Network
from models.layers.motion import motion_energy, still_clip
from models.layers.tables import FROM_CLIP, FROM_IMAGE, NO_TASK
from pipelines.loading import Loaded
from tasks.clips import Networks, on_device, units
from tasks.dynamics import Dynamics
from tasks.first_stage import TiedLatents
from utils.media import to_float
from utils.rng import SampleRng

Encode = Callable[[Tensor], Tensor]
"""Clips b 3 S h w in [-1, 1] -> latents b e ...."""


class ClipAEConfig(Protocol):
    """What is known of such an autoencoder."""

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def clip_frames(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...


def first_channels(latents: Tensor, config: ClipAEConfig) -> Tensor:
    """Latents b e S h w -> pictures b 3 S h w of their first channels."""
    return latents[:, [min(k, latents.shape[1] - 1) for k in range(3)]]


@dataclass(frozen=True)
class Told:
    """What the denoiser learns to be told of."""

    cond_prob: float = 0.0
    """Share of samples that go on after the clip before them."""
    img_prob: float = 0.0
    """Share of samples that start from a picture, their own first frame."""
    tasks: bool = False
    """It is told which of the two its condition is."""
    dynamics: Dynamics | None = None
    """It is told the class of motion."""
    strides: int = 0
    """It is told which of so many distances the frames have."""
    stride_dropout: float = 0.0
    """Share of samples of which it is not."""


ALONE = Told()
"""Nothing."""


@dataclass(frozen=True)
class Learnt:
    """Samples in the autoencoder's own latents."""

    target: Tensor
    before: Tensor | None
    """Normalised latents of what they go on from, exact zeros where that is nothing; None: of none of them it could be anything."""
    energy: Tensor | None
    """Motion of the clips to learn, (b,); None where nobody is told."""


class ClipSpace(TiedLatents):
    """Latents b e ..., (latent - shift) * scale. Shares of the samples go on from the clip before them, or from their own first frame as a
    still clip: the latent of that is the condition."""

    def __init__(
        self,
        ae: Loaded | None,
        autoencoder: Mapping[str, Any],
        config: ClipAEConfig,
        told: Told = ALONE,
        *,
        picture: Callable[[Tensor, Any], Tensor] = first_channels,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        """`config`: of the autoencoder, which may itself be missing where the shards hold its latents; `picture` shows latents then."""
        super().__init__(autoencoder, scale, shift)
        self.ae = ae
        self.config = config
        self.told = told
        self.picture = picture
        self.shape = config.latent_shape

    def networks(self) -> dict[str, Network]:
        """The autoencoder, where there are pixels to encode or somebody gave it for previews."""
        return {} if self.ae is None else {"ae": Network(self.ae.module, "frozen", units=units, methods=("encode", "decode"))}

    @torch.no_grad()
    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents to learn, and as `previous` those that they go on from: zeros where a sample is told of nothing.

        Each sample draws for itself whether it goes on after another clip, from a picture, or begins. If the first, its clip is the second
        half of what the stream gives; if not, any S frames of that, of a set of latents either half. With `told.tasks` also `task`, with
        `told.dynamics` also `dynamics`, of frames at drawn distances also `stride`. Nothing is given as `previous` where no sample could
        go on from anything.
        """
        task = self.tasks(SampleRng(rng.seed, rng.index))  # known on the CPU, so that only what is needed is encoded
        if "video" in batch:
            learnt = self._encoded(networks["ae"].encode, batch, task, rng)
        else:
            learnt = self._stored(batch, task, rng)
        given = {} if learnt.before is None else {"previous": learnt.before}
        if self.told.tasks:
            given["task"] = self._known(task, batch, learnt.target.device)
        if self.told.dynamics is not None and learnt.energy is not None:
            given["dynamics"] = self.told.dynamics.told(learnt.energy, rng)
        if self.told.strides:
            dropped = rng.uniform("stride-dropout") < self.told.stride_dropout
            given["stride"] = torch.where(dropped, self.told.strides, batch["stride"])
        # The loss must not inherit the precision of the autoencoder's arithmetic.
        return self._normalised(learnt.target), given

    def tasks(self, rng: SampleRng) -> Tensor:
        """What each sample goes on from, (b,): NO_TASK, FROM_CLIP or FROM_IMAGE. One draw, so that the shares of one do not change
        which samples are the other's."""
        draw, told = rng.uniform("previous"), self.told
        return torch.where(draw < told.cond_prob, FROM_CLIP, torch.where(draw < told.cond_prob + told.img_prob, FROM_IMAGE, NO_TASK))

    def _known(self, task: Tensor, batch: Batch, device: torch.device) -> Tensor:
        """`tasks` as the denoiser is told them: a sample without a clip before it goes on from nothing."""
        known = on_device(task, device)
        if "has_previous" not in batch:
            return known
        return torch.where((known == FROM_CLIP) & ~batch["has_previous"], NO_TASK, known)

    def energy(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Motion (b,) of the clips that the samples learn."""
        task = self.tasks(SampleRng(rng.seed, rng.index))
        if "video" in batch:
            return motion_energy(self._clip(batch, task, rng))
        return _of_half(batch, "dynamics", self._first_half(batch, task, rng)).flatten()

    def _encoded(self, encode: Encode, batch: Batch, task: Tensor, rng: SampleRng) -> Learnt:
        clip = self._clip(batch, task, rng)
        energy = None if self.told.dynamics is None else motion_energy(clip)
        return Learnt(encode(clip), self.before(encode, clip, batch["video"], batch.get("has_previous"), task), energy)

    def _clip(self, batch: Batch, task: Tensor, rng: SampleRng) -> Tensor:
        if "has_previous" not in batch:
            return to_float(batch["video"])
        return self.windows(batch["video"], batch["has_previous"], task, rng.integers("window", self.config.clip_frames + 1))

    def windows(self, video: Tensor, has_previous: Tensor, task: Tensor, start: Tensor) -> Tensor:
        """The clips to learn, b 3 S h w in [-1, 1], of `video` b 3 2S h w uint8.

        A sample that goes on after a clip (`task`, on the CPU) is the second half, any other begins at frame `start` (b,). Without a
        previous clip (`has_previous`, on the device as `start`) the first half is padding: no window reaches into it.
        """
        frames = self.config.clip_frames
        second = has_previous & ~on_device(task == FROM_CLIP, video.device)
        return to_float(_windows(video, torch.where(second, start, frames), frames))

    def before(self, encode: Encode, clip: Tensor, video: Tensor, has_previous: Tensor | None, task: Tensor) -> Tensor | None:
        """Normalised latents b e ... of what samples go on from, exact zeros for nothing: of the first half of `video`, of the first
        frame of `clip` as a still. None where neither is ever asked for."""
        told, frames = self.told, self.config.clip_frames
        if not told.img_prob and (has_previous is None or not told.cond_prob):
            return None
        found = torch.zeros(len(clip), *self.shape, device=clip.device)
        # One by one: how many there are differs from batch to batch, and compiled units would be compiled anew for each number.
        for row in task.nonzero().flatten().tolist():
            if task[row] == FROM_IMAGE:
                found[row] = self._normalised(encode(still_clip(clip[row : row + 1])))[0]
            elif has_previous is not None:
                found[row] = self._normalised(encode(to_float(video[row : row + 1, :, :frames])))[0] * has_previous[row]
        return found

    def _stored(self, batch: Batch, task: Tensor, rng: SampleRng) -> Learnt:
        """As `_encoded`, of latents in shards: each is of a clip, or of the clip before it where the set has pairs."""
        first, told = self._first_half(batch, task, rng), self.told
        target = _of_half(batch, "latent", first)
        after, image = (_beside(on_device(task == which, target.device), target) for which in (FROM_CLIP, FROM_IMAGE))
        before = None
        if told.cond_prob and "previous" in batch:
            before = self._normalised(batch["previous"]) * after
        if told.img_prob:
            pictures = self._normalised(_of_half(batch, "still", first)) * image
            before = pictures if before is None else before + pictures
        return Learnt(target, before, None if told.dynamics is None else _of_half(batch, "dynamics", first).flatten())

    def _first_half(self, batch: Batch, task: Tensor, rng: SampleRng) -> Tensor | None:
        """Of which stored pairs the first half is learnt, (b,); None where there are no pairs."""
        if "previous" not in batch:
            return None
        return (rng.integers("window", 2) == 0) & on_device(task != FROM_CLIP, batch["latent"].device)

    def _normalised(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.shift) * self.scale

    def after(self, latents: Tensor) -> dict[str, Tensor] | None:
        """The latents as the clips before the next ones."""
        return self._from(latents, FROM_CLIP) if self.told.cond_prob else None

    @torch.no_grad()
    def starts(self, networks: Networks, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """`from_pictures`: from the first frames of the batch's clips; `by_motion`: of each class of motion, the stillest first."""
        found, count = dict[str, dict[str, Tensor]](), len(batch["label"])
        if self.told.img_prob:
            clips = batch.get("video")
            stills = (
                batch["still"] if clips is None else networks["ae"].encode(still_clip(to_float(clips[:, :, -self.config.clip_frames :])))
            )
            found["from_pictures"] = self._from(self._normalised(stills), FROM_IMAGE)
        if self.told.dynamics is not None:
            found["by_motion"] = {
                "dynamics": torch.linspace(0, self.told.dynamics.bins - 1, count, device=batch["label"].device).round().long()
            }
        return found

    def _from(self, latents: Tensor, kind: int) -> dict[str, Tensor]:
        """What the denoiser is told of normalised latents that clips go on from."""
        return {"previous": latents} | ({"task": torch.full((len(latents),), kind, device=latents.device)} if self.told.tasks else {})

    def state(self) -> dict[str, int | float]:
        """As of any latents, and the edges of the classes of motion."""
        return super().state() | ({} if self.told.dynamics is None else self.told.dynamics.state())

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave. UserError when that was of another autoencoder."""
        super().load_state(state)
        if self.told.dynamics is not None:
            self.told.dynamics.load_state(state)

    def card(self) -> dict[str, Any]:
        """As of any latents, and what the denoiser learns to go on from and to be told."""
        told = self.told
        card = {**super().card(), "cond_prob": told.cond_prob}
        card |= {"img_prob": told.img_prob} if told.img_prob else {}
        return card | ({} if told.dynamics is None else {"dynamics": told.dynamics.card()})

    @torch.no_grad()
    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """Decoded, b 3 S h w; without an autoencoder three channels of the latents."""
        found = latents.float() / self.scale + self.shift
        return networks["ae"].decode(found).float() if "ae" in networks else self.picture(found, self.config)


def _of_half(batch: Batch, name: str, first: Tensor | None) -> Tensor:
    """A stored tensor of the clips to learn: of the first halves of pairs where `first`."""
    if first is None:
        return batch[name]
    before = batch["previous" if name == "latent" else f"previous_{name}"]
    return torch.where(_beside(first, before), before, batch[name])


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    """(b,) as (b, 1, ...), to go with values b ...."""
    return flags.reshape(-1, *[1] * (values.dim() - 1))


def _windows(video: Tensor, start: Tensor, frames: int) -> Tensor:
    """`frames` frames of each clip b c t h w, from frame `start` (b,) on."""
    places = start[:, None] + torch.arange(frames, device=video.device)
    rows = torch.arange(len(video), device=video.device)[:, None]
    return video.transpose(1, 2)[rows, places].transpose(1, 2)
