"""What the latent spaces of all systems share: the tie to one autoencoder, and the numbers that normalise."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.env import Env
from utils.errors import ConfigError, UserError

Found = TypeVar("Found")

_DIGITS = 12
"""Of a hash, as messages show it: 48 bits, which a checkpoint's numbers hold exactly."""


class TiedLatents:
    """Latents of one autoencoder, trained on as (latent - shift) * scale."""

    def __init__(self, autoencoder: Mapping[str, Any], scale: float, shift: float) -> None:
        self.autoencoder = dict(autoencoder)
        """What identifies it: sha256, weights, path, and what else a system says."""
        self.scale = scale
        self.shift = shift

    def state(self) -> dict[str, int | float]:
        """Scale and shift, which a run keeps as it began, and the first digits of its autoencoder's hash."""
        return {"latent_scale": self.scale, "latent_shift": self.shift, "autoencoder": self._fingerprint}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave. UserError when that was of another autoencoder."""
        began = state.get("autoencoder", self._fingerprint)
        if began != self._fingerprint:
            then, now = (f"{number:0{_DIGITS}x}..." for number in (began, self._fingerprint))
            raise UserError(
                f"the run began with other weights of the autoencoder ({then}) than those of {self.autoencoder.get('path')} now ({now}): "
                "give it those, or start anew with --resume none"
            )
        self.scale, self.shift = float(state["latent_scale"]), float(state["latent_shift"])

    @property
    def _fingerprint(self) -> int:
        """The first digits of the autoencoder's hash as a number; 0 where it is not known."""
        return int((self.autoencoder.get("sha256") or "0")[:_DIGITS], 16)

    def card(self) -> dict[str, Any]:
        """Autoencoder and normalisation, for an export's card."""
        return {"ae": self.autoencoder, "latent": {"scale": self.scale, "shift": self.shift}}


def check_same_autoencoder(location: str, made_by: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ConfigError when the latents of a set are not those of the autoencoder that is given."""
    where = f"--data-path {location}"
    theirs, ours = str(made_by.get("sha256")), str(given["sha256"])
    if theirs == ours:
        return
    if _run(made_by) == _run(given):
        raise ConfigError(
            f"{where} is stale: {given['path']} has other weights now ({ours[:_DIGITS]}...) than its latents were made with "
            f"({theirs[:_DIGITS]}...): run preprocess.py latents again"
        )
    raise ConfigError(
        f"{where} holds latents of the autoencoder {made_by.get('path')} ({theirs[:_DIGITS]}..., {made_by.get('weights')} weights), "
        f"not of {given['path']} ({ours[:_DIGITS]}..., {given['weights']} weights): "
        "give that one, or run preprocess.py latents with this one"
    )


def _run(autoencoder: Mapping[str, Any]) -> tuple[str, Any]:
    """Where an autoencoder lies (a run's folder and its export/ are one place), and which of its weights are meant."""
    return str(autoencoder.get("path")).removesuffix("/export"), autoencoder.get("weights")


def on_main(env: Env, measure: Callable[[], Found]) -> Found:
    """What the main process measures, on every rank. A UserError of it is raised on every rank, so that none waits for the others."""
    found: list[Any] = [None]
    if env.is_main:
        try:
            found = [measure()]
        except UserError as error:
            found = [error]
    if env.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if isinstance(found[0], UserError):
        raise found[0]
    result: Found = found[0]
    return result


def unit_variance(mean: float, square: float) -> tuple[float, float]:
    """(scale, shift) of latents with this mean and mean square. Raises ConfigError where they do not vary."""
    deviation = max(0.0, square - mean**2) ** 0.5
    if not deviation > 0:
        raise ConfigError("the autoencoder gives latents without any variance: train it, or give --latent-scale 1")
    return 1 / deviation, mean
