"""How the values of latent sets are spread: what each set says, and all of them together."""

import math

import numpy as np

from datasets.mixture import Collection

_NAMES = ("mean", "std", "scale", "shift")


def pooled_statistics(shards: Collection) -> dict[str, float]:
    """Mean and std of the latents of all frames, and the scale and shift to train with; empty where the sets do not say.

    Sets that agree are taken at their word. Others are put together by their numbers of frames; not those for which a scale was given
    that is none of their own: nobody knows then which one is meant.
    """
    told = [_told(item.meta.get("latent")) for item in shards.sets]
    if not all(told):
        return {}
    if all(one == told[0] for one in told):
        return told[0]
    if any(one["shift"] != one["mean"] for one in told):
        return {}
    frames = np.array([item.frames.sum() for item in shards.sets], dtype=np.float64)
    means, stds = (np.array([one[name] for one in told], dtype=np.float64) for name in ("mean", "std"))
    mean = float((frames * means).sum() / frames.sum())
    variance = float((frames * (stds**2 + (means - mean) ** 2)).sum() / frames.sum())
    std = math.sqrt(variance)
    return {"mean": mean, "std": std, "scale": 1 / std if std else 1.0, "shift": mean}


def _told(latent: object) -> dict[str, float]:
    """What index.json says, {} where it does not say all; the shift is the mean unless it says another."""
    if not isinstance(latent, dict):
        return {}
    numbers = {name: float(value) for name, value in latent.items() if name in _NAMES and isinstance(value, int | float)}
    found = {"shift": numbers.get("mean", math.nan)} | numbers
    return found if len(found) == len(_NAMES) and all(map(math.isfinite, found.values())) else {}
