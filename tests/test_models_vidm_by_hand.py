"""VIDM's networks against the spec's formulas, in layouts and sizes of which no numbers were recorded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.official.vidm import PREFIX, export_content, export_motion
from tests import vidm_by_hand as by_hand
from tests.vidm_networks import content, motion, pictures, times

LAYOUTS: list[dict[str, Any]] = [
    {"resblock_updown": False},
    {"new_attention_order": True, "num_head_channels": 16},
    {"num_head_channels": -1, "num_heads": 4, "attention_resolutions": (1, 2)},
    {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (1, 4), "resblock_updown": False},
    {"channel_mult": (2, 1), "attention_resolutions": ()},
    {"channel_mult": (1,), "learn_sigma": False},
]


def scaled(module: torch.nn.Module) -> None:
    """Random weights with which features keep their size."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1) / 2, std=spread)


def bare(official: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in official.items()}


def check(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("changes", LAYOUTS)
def test_motion_by_hand(changes: dict[str, Any]) -> None:
    model = motion(flow_input="minus_one_one", **changes)
    scaled(model)
    (x, previous, first), (t, frame) = pictures(3, (12, 20)), times(3)
    state = bare(export_motion(model.state_dict(), model.config))
    check(model(x, t, frame, previous, first), by_hand.motion(state, model.config, x, t, frame, previous, first))


@torch.no_grad()
@pytest.mark.parametrize("changes", [*LAYOUTS, {"use_scale_shift_norm": False}])
def test_content_by_hand(changes: dict[str, Any]) -> None:
    model = content(image_size=(12, 20), **changes)
    scaled(model)
    x, (t, _) = pictures(3, (12, 20))[0], times(3)
    check(model(x, t), by_hand.content(bare(export_content(model.state_dict())), model.config, x, t))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 64), (40, 70), (20, 33), (96, 32)])
def test_flow_by_hand(size: tuple[int, int]) -> None:
    model = motion(flow_input="minus_one_one")
    scaled(model)
    ref, supp = pictures(2, size, kinds=2)
    state = by_hand.part(bare(export_motion(model.state_dict(), model.config)), "spynet.")
    check(model.flow(ref, supp), by_hand.flow(state, ref, supp))
