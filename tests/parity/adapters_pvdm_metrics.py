"""Checks of what FVD is made of: resizing of clips, the I3D network, the Frechet distance."""

import torch
from einops import rearrange

from metrics.frechet import Moments, frechet_distance
from metrics.fvd import preprocess
from metrics.i3d import I3D
from tests.parity.case import Case, adapter
from tests.parity.hash_fill import fill_case

ABS = 2e-5
FLOAT32_ROOTS = 1e-4
"""Error of the release's float32 roots, of the sum of both variances."""


@adapter("pvdm", "frechet_distance")
def check_frechet(case: Case) -> None:
    sets = {name: Moments(case.config("dim")) for name in ("fake", "real")}
    for name, found in sets.items():
        features = case.input(name)
        assert len(features) == case.config(f"n_{name}")
        for part in features.split(7):
            found.update(part)
    distance = torch.tensor([frechet_distance(sets["fake"], sets["real"])])
    spread = sum(float(found.covariance().trace()) for found in sets.values())
    case.expect("fd_float64", distance, 1e-6, ABS)
    case.expect("fd", distance, 0, FLOAT32_ROOTS * spread)
    case.expect("mean_term", (sets["fake"].mean - sets["real"].mean).square().sum()[None], 1e-6)


@adapter("pvdm", "fvd_preprocess")
def check_preprocess(case: Case) -> None:
    video = rearrange(case.input("video"), "b t h w c -> b c t h w")
    case.expect("preprocessed", preprocess(video, case.config("target_resolution")), 0, ABS)


@adapter("pvdm", "i3d")
def check_i3d(case: Case) -> None:
    net = I3D(case.config("num_classes"))
    counters = [name for name in net.state_dict() if name.endswith("num_batches_tracked")]
    shapes = {name: value.shape for name, value in net.state_dict().items() if name not in counters}
    net.load_state_dict(fill_case(case, shapes) | {name: torch.tensor(0) for name in counters})
    video = rearrange(case.input("video"), "b t h w c -> b c t h w")
    with torch.no_grad():
        logits = net(preprocess(video, case.config("target_resolution")))
    case.expect("logits", logits, 0, 1e-3)  # a network of the release's size
