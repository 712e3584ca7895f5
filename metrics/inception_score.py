"""Inception score of videos (VIS): how sure a classifier is of each, and how much the answers differ between them (spec VIDM 11)."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

SPLITS = 10
SHUFFLE_SEED = 42
"""Published numbers (isv2048_ucf) shuffle the videos with it before they are split."""
_SUM_TOLERANCE = 1e-3


def is_distribution(outputs: Tensor) -> bool:
    """Whether rows (n, classes) are probabilities: not negative, and each adds up to one."""
    return bool((outputs >= 0).all() and ((outputs.double().sum(dim=1) - 1).abs() < _SUM_TOLERANCE).all())


def probabilities(outputs: Tensor) -> Tensor:
    """Rows (n, classes) of a classifier, logits or probabilities, as probabilities in float64."""
    rows = outputs.double()
    return rows / rows.sum(dim=1, keepdim=True) if is_distribution(rows) else rows.softmax(dim=1)


def inception_score(probs: Tensor, splits: int = SPLITS, shuffle_seed: int | None = None) -> tuple[float, float]:
    """Mean and population standard deviation over contiguous splits of exp(mean KL(p || mean p)), from rows (n, classes).

    Split i is of the rows from i n / splits on, so each row is in one split also where `splits` does not divide n. `shuffle_seed`: rows
    are shuffled first. ValueError for fewer rows than splits.
    """
    if splits < 1 or len(probs) < splits:
        raise ValueError(f"{len(probs)} videos: {splits} splits need at least one each")
    rows = probs.double().cpu()
    if shuffle_seed is not None:
        rows = rows[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(len(rows)))]
    bounds = [number * len(rows) // splits for number in range(splits + 1)]
    scores = torch.stack([_score(rows[start:end]) for start, end in pairwise(bounds)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(rows: Tensor) -> Tensor:
    """exp of the mean information about the video that an answer holds: H(mean p) - mean H(p)."""
    return (torch.special.entr(rows.mean(dim=0)).sum() - torch.special.entr(rows).sum(dim=1).mean()).exp()
