"""Checks of PVDM: the autoencoder, its rotary tables, LPIPS."""

import torch
from torch import Tensor

from losses.perceptual import lpips_distance
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.layers.rotary import Tables, grid_scales, grid_tables, rotate, time_rates, time_tables
from models.official.criterion import VGG_CONVOLUTIONS, import_criterion
from models.official.pvdm import autoencoder_config, export_autoencoder, import_autoencoder
from tests.parity.case import Case, adapter
from tests.parity.hash_fill import fill_case, hashed_input

ABSOLUTE = 2e-5
"""Outputs; tensors are of the order of 1."""
FULL = 1e-3
"""Outputs of release-size networks."""
GRADIENTS = 1e-3
"""Norms, relative."""
CPU = torch.device("cpu")
VGG = [f"slice{stage}.{place}" for stage, places in VGG_CONVOLUTIONS.items() for place in places]
"""The trunk's convolutions as the release calls them."""


# ---- autoencoder


def _config(case: Case) -> PVDMAEConfig:
    names = {"dim": "channels", "n_frames": "timesteps", "plane_depth": "quant_depth", "plane_heads": "quant_heads"}
    names |= {"plane_head_dim": "quant_dim_head", "plane_mlp_dim": "quant_mlp", "head_dim": "dim_head", "patch_size": "patch_size"}
    names |= {name: name for name in ("embed_dim", "splits", "depth", "heads")}
    fields = {ours: case.config(theirs) for ours, theirs in names.items() if theirs in case.fields}
    size = case.config("resolution")
    config = PVDMAEConfig(image_size=(size, size) if isinstance(size, int) else tuple(size), **fields)
    assert case.config("down", None) in (None, config.patch_size.bit_length() - 1), "the latent's stride is the patch"
    return config


@adapter("pvdm", "autoencoder")
def check_autoencoder(case: Case) -> None:
    config = _config(case)
    model = PVDMAutoencoder(config).eval()
    if case.config("fill", ""):
        _check_filled(case, model)
        return
    _load(model, case.state())
    video = case.input("video")
    assert len(video) == case.config("batch", len(video))
    tokens = model.tokens(video)
    case.expect("encoder", tokens.permute(1, 0, 2, 3).flatten(1, 2), 0.0, ABSOLUTE)
    z = model.encode(video)
    case.expect("extract", z, 0.0, ABSOLUTE)
    case.expect("encode", model.features(z).permute(1, 3, 0, 2).unflatten(3, config.grid), 0.0, ABSOLUTE)
    recon = model(video)
    case.expect("forward", _frames(recon), 0.0, ABSOLUTE)
    assert torch.equal(_frames(model.decode(z)), _frames(recon)), "a latent must decode to the reconstruction, bit for bit"
    if case.has("in/z"):
        case.expect("decode_from_sample", _frames(model.decode(case.input("z"))), 0.0, ABSOLUTE)
    recon.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    case.expect_grad_norms(export_autoencoder(grads, config), rel=GRADIENTS)


def _load(model: PVDMAutoencoder, official: dict[str, Tensor]) -> None:
    config = model.config
    state = import_autoencoder(official)
    model.load_state_dict(state)
    back = export_autoencoder(model.state_dict(), config)
    assert back.keys() == official.keys()
    tables = {name for name in back if "rot_emb" in name}
    assert all(torch.equal(back[name], official[name]) for name in back.keys() - tables - {"coords"})  # nobody reads coords
    assert all(torch.allclose(back[name], official[name], atol=1e-6, rtol=1e-6) for name in tables)
    told = autoencoder_config(official, splits=config.splits, plane_heads=config.plane_heads)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in PVDMAutoencoder(told).state_dict().items()}
    assert shapes == {name: value.shape for name, value in state.items()} and told.heads == config.heads


def _frames(video: Tensor) -> Tensor:
    """b c t h w -> (b t) c h w."""
    return video.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _check_filled(case: Case, model: PVDMAutoencoder) -> None:
    official = export_autoencoder(model.state_dict(), model.config)
    shapes = {name: value.shape for name, value in official.items() if "rot_emb" not in name and name != "coords"}
    model.load_state_dict(import_autoencoder(fill_case(case, shapes)))
    scale = case.config("input_scale", None) or case.config("input_video_scale")
    video = hashed_input(case.config("input_video_shape"), case.config("input_video_k"), scale)
    z = model.encode(video)
    case.expect("extract", z, 0.0, FULL)
    recon = _frames(model.decode(z))
    case.expect("forward", recon, 0.0, FULL)
    if case.has("out/recon_strided"):
        stride = recon.shape[-1] // case.tensor("out/recon_strided").shape[-1]
        case.expect("recon_strided", recon[:, :, ::stride, ::stride], 0.0, FULL)
    case.expect("recon_mean", recon.mean().reshape(1), 0.0, FULL)
    case.expect("recon_absmean", recon.abs().mean().reshape(1), 0.0, FULL)


# ---- rotary tables


@adapter("pvdm", "rotary")
def check_rotary(case: Case) -> None:
    width, stride = case.config("dim_head"), case.config("token_stride_stored")
    time = time_tables(case.config("frames"), width, CPU, "halves")
    grid: Tables = tuple(table[::stride] for table in grid_tables(case.config("h"), case.config("w"), width, CPU))
    for name, tables in (("frame", time), ("image", grid)):
        case.expect(f"{name}_cos", tables[0][None], 0.0, ABSOLUTE)
        case.expect(f"{name}_sin", tables[1][None], 0.0, ABSOLUTE)
    case.expect("frame_inv_freqs", time_rates(width, CPU), 0.0, ABSOLUTE)
    case.expect("image_scales", grid_scales(width // 4, CPU), 0.0, ABSOLUTE)
    for name in ("q", "k"):
        case.expect(f"{name}_frame", rotate(case.input(name), time), 0.0, ABSOLUTE)
    case.expect("q_image", rotate(case.input("q_image"), grid), 0.0, ABSOLUTE)


# ---- LPIPS


@adapter("pvdm", "lpips")
def check_lpips(case: Case) -> None:
    shapes = {}
    before = 3
    for name, width in zip(VGG, (64, 64, 128, 128, *[256] * 3, *[512] * 6), strict=True):
        shapes |= {f"net.{name}.weight": (width, before, 3, 3), f"net.{name}.bias": (width,)}
        before = width
    shapes |= {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate((64, 128, 256, 512, 512))}
    weights = {f"perceptual_loss.{name}": value for name, value in fill_case(case, shapes).items()}
    criterion = import_criterion(weights | {"discriminator_2d.model0.0.bias": torch.zeros(1)})
    distance = lpips_distance("vgg", criterion.trunk, "the stated hash", criterion.heads).net
    a, b = case.input("a"), case.input("b").requires_grad_()
    value, layers = distance(a, b, retPerLayer=True)
    case.expect("val", value, 1e-5)
    for k, layer in enumerate(layers):
        case.expect(f"layer{k}", layer, 1e-5)
    for k, feature in enumerate(distance.net(distance.scaling_layer(a))):
        case.expect(f"feat_absmean{k}", feature.abs().mean().reshape(1), 1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), b)
    case.expect("grad_b", gradient, 1e-4)
    case.expect("grad_b_norm", gradient.norm().reshape(1), 1e-5)
