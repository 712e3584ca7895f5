"""Checks of HVDM's autoencoder: the wavelet transform, the network, its cross-attention."""

from typing import Any

import torch
from torch import Tensor, nn

from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.layers.planes import spread_planes
from models.layers.rotary import grid_tables, time_tables
from models.layers.timesformer import FusionLayer
from models.layers.wavelet import BANDS, haar3d, inverse_haar3d
from models.official.hvdm import RELEASE, autoencoder_config, export_autoencoder, fusion_names, import_autoencoder
from tests.parity.case import Case, adapter
from tests.parity.normal_fill import case_weights

ABSOLUTE = 1e-4
"""Outputs."""
GRADIENTS = {"rel": 1e-3, "abs": 1e-3}
"""Norms."""


@adapter("hvdm", "dwt3d")
def check_dwt3d(case: Case) -> None:
    assert case.config("wavelet") == "haar" and case.config("axes") == "t,h,w" and tuple(case.config("order")) == BANDS
    x = case.input("x").requires_grad_()
    bands = haar3d(x)
    for number, band in enumerate(BANDS):
        case.expect(band, bands[:, number], 0.0, 2e-6)
    weights = torch.arange(1.0, 9.0)
    (bands.square().flatten(2).sum(dim=(0, 2)) * weights).sum().backward()
    case.expect("grad_x", x.grad, 1e-6, 2e-5)
    if case.has(f"in/sub_{BANDS[0]}"):
        case.expect("idwt", inverse_haar3d(torch.stack([case.input(f"sub_{band}") for band in BANDS], dim=1)), 0.0, 2e-6)


@adapter("hvdm", "autoencoder")
def check_autoencoder(case: Case) -> None:
    model = case_autoencoder(case, case.fields)
    video = case.input("video")
    tokens = model.tokens(video)
    case.expect("encoder_tokens", _clip_major(tokens), 0.0, ABSOLUTE)
    planes = model.project(tokens)
    for name, plane in zip(("hw", "tw", "th"), planes, strict=True):
        case.expect(f"plane_{name}", plane.permute(0, 3, 1, 2), 0.0, ABSOLUTE)
    low, high = model.frequencies(video)
    for name, features in (("z_low", low), ("z_high", high)):
        case.expect(name, features.permute(1, 3, 0, 2).unflatten(3, model.config.grid), 0.0, ABSOLUTE)
    case.expect("fused_tokens", _clip_major(model.fuse(spread_planes(*planes), low, high)), 0.0, ABSOLUTE)
    latent = model.encode(video)
    case.expect("latent", latent.flatten(2), 0.0, ABSOLUTE)
    recon = model(video)
    case.expect("recon", _frames(recon), 0.0, ABSOLUTE)
    assert torch.equal(model.decode(latent), recon), "a latent must decode to the reconstruction, bit for bit"
    if case.has("in/latent"):
        given = case.input("latent").unflatten(2, model.config.latent_shape[1:])
        case.expect("decoded", _frames(model.decode(given)), 0.0, ABSOLUTE)
    assert case.loss in ("", "sum(recon**2) for grad_norm"), case.loss
    recon.square().sum().backward()
    case.expect_grad_norms(export_autoencoder(_gradients(model), model.config), **GRADIENTS)


def case_autoencoder(case: Case, fields: Any, network: str = "") -> HVDMAutoencoder:
    """The network of a case. What its weights tell of its config must be what the fields say, and writing must give them back."""
    model = HVDMAutoencoder(_config(fields)).eval()
    _load(model, case, network)
    return model


def _config(fields: Any) -> HVDMAEConfig:
    names = {"head_dim": "dim_head", "n_frames": "frames", "patch_size": "patch", "plane_mlp_dim": "q_mlp"}
    names |= {"plane_depth": "q_depth", "plane_heads": "q_heads", "plane_head_dim": "q_dim_head"}
    names |= {name: name for name in ("dim", "embed_dim", "channels", "depth", "fusion_depth", "heads")}
    known = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    size = (fields["height"], fields["width"])
    return HVDMAEConfig(image_size=size, freq_widths=tuple(fields.get("freq_widths", (64, 192, 384, 768))), **known, **RELEASE)


def _load(model: HVDMAutoencoder, case: Case, network: str) -> None:
    config = model.config
    fresh = export_autoencoder(model.state_dict(), config)
    saved = case.state()
    tables = {name for name in fresh if "rot_emb" in name or name == "coords"}
    official = case_weights(case, {name: value.shape for name, value in fresh.items() if name not in tables}, network) | saved
    model.load_state_dict(import_autoencoder(official))
    back = export_autoencoder(model.state_dict(), config)
    assert back.keys() == (official | {name: fresh[name] for name in tables}).keys()
    exact = back.keys() & official.keys() - tables
    assert all(torch.equal(back[name], official[name]) for name in exact)
    assert all(torch.allclose(back[name], saved[name], atol=1e-6, rtol=1e-6) for name in tables & saved.keys() - {"coords"})
    told = autoencoder_config(official, config.image_size, plane_heads=config.plane_heads, head_dim=config.head_dim)
    assert told.wavelet_time == "tile" and told.freq_widths == config.freq_widths and told.heads == config.heads


@adapter("hvdm", "feature_fusion")
def check_feature_fusion(case: Case) -> None:
    dim, heads, width = (case.config(name) for name in ("dim", "heads", "dim_head"))
    frames, grid = case.config("frames"), (case.config("h"), case.config("w"))
    depth = case.config("depth")
    layers = nn.ModuleList(FusionLayer(dim, heads, width, "tile") for _ in range(depth))
    names = fusion_names(depth, "", "layers")
    ours = nn.ModuleDict({"layers": layers})
    weights = case_weights(case, {theirs: ours.get_parameter(name).shape for theirs, name in names.items()})
    ours.load_state_dict({name: weights[theirs] for theirs, name in names.items()})
    cpu = torch.device("cpu")
    ropes = time_tables(frames, width, cpu, "halves"), grid_tables(*grid, width, cpu)
    inputs = {name: case.input(name).requires_grad_() for name in ("x", "low", "high")}
    assert len(inputs["x"]) == case.config("batch")
    x, low, high = (value.flatten(3).permute(2, 0, 3, 1) for value in inputs.values())
    for layer in layers:
        x = layer(x, low, high, *ropes)
    tokens = _clip_major(x)
    case.expect("tokens", tokens, 0.0, ABSOLUTE)
    assert case.loss in ("", "sum(tokens**2)"), case.loss
    tokens.square().sum().backward()
    for name, value in inputs.items():
        case.expect(f"grad_{name}", value.grad, 1e-4, ABSOLUTE)
    gradients = _gradients(ours)
    case.expect_grad_norms({theirs: gradients[name] for theirs, name in names.items()}, **GRADIENTS)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def _clip_major(tokens: Tensor) -> Tensor:
    """(t, b, h w, c) -> b (t h w) c."""
    return tokens.transpose(0, 1).flatten(1, 2)


def _frames(video: Tensor) -> Tensor:
    """b c t h w -> (b t) c h w."""
    return video.transpose(1, 2).flatten(0, 1)
