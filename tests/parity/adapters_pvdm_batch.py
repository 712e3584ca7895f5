"""Checks of PVDM's training batches: which frames a sample learns, and which it is told of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.tables import FROM_CLIP, NO_TASK
from tasks.clip_latents import ClipSpace, Told
from tests.parity.case import Case, adapter
from utils.media import to_float


@dataclass(frozen=True)
class Pixels:
    """An autoencoder that leaves clips as they are."""

    clip_frames: int
    image_size: tuple[int, int]
    embed_dim: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.embed_dim, self.clip_frames, *self.grid


@adapter("pvdm", "train_batch")
def check_train_batch(case: Case) -> None:
    """The encoder is left out: what goes into it is what comes out."""
    frames, short = case.config("clip_frames"), case.config("short_row", None)
    raw = case.input("raw_btchw")
    video = raw.transpose(1, 2).to(torch.uint8)
    assert torch.equal(video.transpose(1, 2).float(), raw), "pixels are whole numbers"
    has_previous = raw[:, :frames].flatten(1).any(dim=1)  # the cases' own rule: black padding; ours comes with the sample
    rows = [short] if isinstance(short, int) else short or []
    assert not has_previous[[row for row in rows if row >= 0]].any(), "rows that are said to be padded are black"
    case.expect("mask", has_previous.long())
    height, width = video.shape[-2:]
    space = ClipSpace(None, {}, Pixels(frames, (height, width)), Told(cond_prob=0.5))

    def batch(kind: int, start: int) -> tuple[Tensor, Tensor]:
        task = torch.full((len(video),), kind)
        clip = space.windows(video, has_previous, task, torch.full((len(video),), start))
        before = space.before(_identity, clip, video, has_previous, task)
        assert before is not None
        return clip, before

    target, previous = batch(FROM_CLIP, 0)
    case.expect("cond_x", target, abs=1e-6)
    if case.has("out/cond_c"):
        before = to_float(video[:, :, :frames])
        case.expect("cond_c", before, abs=1e-6)
        assert torch.equal(previous, torch.where(has_previous[:, None, None, None, None], before, 0.0))
    for name in case.names("out/uncond_x_prefix"):
        target, previous = batch(NO_TASK, int(name.removeprefix("out/uncond_x_prefix")))
        case.expect(name.removeprefix("out/"), target, abs=1e-6)
        assert not previous.any()


def _identity(video: Tensor) -> Tensor:
    return video
