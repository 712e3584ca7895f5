"""Checks of VIDM's networks and their parts: outputs, gradients, checkpoints there and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.spynet import SpyNet
from models.official.unets import export_state, import_state
from models.official.vidm import EXPORT, IMPORT, PREFIX, export_content, export_motion, load_content, load_motion
from models.unets.adm import AttentionBlock, Resample
from models.unets.positional import Place, PosGN, PosResBlock
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import FrameEncoder, MotionMaps, MotionUNet, MotionUNetConfig, PosUNet
from tests.parity.adapters_dit import pair, tolerance
from tests.parity.case import Case, adapter

FORWARD = 1e-5
DATA = Path(__file__).parent / "data"
NORMS, SMALLEST = 1e-3, 1e-5
"""Norms of gradients: relative, and absolute over the largest of the case."""
SIZES = ("model_channels", "num_res_blocks", "num_heads", "num_head_channels", "resblock_updown", "diffusion_timesteps", "video_timesteps")
CONTENT = ("in_channels", "use_scale_shift_norm", "dropout")
IGNORED = (
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_scale_shift_norm",
    "dims",
    "conv_resample",
    "pool",
    "num_heads_upsample",
    "num_classes",
)
"""Constructor fields that the release's motion networks pay no heed to, or that have one value only."""


def settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ours that constructor fields of the release tell, of either network, but for channels in and out."""
    known = {name: fields[name] for name in SIZES if name in fields}
    known |= {name: tuple(fields[name]) for name in ("channel_mult", "attention_resolutions") if name in fields}
    if "image_size" in fields:
        known["image_size"] = pair(fields["image_size"])
    known["new_attention_order"] = fields.get("use_new_attention_order", fields.get("new_attention_order", False))
    known = {"num_head_channels": -1, "num_heads": 1} | known  # the constructors' defaults
    read_ignored(fields)
    return known


def read_ignored(fields: Mapping[str, Any]) -> None:
    for name in IGNORED:
        fields.get(name)


def motion_config(fields: Mapping[str, Any]) -> MotionUNetConfig:
    """Config of the motion network that constructor fields of the release describe."""
    out = fields.get("out_channels", 6)
    return MotionUNetConfig(**settings(fields), learn_sigma=out == 6, flow_input="minus_one_one")


def load_part(module: nn.Module, official: Mapping[str, Tensor]) -> None:
    """A part's weights under the release's names, which writing must give back."""
    state = import_state({name: value.float() for name, value in official.items()}, IMPORT)
    module.load_state_dict(state)
    back = export_state(module.state_dict(), EXPORT)
    assert back.keys() == official.keys() and all(torch.equal(back[name], value) for name, value in official.items())


def expect_norms(case: Case, module: nn.Module, loss: Tensor) -> None:
    """Gradients of a loss, by the release's names."""
    loss.backward()
    grads = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in module.named_parameters()}
    largest = max(float(case.tensor(name)) for name in case.names("grad_norm/"))
    case.expect_grad_norms(export_state(grads, EXPORT), rel=NORMS, abs=SMALLEST * largest)


def place(case: Case) -> Place:
    return Place(case.input("dt"), case.input("vt"))


@adapter("vidm", "positional group normalisation (CoordinatesEMB)")
def check_posgn(case: Case) -> None:
    module = PosGN(case.config("hidden_size"), case.config("diffusion_timesteps"), case.config("video_timesteps"))
    load_part(module, case.state())
    where, x = place(case), case.input("x")
    size = (x.shape[2], x.shape[3])
    maps = module.maps(where, size)
    case.expect("coords_t_f_y_x", module.coordinates(where, size), FORWARD)
    case.expect("scale_shift_nhw2c", torch.cat(maps, dim=1).permute(0, 2, 3, 1), FORWARD)
    y = module(x, where)
    assert torch.equal(module(x, maps), y)
    case.expect("y", y, FORWARD)
    expect_norms(case, module, y.square().sum())


@adapter("vidm", "motion residual block (cunet.ResBlock)")
def check_resblock(case: Case) -> None:
    kind: Resample = "down" if case.config("down", False) else "up" if case.config("up", False) else ""
    channels, times = case.config("channels"), (case.config("diffusion_timesteps"), case.config("video_timesteps"))
    module = PosResBlock(channels, case.config("out_channels", channels), *times, kind)
    read_ignored(case.fields)
    load_part(module, case.state())
    y = module(case.input("x"), place(case))
    case.expect("y", y, FORWARD)
    expect_norms(case, module, y.square().sum())


@adapter("vidm", "attention block")
def check_attention(case: Case) -> None:
    channels, each = case.config("channels"), case.config("num_head_channels", -1)
    heads = case.config("num_heads", 1) if each == -1 else channels // each
    case.config("num_heads", 1)
    read_ignored(case.fields)
    module = AttentionBlock(channels, heads, case.config("use_new_attention_order", case.config("new_attention_order", False)))
    load_part(module, case.state())
    y = module(case.input("x"))
    case.expect("y", y, FORWARD)
    expect_norms(case, module, y.square().sum())


