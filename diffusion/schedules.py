"""Noise schedules, respacing and the tables derived from them, all in float64 (spec: diffusion sections 1-3).

T steps, index i = 0..T-1 (0 = least noise); b_i beta, A_i = prod_{j<=i} (1 - b_j).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

NAMED = ("linear", "squaredcos_cap_v2", "quad")
EXPLICIT = ("warmup10", "warmup50", "const", "jsd")
"""Schedules of the older interface; the warm-ups need the first and the last beta."""

QUAD_ENDS = (0.0015, 0.0195)
"""First and last beta of quad, where none are given (spec: PVDM section 4)."""

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


def beta_schedule(name: str, steps: int, first: float | None = None, last: float | None = None) -> np.ndarray:
    """Betas of a schedule, (steps,) float64 in (0, 1].

    `first` and `last` are the ends of the warm-ups, `last` the value of const; linear and quad take them in place of their own ends.
    quad is a straight line in sqrt(beta).
    ValueError for an unknown name or a missing end.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    if name == "linear":
        scale = 1000 / steps
        return check_betas(np.linspace(scale * 1e-4 if first is None else first, scale * 2e-2 if last is None else last, steps))
    if name == "quad":
        first, last = (own if given is None else given for given, own in zip((first, last), QUAD_ENDS, strict=True))
        return check_betas(np.linspace(first**0.5, last**0.5, steps) ** 2)
    if name == "squaredcos_cap_v2":
        return check_betas(_cosine(steps))
    if name == "jsd":
        return check_betas(1.0 / np.linspace(steps, 1, steps))
    if name not in EXPLICIT:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(NAMED + EXPLICIT)}")
    if name == "const" and last is not None:
        return check_betas(np.full(steps, last, dtype=np.float64))
    if first is None or last is None:
        raise ValueError(f"noise schedule {name} needs its first and last beta")
    warmup = int(steps * (0.1 if name == "warmup10" else 0.5))
    betas = np.full(steps, last, dtype=np.float64)
    betas[:warmup] = np.linspace(first, last, warmup)
    return check_betas(betas)


def _cosine(steps: int) -> np.ndarray:
    def level(u: float) -> float:
        return math.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    return np.array([min(1 - level((i + 1) / steps) / level(i / steps), MAX_BETA) for i in range(steps)])


def check_betas(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """The betas as a float64 vector. ValueError unless all are in (0, 1]."""
    array = np.asarray(betas, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not ((array > 0) & (array <= 1)).all():
        raise ValueError("betas must be a non-empty list of numbers in (0, 1]")
    return array


def space_timesteps(steps: int, spec: str | Sequence[int]) -> list[int]:
    """Original indices that a respaced process keeps, ascending.

    `spec`: "" for all; "ddimN" for N indices at one stride from 0; "trailingN" for N at one stride that ends in the last index;
    "50" or "10,15,20" (or a list) for counts in equal sections of the range. ValueError if it cannot be done.
    """
    if isinstance(spec, str):
        if not spec:
            return list(range(steps))
        if spec.startswith("ddim"):
            return _strided(steps, _count(spec.removeprefix("ddim"), spec))
        if spec.startswith("trailing"):
            return _trailing(steps, _count(spec.removeprefix("trailing"), spec))
        spec = _counts(spec, spec)
    return _sections(steps, list(spec))


def _counts(text: str, spec: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'respacing {spec!r} is none of "", "50", "10,15,20", "ddim50", "trailing50"') from None


def _count(text: str, spec: str) -> int:
    count, *more = _counts(text, spec)
    if more:
        raise ValueError(f"respacing {spec!r}: one stride has one count")
    return count


def _strided(steps: int, wanted: int) -> list[int]:
    for stride in range(1, steps + 1):
        kept = range(0, steps, stride)
        if len(kept) == wanted:
            return list(kept)
    raise ValueError(f"respacing ddim{wanted}: no integer stride takes exactly {wanted} of {steps} steps")


def _trailing(steps: int, wanted: int) -> list[int]:
    """Multiples of steps/wanted, less 1 and rounded down, so that sampling starts at the noisiest index (spec: PVDM section 4)."""
    if not 1 <= wanted <= steps:
        raise ValueError(f"respacing trailing{wanted}: 1 to {steps} of {steps} steps can be taken")
    # In float32, as published: where an index is a whole number its last bit decides, and for a few counts another precision differs.
    return torch.linspace(-1, steps - 1, wanted + 1)[1:].int().tolist()


def _sections(steps: int, counts: list[int]) -> list[int]:
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"respacing {counts}: counts must be positive")
    size, longer = divmod(steps, len(counts))
    start, kept = 0, set()
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"respacing {counts}: {count} steps do not fit in section {section} of {length} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # accumulated, not multiplied: the published indices carry the rounding of the sum
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return sorted(kept)


def respace_betas(betas: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Betas of the process that visits only the `kept` indices (ascending) and has the same A there."""
    cumulative = np.cumprod(1.0 - betas)[list(kept)]
    previous = np.append(1.0, cumulative[:-1])
    return 1 - cumulative / previous


def tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Everything the process looks up by index, each (T,) float64, under the names of the literature's code.

    If the last beta is 1 the reciprocal tables end in infinity.
    """
    alphas = 1.0 - betas
    cumulative = np.cumprod(alphas, axis=0)
    previous = np.append(1.0, cumulative[:-1])
    variance = betas * (1.0 - previous) / (1.0 - cumulative)
    single = len(betas) == 1
    with np.errstate(divide="ignore"):
        reciprocal, reciprocal_m1 = np.sqrt(1.0 / cumulative), np.sqrt(1.0 / cumulative - 1)
    # Index 0 has no posterior variance (x_0 is certain): the next one stands in for it, or beta where there is no next. Other published
    # code has log(1e-20) there, which differs nowhere: no sampler adds noise at index 0, and no loss without a bound reads it.
    clipped = betas if single else np.append(variance[1], variance[1:])
    fixed_large = betas if single else np.append(variance[1], betas[1:])
    with np.errstate(divide="ignore"):
        bound = betas**2 / (2 * clipped * alphas * (1.0 - cumulative))
    bound = bound if single else np.append(bound[1], bound[1:])
    return {
        "betas": betas,
        "log_betas": np.log(betas),
        "alphas_cumprod": cumulative,
        "alphas_cumprod_prev": previous,
        "alphas_cumprod_next": np.append(cumulative[1:], 0.0),
        "one_minus_alphas_cumprod": 1.0 - cumulative,
        "snr": cumulative / (1.0 - cumulative),
        "sqrt_alphas_cumprod": np.sqrt(cumulative),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumulative),
        "log_one_minus_alphas_cumprod": np.log(1.0 - cumulative),
        "sqrt_recip_alphas_cumprod": reciprocal,
        "sqrt_recipm1_alphas_cumprod": reciprocal_m1,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(clipped),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumulative),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - cumulative),
        "fixed_large_variance": fixed_large,
        "fixed_large_log_variance": np.log(fixed_large),
        "lvlb_weights": bound,  # of eps' squared error in the variational bound (nats, fixed_small); index 0 is a copy of the next
    }
