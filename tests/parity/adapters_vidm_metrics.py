"""Checks of VIDM's evaluation: the Frechet distance of features, and the inception score of class probabilities."""

import torch

from metrics.frechet import Moments, frechet_distance
from metrics.inception_score import inception_score
from tests.parity.case import Case, adapter


@adapter("vidm", "Frechet distance on features")
def check_distance(case: Case) -> None:
    sets = {name: Moments(case.config("dim")) for name in ("fake", "real")}
    for name, found in sets.items():
        features = case.input(f"feats_{name}")
        assert len(features) == case.config(f"n_{name}")
        for part in features.split(7):
            found.update(part)
    case.expect(
        "fvd", torch.tensor(frechet_distance(sets["fake"], sets["real"]), dtype=torch.float64), 1e-6
    )  # the recorded root loses digits where a set has fewer videos than features


@adapter("vidm", "video inception score on class probabilities")
def check_score(case: Case) -> None:
    mean, std = inception_score(case.input("probs"), case.config("num_splits"))
    case.expect("mean", torch.tensor(mean, dtype=torch.float64), 1e-9)
    case.expect("std", torch.tensor(std, dtype=torch.float64), 1e-9)