@adapter("vidm", "first-frame encoder (EncoderUNetModel)")
def check_encoder(case: Case) -> None:
    config = motion_config(case.fields)
    assert config.in_channels == case.config("in_channels")
    module = FrameEncoder(config)
    load_part(module, case.state())
    features = module(case.input("x"), [place(case)] * len(module.input_blocks))
    pooled = [feature.mean(dim=(2, 3)) for feature in features]
    for number, (feature, mean) in enumerate(zip(features, pooled, strict=True)):
        case.expect(f"feat_{number:02d}", feature, FORWARD)
        case.expect(f"pooled_{number:02d}", mean, FORWARD)
    expect_norms(case, module, torch.stack([mean.square().sum() for mean in pooled]).sum())


@adapter("vidm", "motion UNet (cunet.UNetModel) called alone")
def check_unet(case: Case) -> None:
    module = PosUNet(motion_config(case.fields), case.config("in_channels"))
    load_part(module, case.state())
    y = module(case.input("x"), [place(case)] * len(module.stages))
    case.expect("y", y, FORWARD)
    expect_norms(case, module, y.square().sum())


@adapter("vidm", "optical flow network (SPyNet of mmediting 0.16)")
def check_spynet(case: Case) -> None:
    module = SpyNet(case.config("levels", 6), "minus_one_one")
    load_part(module, case.state())
    flow = module(case.input("ref"), case.input("supp"))
    case.expect("flow", flow, FORWARD)
    expect_norms(case, module, flow.square().sum())


def named_case(case: Case, name: str) -> Case:
    """The case of which another takes weights: a file beside it, or one of ours."""
    beside = case.path.with_name(f"{name}.safetensors")
    return Case(beside if beside.is_file() else DATA / beside.name)


def case_motion(case: Case, fields: Mapping[str, Any], official: dict[str, Tensor]) -> MotionUNet:
    """The motion network of constructor fields; the flow network's weights are in the file that these name."""
    other = named_case(case, fields["spynet_state_from"])
    official = official | {f"spynet.{name}": value for name, value in other.state().items()}
    config = motion_config(fields)
    names = ("num_heads", "num_head_channels", "new_attention_order", "video_timesteps", "diffusion_timesteps", "image_size")
    if len(config.channel_mult) == 1:
        names += ("resblock_updown",)  # a network of one level has nothing to halve
    known = {name: getattr(config, name) for name in (*names, "model_channels", "channel_mult", "attention_resolutions")}
    state, told = load_motion({"ema_state_dict": {PREFIX + name: value for name, value in official.items()}}, **known)
    assert told == config, f"the tensors say {told}, the case {config}"
    assert told.in_channels == fields.get("in_channels", 3)
    model = MotionUNet(config)
    model.load_state_dict(state)
    back = {name.removeprefix(PREFIX): value for name, value in export_motion(model.state_dict(), config).items()}
    assert back.keys() - {"spynet.mean", "spynet.std"} == official.keys()
    assert all(torch.equal(back[name], value) for name, value in official.items())
    return model.eval()


@adapter("vidm", "motion generator (ComplexUModel): implicit motion condition + adaptive feature residual")
def check_motion(case: Case) -> None:
    model = case_motion(case, case.fields, case.state())
    where = place(case)
    x, first, previous = (case.input(name) for name in ("x", "x_first", "x_prev"))
    y = model(x, *where, previous, first)
    case.expect("y", y, FORWARD)
    with torch.no_grad():
        check_parts(case, model, where, (x, first, previous), y)
    expect_norms(case, model, y.square().sum())


def check_parts(case: Case, model: MotionUNet, where: Place, pictures: tuple[Tensor, Tensor, Tensor], y: Tensor) -> None:
    """The parts that sampling calls, one by one: the same numbers as the whole gives."""
    x, first, previous = pictures
    maps: MotionMaps = model.maps(*where, (x.shape[2], x.shape[3]))
    flow, features = model.flow(first, previous), model.encode(first, maps)
    case.expect("flow", flow, FORWARD)
    assert torch.equal(model.denoise(x, flow, maps, features), y)
    for number, skip in enumerate(model.unet.descend(torch.cat([x, flow], dim=1), maps.unet[: len(features)], features)):
        case.expect(f"skip_{number:02d}", skip, FORWARD)


def case_content(fields: Mapping[str, Any], official: dict[str, Tensor]) -> ContentUNet:
    """The content network of constructor fields. What its weights tell of its config must be what the fields say."""
    known = settings(fields) | {name: fields[name] for name in CONTENT if name in fields}
    known["num_classes"] = fields.get("num_classes") or 0
    config = ContentUNetConfig(**known, learn_sigma=fields.get("out_channels", 6) == 2 * fields.get("in_channels", 3))
    names = ("num_heads", "num_head_channels", "new_attention_order", "dropout", "attention_resolutions")
    if len(config.channel_mult) == 1:
        names += ("resblock_updown",)
    state, told = load_content({"ema_state_dict": official}, **{name: getattr(config, name) for name in names})
    assert told == config, f"the tensors say {told}, the case {config}"
    model = ContentUNet(config)
    model.load_state_dict(state)
    back = {name.removeprefix(PREFIX): value for name, value in export_content(model.state_dict()).items()}
    assert back.keys() == official.keys() and all(torch.equal(back[name], value) for name, value in official.items())
    return model.eval()


@adapter(
    "vidm",
    "content (first-frame) generator (ConstantUModel of the first public commit): sampling space truncation by a learned constant input",
)
def check_content(case: Case) -> None:
    model = case_content(case.fields, case.state())
    y = model(case.input("x"), case.input("dt"), case.input("y") if case.has("in/y") else None)
    case.expect("y", y, tolerance())
    expect_norms(case, model, y.square().sum())
