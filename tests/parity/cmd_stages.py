"""Checks of CMD that need several of its networks: two optimiser steps of a diffusion stage, and the whole generation path."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion import DiffusionConfig, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_sample, ddpm_sample
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.official.cmd import (
    autoencoder_config,
    export_content,
    export_motion,
    import_autoencoder,
    import_content,
    import_motion,
)
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from tests.parity.adapters_dit import RELEASE_GUIDED, Export, State, default_grid, pair, tolerance
from tests.parity.case import Case, adapter

AFTER_STEPS = 5e-5
"""Parameters after two AdamW steps, absolute."""
AE_FIELDS = {"dim": "dim", "depth": "depth", "patch_size": "patch", "embed_dim": "embed_dim", "heads": "heads", "channels": "channels"}


def frozen_autoencoder(case: Case) -> CMDAutoencoder:
    """The autoencoder of state/ae/: its config is read from the tensors, and what the case states beside them must agree."""
    state = case.state("ae/")
    config = autoencoder_config(state, pair(case.config("image")), case.config("frames"), case.config("ae.mode", "pixel"))
    config = dataclasses.replace(config, heads=case.config("ae.heads", 8))
    for ours, theirs in AE_FIELDS.items():
        assert case.config(f"ae.{theirs}", getattr(config, ours)) == getattr(config, ours), f"ae.{theirs} is not what the tensors say"
    ae = CMDAutoencoder(config)
    ae.load_state_dict(import_autoencoder(state))
    return ae.eval().requires_grad_(False)


# ---- two optimiser steps


@adapter("cmd", "trainstep")
def check_training_steps(case: Case) -> None:
    ae = frozen_autoencoder(case)
    z_c, z_m = ae.encode(case.input("x"))
    case.expect("z_c", z_c)
    case.expect("z_m", z_m)
    model, load, export, x0, conditions = _stage(case, z_c, z_m)
    model.load_state_dict(load(case.state("net/")))
    ema = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [p for p in ema.parameters() if p.requires_grad]  # the release averages the fixed tables too, which moves them by 1e-7
    options = {"lr": case.config("lr"), "betas": tuple(case.config("betas")), "eps": case.config("eps")}
    optimiser = torch.optim.AdamW(trained, weight_decay=case.config("weight_decay"), **options)
    diffusion = build(DiffusionConfig())
    t, noise = case.input("t"), case.input("noise")
    clip, decay = case.config("clip_grad", None), case.config("ema")
    for step in range(2):
        terms = diffusion.training_losses(model, x0, t, noise, conditions)
        optimiser.zero_grad()
        terms["loss"].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        optimiser.step()
        torch._foreach_lerp_([p.data for p in averaged], [p.data for p in trained], 1 - decay)
        for name in case.names(f"out/step{step}/"):
            value = norm.reshape(1) if name.endswith("grad_norm") else terms[name.rpartition("/")[2]]
            # The first step is arithmetic alone; the second starts from weights that AdamW lets differ by up to 5e-5.
            case.compare(name, value, tolerance() if step == 0 else 1e-3)
    for group, after in (("net_after", model), ("ema_after", ema)):
        for name, value in export(after.state_dict()).items():
            case.expect(f"{group}/{name}", value, rel=0.0, abs=AFTER_STEPS)


def _stage(case: Case, z_c: Tensor, z_m: Tensor) -> tuple[Any, Callable[..., State], Export, Tensor, dict[str, Tensor]]:
    """Model, importer, exporter, clean sample and conditions of the stage that the case trains."""
    size = {"hidden_size": case.config("hidden"), "depth": case.config("depth"), "num_heads": case.config("heads")}
    size["pos_grid"] = case.config("pos_grid", "true")  # the tables are in the state
    y, classes = case.input("y"), case.config("num_classes", 0)
    patches = {name: case.config(f"{name}_patch", 2) for name in ("motion", "content", "keyframe")}
    stage = case.config("stage")
    if stage == "content":
        null = len(case.tensor("state/net/y_embedder.embedding_table.weight")) > classes
        dropout = case.config("class_dropout_prob", 0.1 if null else 0.0)
        config = DiTConfig(tuple(z_c.shape[2:]), z_c.shape[1], patches["content"], **size, num_classes=classes, class_dropout_prob=dropout)
        given = {"y": y, "drop": case.input("force_drop") == 1} if case.has("in/force_drop") else {"y": y}
        return ContentDiT(config), import_content, export_content, z_c, given
    assert stage == "motion", f"unknown stage {stage}"
    keyframe = {"keyframe_size": tuple(z_c.shape[2:]), "keyframe_channels": z_c.shape[1], "keyframe_patch_size": patches["keyframe"]}
    config = MotionDiTConfig(tuple(z_m.shape[2:]), z_m.shape[1], patches["motion"], **size, **keyframe)
    return MotionDiT(config), import_motion, export_motion, z_m, {"keyframe": z_c}


# ---- generation


@adapter("cmd", "sample")
@torch.no_grad()
def check_generation(case: Case) -> None:
    ae = frozen_autoencoder(case)
    z_c = _sample_content(case, ae.config)
    z_m = _sample_motion(case, ae.config, z_c)
    video = ae.decode(z_c, z_m)
    for name, value in (("z_c", z_c), ("z_m", z_m), ("video", video)):
        case.expect(name, value, tolerance())
    if case.has("out/video_uint8_release"):
        grey, expected = (1 + video) * 127.5, case.tensor("out/video_uint8_release")
        # Truncation jumps at whole numbers: within the tolerance of the video either side of the jump is right.
        slack = 127.5 * tolerance()
        right = (grey > expected - slack) & (grey < expected + 1 + slack)
        case.expect("video_uint8_release", torch.where(right, expected, grey.to(torch.uint8)))


def _sample_content(case: Case, ae: CMDAEConfig) -> Tensor:
    """The content frame, by the network input doubled (ours) and by the whole state doubled (the release's)."""
    config = _dit_config(case, "content", ae.image_size, ae.channels)
    classes = case.config("content.num_classes")
    model = _loaded(ContentDiT(DiTConfig(**config, num_classes=classes)), import_content(case.state("content/")))
    channels = case.config("cfg_channels", RELEASE_GUIDED)
    guided = ClassifierFreeGuidance(model, case.config("cfg_scale", 1.0), {"y": classes}, channels)
    y, x_T, noise = case.input("y"), case.input("content_noise"), _step_noise(case, "content")
    n = len(y)
    z_c = _sample(case, "content", guided, x_T, None if noise is None else noise[:, :n], True, {"y": y})
    if case.has("out/content_both_halves"):

        def doubled(x: Tensor, t: Tensor) -> Tensor:
            first, split = guided(x[:n], t[:n], y=y), min(channels or x.shape[1], x.shape[1])
            null = model(x[:n], t[:n], torch.full_like(y, classes))
            return torch.cat([first, torch.cat([first[:, :split], null[:, split:]], dim=1)])

        both = _sample(case, "content", doubled, torch.cat([x_T, x_T]), noise, True, {})
        case.expect("content_both_halves", both, tolerance())
    return z_c


def _sample_motion(case: Case, ae: CMDAEConfig, z_c: Tensor) -> Tensor:
    """The motion latent of content frames."""
    config = _dit_config(case, "motion", ae.latent_size, ae.embed_dim)
    patch = case.config("motion.keyframe_patch")
    config |= {"keyframe_size": ae.image_size, "keyframe_channels": ae.channels, "keyframe_patch_size": patch}
    model = _loaded(MotionDiT(MotionDiTConfig(**config)), import_motion(case.state("motion/")))
    return _sample(case, "motion", model, case.input("motion_noise"), _step_noise(case, "motion"), False, {"keyframe": z_c})


def _dit_config(case: Case, group: str, size: tuple[int, int], channels: int) -> dict[str, Any]:
    patch = case.config(f"{group}.patch")
    grid = case.config(f"{group}.pos_grid", default_grid((size[0] // patch) * (size[1] // patch)))
    names = {"hidden_size": "hidden", "depth": "depth", "num_heads": "heads"}
    sizes = {ours: case.config(f"{group}.{theirs}") for ours, theirs in names.items()}
    return {"input_size": size, "in_channels": channels, "patch_size": patch, "pos_grid": grid} | sizes


def _loaded(model: torch.nn.Module, state: State) -> Any:
    """The model with its weights; the position tables that it built must be the stored ones."""
    for name in [name for name in state if name.endswith("pos_embed")]:
        torch.testing.assert_close(model.get_parameter(name).data, state[name], rtol=0, atol=1e-6)
    model.load_state_dict(state)
    return model.eval()


def _step_noise(case: Case, stage: str) -> Tensor | None:
    return case.input(f"{stage}_step_noise") if case.has(f"in/{stage}_step_noise") else None


def _option(case: Case, stage: str, name: str, default: Any = None) -> Any:
    """A setting of one stage, or else of both."""
    found = [case.config(key, None) for key in (f"{name}_{stage}", f"{stage}_{name}", f"{stage}.{name}", name)]
    return next((value for value in found if value is not None), default)


def _sample(case: Case, stage: str, model: Any, x_T: Tensor, noise: Tensor | None, clip: bool, conditions: dict[str, Tensor]) -> Tensor:
    """One stage by the sampler of the case; `clip` is the release's choice for it."""
    diffusion = build(DiffusionConfig(respacing=str(_option(case, stage, "respacing", ""))))
    options = {"clip_denoised": _option(case, stage, "clip_denoised", clip), "model_kwargs": conditions}
    draws = None if noise is None else noise.__getitem__
    sampler, eta = _option(case, stage, "sampler"), _option(case, stage, "eta", 0.0)
    if sampler == "ddim":
        return ddim_sample(diffusion, model, x_T, eta=eta, noise=draws, **options)
    assert sampler == "ddpm", f"unknown sampler {sampler}"
    return ddpm_sample(diffusion, model, x_T, noise=draws, **options)
