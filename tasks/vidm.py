"""What VIDM's two stages share: frames are learnt as they are, in [-1, 1] (spec, vidm.md sections 6 to 8)."""

from typing import Any

from torch import Tensor

from engine.task import Batch, Network
from pipelines.sampling import Sampling
from tasks.clips import Networks
from tasks.diffusion_task import Condition
from utils.media import to_float
from utils.rng import SampleRng

ANCESTRAL = Sampling(sampler="ddpm", clip=True)
"""As the release draws frames: estimates of the clean frame are kept in its range."""
UNCONDITIONAL = Condition(dropout=0.0)
UNTOLD = ("num_heads", "num_head_channels", "new_attention_order")
"""Settings that the tensors of a released checkpoint do not tell: a run that starts from one takes its own."""


class FrameSpace:
    """Single frames 3 h w of clips (`tasks.latent.LatentSpace`): the first one of each, of which the network is told nothing."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = (3, *size)

    def networks(self) -> dict[str, Network]:
        """None before the one that is trained."""
        return {}

    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """The first frames b 3 h w."""
        return to_float(batch["video"][:, :, 0]), {}

    def after(self, latents: Tensor) -> dict[str, Tensor] | None:
        """Nothing goes on after a frame here."""
        return None

    def starts(self, networks: Networks, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """None."""
        return {}

    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """They are pictures."""
        return latents

    def state(self) -> dict[str, int | float]:
        """Nothing is measured."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing is measured."""

    def card(self) -> dict[str, Any]:
        """There is no first stage."""
        return {}
