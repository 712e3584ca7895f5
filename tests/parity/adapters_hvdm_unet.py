"""Checks of HVDM's denoiser: outputs with and without the latent before, gradients, checkpoints."""

from typing import Any

import torch
from torch import Tensor

from models.official.hvdm_unet import PREFIX, ZEROS, export_unet, load
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from tests.parity.adapters_dit import same_exp
from tests.parity.case import Case, adapter
from tests.parity.normal_fill import case_weights

ABS = 1e-5 if same_exp() else 2e-5
NORMS, SMALLEST = 1e-3, 1e-3
"""Norms of gradients: relative, and absolute."""
FIELDS = {
    "in_channels": "in_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "use_scale_shift_norm": "use_scale_shift_norm",
    "resblock_updown": "resblock_updown",
    "conditional": "cond_model",
    "dropout": "dropout",
}
"""Ours -> the release's constructor."""


def unet_config(fields: Any) -> VolumeUNetConfig:
    """Config of the network that constructor fields of the release describe."""
    known = {ours: fields[theirs] for ours, theirs in FIELDS.items() if theirs in fields}
    known["channel_mult"] = tuple(known["channel_mult"])
    frames, *sides = fields["latent"]
    out = fields["out_channels"] if "out_channels" in fields else known["in_channels"]
    sizes = {"latent_frames": frames, "latent_res": tuple(sides)}
    return VolumeUNetConfig(out_channels=0 if out == known["in_channels"] else out, **sizes, **known)


def official_shapes(config: VolumeUNetConfig, places: list[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by the release's names, without the prefix."""
    with torch.device("meta"):
        official = export_unet(VolumeUNet(config).state_dict(), config, places)
    return {name.removeprefix(PREFIX): tuple(value.shape) for name, value in official.items() if not name.endswith(ZEROS)}


def case_unet(case: Case, fields: Any, network: str = "") -> VolumeUNet:
    """The network of a case. What its weights tell of its config must be what the fields say, and writing must give them back."""
    config, places = unet_config(fields), fields["attention_resolutions"]
    official = case_weights(case, official_shapes(config, places), network)
    names = ["latent_res", "latent_frames", "dropout"] + ["resblock_updown"] * (len(config.channel_mult) == 1)
    names += ["in_channels", "out_channels", "conditional"] * (ZEROS not in official)
    state, told = load(official, **{name: getattr(config, name) for name in names})
    assert told == config, f"the tensors say {told}, the case {config}"
    model = VolumeUNet(config)
    model.load_state_dict(state)
    back = {name.removeprefix(PREFIX): value for name, value in export_unet(model.state_dict(), config, places).items()}
    assert back.keys() | {ZEROS} == official.keys() | {ZEROS}
    assert all(torch.equal(back[name], value) for name, value in official.items() if name in back)
    return model.eval()


def volume(x: Tensor, model: VolumeUNet) -> Tensor:
    """The release's ... C (T H W) -> ... C T H W."""
    return x.unflatten(-1, model.config.latent_shape[1:])


def gradients(model: VolumeUNet, places: list[int]) -> dict[str, Tensor]:
    """Gradients by the release's names."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name.removeprefix(PREFIX): grad for name, grad in export_unet(grads, model.config, places).items()}


@adapter("hvdm", "unet3d")
def check_unet(case: Case) -> None:
    model = case_unet(case, case.fields)
    x, t = volume(case.input("x"), model), case.input("t")
    conditions = {"eps_cond": volume(case.input("cond"), model)} if case.has("in/cond") else {}
    for name, previous in (conditions | {"eps_nocond": None}).items():
        with torch.no_grad():
            case.expect(name, model(x, t, previous).flatten(2), 0.0, ABS)
    model(x, t, conditions.get("eps_cond")).square().sum().backward()
    case.expect_grad_norms(gradients(model, case.config("attention_resolutions")), rel=NORMS, abs=SMALLEST)
