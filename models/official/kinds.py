"""Every network of which there are official checkpoints: how one is read, written and described. `KINDS` is what the commands know."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig
from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.official import cmd, frame_vae, hvdm, hvdm_unet, latte, pvdm, pvdm_unet, vidm
from models.official.checkpoint import State, unwrap
from models.official.released import RELEASED_CLIPS, VIDM_DATA, latte_process
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.latte import Latte, LatteConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig

Checkpoint = Mapping[str, Any]
Read = tuple[State, Any, dict[str, Any]]
"""State dict, config, and what else a card says."""


class Kind(NamedTuple):
    """A network with official checkpoints."""

    network: Callable[[Any], nn.Module]
    config: type[Any]
    read: Callable[..., Read]
    """(checkpoint, settings that its tensors do not tell) -> ours. Raises ValueError or KeyError."""
    write: Callable[[State, Any, str], State]
    """(state dict, config, release) -> official tensors. Raises ValueError."""
    settings: tuple[str, ...]
    """Those that `read` can be told."""
    required: tuple[str, ...] = ()
    """Those that it must be told."""
    entries: tuple[str, ...] = ()
    """Names of the last and, where the release has them, of the averaged weights in its file; none: one bare state dict."""


def _cmd_autoencoder(checkpoint: Checkpoint, **known: Any) -> Read:
    state = unwrap(checkpoint, "autoenc")
    ours = cmd.import_autoencoder(checkpoint)
    known["heads"] = known.pop("num_heads", CMDAEConfig.heads)
    known["mode"] = "pixel" if state["to_logit.1.weight"].shape[1] == 3 else "latent"
    return ours, cmd.autoencoder_config(state, **known), {}


def _cmd_content(checkpoint: Checkpoint, **known: Any) -> Read:
    ours = cmd.import_content(checkpoint)
    return ours, cmd.content_config(ours, **known), {}


def _cmd_motion(checkpoint: Checkpoint, **known: Any) -> Read:
    ours = cmd.import_motion(checkpoint)
    return ours, cmd.motion_config(ours, **known), {}


def _pvdm_autoencoder(checkpoint: Checkpoint, **known: Any) -> Read:
    return pvdm.import_autoencoder(checkpoint), pvdm.autoencoder_config(checkpoint, **known), {}


def _pvdm_denoiser(checkpoint: Checkpoint, **known: Any) -> Read:
    return *pvdm_unet.load(checkpoint, **known), RELEASED_CLIPS


def _hvdm_autoencoder(checkpoint: Checkpoint, **known: Any) -> Read:
    return hvdm.import_autoencoder(checkpoint), hvdm.autoencoder_config(checkpoint, **known), {}


def _hvdm_denoiser(checkpoint: Checkpoint, **known: Any) -> Read:
    return *hvdm_unet.load(checkpoint, **known), RELEASED_CLIPS


def _latte_autoencoder(checkpoint: Checkpoint, **known: Any) -> Read:
    return *frame_vae.load(checkpoint, **known), {}


def _latte_denoiser(checkpoint: Checkpoint, **known: Any) -> Read:
    state, config = latte.load(checkpoint, **known)
    return state, config, latte_process(latte.release_of(checkpoint), config)


def _vidm_content(checkpoint: Checkpoint, **known: Any) -> Read:
    return *vidm.load_content(checkpoint, **known), VIDM_DATA


def _vidm_motion(checkpoint: Checkpoint, **known: Any) -> Read:
    state, config = vidm.load_motion(checkpoint, **known)
    return state, config, {**VIDM_DATA, "diffusion": {"steps": config.diffusion_timesteps}}


def _plain(write: Callable[[State], Mapping[str, Tensor]]) -> Callable[[State, Any, str], State]:
    return lambda state, config, release: dict(write(state))


def _sized(write: Callable[[State, Any], Mapping[str, Tensor]]) -> Callable[[State, Any, str], State]:
    return lambda state, config, release: dict(write(state, config))


def _write_latte(state: State, config: LatteConfig, release: str) -> State:
    return latte.export_tutorial(state, config) if release == "tutorial" else latte.export_official(state, config)


_VIDM = ("state_dict", "ema_state_dict")
KINDS: dict[tuple[str, str], Kind] = {
    ("cmd", "autoencoder"): Kind(
        CMDAutoencoder, CMDAEConfig, _cmd_autoencoder, _plain(cmd.export_autoencoder), ("image_size", "n_frames", "num_heads"),
        entries=("autoenc",),
    ),
    ("cmd", "content"): Kind(
        ContentDiT, DiTConfig, _cmd_content, _plain(cmd.export_content), ("input_size", "num_heads"), entries=("cdiff_model", "ema")
    ),
    ("cmd", "motion"): Kind(
        MotionDiT, MotionDiTConfig, _cmd_motion, _plain(cmd.export_motion), ("input_size", "keyframe_size", "num_heads"),
        ("input_size", "keyframe_size"), ("mdiff_model", "ema"),
    ),
    ("pvdm", "autoencoder"): Kind(
        PVDMAutoencoder, PVDMAEConfig, _pvdm_autoencoder, _sized(pvdm.export_autoencoder),
        ("image_size", "splits", "plane_heads", "head_dim"),
    ),
    ("pvdm", "denoiser"): Kind(
        PlaneUNet, PlaneUNetConfig, _pvdm_denoiser, _sized(pvdm_unet.export_unet), ("num_heads", "latent_res", "latent_frames")
    ),
    ("hvdm", "autoencoder"): Kind(
        HVDMAutoencoder, HVDMAEConfig, _hvdm_autoencoder, _sized(hvdm.export_autoencoder), ("image_size", "plane_heads", "head_dim")
    ),
    ("hvdm", "denoiser"): Kind(
        VolumeUNet, VolumeUNetConfig, _hvdm_denoiser, _sized(hvdm_unet.export_unet), ("latent_res", "latent_frames")
    ),
    ("latte", "autoencoder"): Kind(FrameVAE, FrameVAEConfig, _latte_autoencoder, _sized(frame_vae.export), ("norm_channels", "num_heads")),
    ("latte", "denoiser"): Kind(
        Latte, LatteConfig, _latte_denoiser, _write_latte, ("num_heads", "in_channels", "input_size", "n_frames"), entries=("model", "ema")
    ),
    ("vidm", "content"): Kind(
        ContentUNet, ContentUNetConfig, _vidm_content, _plain(vidm.export_content), ("num_heads", "num_head_channels", "image_size"),
        entries=_VIDM,
    ),
    ("vidm", "motion"): Kind(
        MotionUNet, MotionUNetConfig, _vidm_motion, _sized(vidm.export_motion),
        ("num_heads", "num_head_channels", "image_size", "video_timesteps", "diffusion_timesteps"), entries=_VIDM,
    ),
}  # fmt: skip
"""(system, stage) -> its network."""
