"""Checks of PVDM's denoiser: outputs with and without the previous clip's latent, gradients, checkpoints."""

import copy
from typing import Any

import torch
from torch import Tensor

from models.official.pvdm_unet import export_unet, load
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from tests.parity.adapters_dit import pair, same_exp
from tests.parity.case import Case, adapter
from tests.parity.hash_fill import fill_case, hashed_input

FULL = 1e-3
"""Outputs of the release-size network."""
GRADIENTS = 1e-3
"""Norms, relative."""
FIELDS = {
    "in_channels": "in_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attention_resolutions",
    "num_heads": "num_heads",
    "head_channels": "num_head_channels",
    "use_scale_shift_norm": "use_scale_shift_norm",
    "resblock_updown": "resblock_updown",
    "conditional": "cond_model",
    "latent_frames": "latent_t",
    "dropout": "dropout",
}
"""Ours -> the release's constructor."""


def unet_config(fields: Any) -> PlaneUNetConfig:
    """Config of the network that constructor fields of the release describe."""
    known = {ours: fields[theirs] for ours, theirs in FIELDS.items() if theirs in fields}
    known |= {name: tuple(known[name]) for name in ("channel_mult", "attention_resolutions")}
    known["head_channels"] = max(0, known.get("head_channels", 0))  # -1: by num_heads, which may be -1 where this is given
    if known["head_channels"] and known.get("num_heads", 1) < 1:
        del known["num_heads"]
    out, size = fields["out_channels"], pair(fields["latent_res"])
    if "image_size" in fields:
        assert pair(fields["image_size"]) == size
    return PlaneUNetConfig(latent_res=size, out_channels=0 if out == known["in_channels"] else out, **known)


def loaded_unet(official: dict[str, Tensor], expected: PlaneUNetConfig) -> PlaneUNet:
    """The network with official weights. What these tell of its config must be `expected`, and writing gives them back."""
    names = ("num_heads", "head_channels", "latent_res", "latent_frames", "dropout")
    if len(expected.channel_mult) == 1:
        names += ("resblock_updown",)  # a network of one level has nothing to halve
    untold = {name: getattr(expected, name) for name in names}
    state, config = load(official, **untold)
    levels = {2**level for level in range(len(config.channel_mult))}
    assert set(config.attention_resolutions) == levels & set(expected.attention_resolutions)
    told = PlaneUNetConfig(**vars(config) | {"attention_resolutions": expected.attention_resolutions})
    assert told == expected, f"the tensors say {config}, the case {expected}"
    model = PlaneUNet(config)
    model.load_state_dict(state)
    back = export_unet(model.state_dict(), config)
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in back)
    return model.eval()


def tolerance(model: PlaneUNet, out: Tensor, *inputs: Tensor | None) -> float:
    """2e-5, the spec's (twice that where this CPU's exp is another than the recording one's), and what float32 costs the network itself.

    The lowest planes may be a few positions, of which a group norm sees three or four numbers: rounding then grows to 4e-5.
    """
    exact = copy.deepcopy(model).double()(
        *(value.double() if value is not None and value.is_floating_point() else value for value in inputs)
    )
    return (2e-5 if same_exp() else 4e-5) + float((out - exact).abs().max())


@adapter("pvdm", "unet")
def check_unet(case: Case) -> None:
    config = unet_config(case.fields)
    if case.config("fill", ""):
        check_filled(case, config)
        return
    model = loaded_unet(case.state(), config)
    x, t = case.input("x"), case.input("t")
    assert len(x) == case.config("batch", len(x))
    conditions = {"cond": case.input("cond"), "nocond": None} if config.conditional else {"nocond": None}
    for name, previous in conditions.items():
        with torch.no_grad():
            out = model(x, t, previous)
            case.expect(name, out, 0.0, tolerance(model, out, x, t, previous))
    first = next(iter(conditions.values()))
    model(x, t, first).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    case.expect_grad_norms(export_unet(grads, config), rel=GRADIENTS, abs=1e-6 * max(float(grad.norm()) for grad in grads.values()))


@torch.no_grad()
def check_filled(case: Case, config: PlaneUNetConfig) -> None:
    """A network of the release's size, whose weights follow a rule."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in export_unet(PlaneUNet(config).state_dict(), config).items()}
    buffers = {name: torch.zeros(shapes.pop(name)) for name in list(shapes) if name.endswith(".zeros")}
    official = fill_case(case, shapes)
    model = loaded_unet(official | buffers, config)
    del official
    shape = case.config("input_x_shape")
    x = hashed_input(shape, case.config("input_x_k"), case.config("input_x_scale"))
    cond = hashed_input(shape, case.config("input_cond_k"), case.config("input_cond_scale")) if config.conditional else None
    t = case.input("t")
    case.expect("cond", model(x, t, cond), 0.0, FULL)
    case.expect("nocond", model(x, t), 0.0, FULL)
