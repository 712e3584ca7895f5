"""Checks of Latte's network, both releases: outputs and gradients, position tables, guidance, and optimiser steps."""

import copy
from typing import Any

import torch
from torch import Tensor

from diffusion import DiffusionConfig, build
from diffusion.guidance import ClassifierFreeGuidance
from engine.config import EmaConfig, OptimConfig
from engine.ema import Ema
from engine.optim import build_optimizer, clip_limit, gradient_norm, guarded_step
from models.layers.embeddings import frame_table, grid_table, timestep_frequencies
from models.official.latte import (
    export_official,
    export_tutorial,
    import_official,
    import_tutorial,
    official_config,
    tutorial_config,
)
from models.transformers.latte import Latte, LatteConfig
from tests.parity.adapters_dit import expect_grad_norms, pair, same_exp, tolerance
from tests.parity.case import Case, adapter

CPU = torch.device("cpu")
CLASSES, TEXT = 2, 78
"""Values of the release's `extras`; any other is no condition."""
TABLES = ("pos_embed", "temp_embed")
AFTER_STEPS = 1e-3
"""Of the largest change that the steps made."""


def swapped(video: Tensor) -> Tensor:
    """b f c h w of the releases <-> b c f h w of ours."""
    return video.transpose(1, 2)


def official_model(case: Case, group: str = "") -> Latte:
    """The network of a case of the official release with its weights. What the tensors tell of the config must be what the case says."""
    state = case.state()

    def stated(name: str, default: Any = None) -> Any:
        return case.config(f"{group}{name}", default)

    known = {"num_heads": stated("num_heads"), "class_dropout_prob": stated("class_dropout_prob", 0.1)}
    extras, classes = stated("extras", 1), stated("num_classes", 0)
    config = official_config(state, **known | ({"num_classes": classes} if extras == CLASSES else {}))
    expected = LatteConfig(
        input_size=pair(stated("input_size")),
        in_channels=stated("in_channels", 4),
        n_frames=stated("num_frames", 16),
        patch_size=stated("patch_size", 2),
        hidden_size=stated("hidden_size"),
        depth=stated("depth"),
        mlp_ratio=stated("mlp_ratio", 4.0),
        learn_sigma=stated("learn_sigma", True),
        time_embed_dim=stated("frequency_embedding_size", 256),
        **known,
        **({"num_classes": classes} if extras == CLASSES else {}),
        **({"cond_dim": 77 * 768, "cond_in_final": False} if extras == TEXT else {}),
    )
    assert config == expected, f"the tensors say {config}, the case {expected}"
    model = Latte(config)
    model.load_state_dict(import_official(state))
    back = export_official(model.state_dict(), config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in back if name not in TABLES)
    for name in TABLES:
        case.compare(f"state/{name}", back[name], 1e-6)
    return model.eval()


def check_output(case: Case, name: str, model: Latte, inputs: dict[str, Any], export: Any) -> None:
    """Output, loss = sum of squares and all gradients."""
    t = case.input("t")
    embedder = model.t_embedder
    one_bit = 0.0 if same_exp() else float(t.max()) * 2.0**-24  # of a frequency, as an angle
    case.expect("time_sinusoid", timestep_frequencies(t, embedder.frequencies, order=embedder.order), abs=one_bit)
    out = model(swapped(case.input("x")), t, **inputs)
    case.expect(name, swapped(out), tolerance())
    loss = out.square().sum()
    case.expect("loss", loss, 10 * tolerance())
    loss.backward()
    expect_grad_norms(case, model, export, rel=tolerance())


@adapter("latte", "official-vdit")
@adapter("latte", "official-vditimg")
def check_official(case: Case) -> None:
    model = official_model(case)
    assert case.config("batch", len(case.input("t"))) == len(case.input("t"))
    assert case.config("label_dropout", 0.0) == 0.0
    given = {"y": "y", "text": "cond", "y_image": "image_y"}
    inputs: dict[str, Any] = {ours: case.input(name) for name, ours in given.items() if case.has(f"in/{name}")}
    if case.config("use_image_num", 0):
        inputs["images"] = case.config("use_image_num")
    check_output(case, "pred", model, inputs, lambda grads: export_gradients(model, grads))


def export_gradients(model: Latte, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients under the official names, which the tables have none of."""
    return {name: grad for name, grad in export_official(grads, model.config).items() if name not in TABLES}


def tutorial_model(case: Case, frames_of: str) -> Latte:
    """The network of a case of the tutorial with its weights, checked against the case's config; `frames_of` names a video of its."""
    state = case.state()
    known = {"input_size": (case.config("frame_height"), case.config("frame_width")), "n_frames": case.config("num_frames")}
    config = tutorial_config(state, in_channels=case.config("im_channels"), num_heads=case.config("num_heads"), **known)
    found = {"patch_size": config.patch_size, "num_layers": config.depth, "hidden_size": config.hidden_size}
    found |= {"timestep_emb_dim": config.time_embed_dim, "head_dim": config.head_dim or config.hidden_size // config.num_heads}
    found |= {"batch": len(case.input(frames_of))}
    for name, value in found.items():
        assert case.config(name, value) == value, f"the tensors say {name} {value}"
    model = Latte(config)
    model.load_state_dict(import_tutorial(state, config.in_channels))
    back = export_tutorial(model.state_dict(), config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in back)
    return model.eval()


@adapter("latte", "expl-dit")
def check_tutorial(case: Case) -> None:
    images = case.config("num_images", 0)
    model = tutorial_model(case, "x")
    config = model.config
    case.expect("patch_pos_embed", grid_table(config.hidden_size, config.grid, config.pos_embed_order, CPU), abs=1e-5)
    case.expect("frame_pos_embed", frame_table(config.hidden_size, config.n_frames, CPU), abs=1e-5)
    check_output(case, "eps", model, {"images": images}, lambda grads: export_tutorial(grads, config))


@adapter("latte", "official-posembed")
def check_tables(case: Case) -> None:
    dim, frames = case.config("dim"), case.config("num_frames")
    case.expect("spatial", grid_table(dim, pair(case.config("grid")), "wh", CPU), 1e-6)
    case.expect("temporal", frame_table(dim, frames, CPU), 1e-6)


@adapter("latte", "official-cfg")
@torch.no_grad()
def check_guidance(case: Case) -> None:
    """The release doubles the batch, of which both halves get the guided eps; the variance stays each half's own."""
    model = official_model(case)
    x, t, y, c = swapped(case.input("x")), case.input("t"), case.input("y"), model.config.in_channels
    n, null = len(x) // 2, model.config.num_classes
    assert case.config("batch", len(x)) == len(x) and torch.equal(x[:n], x[n:]) and bool((y[n:] == null).all())
    for name in case.names("out/cfg_"):
        scale = float(name.removeprefix("out/cfg_"))
        guided = ClassifierFreeGuidance(model, scale, {"y": null})(x[:n], t[:n], y=y[:n])
        second = torch.cat([guided[:, :c], model(x[n:], t[n:], y=y[n:])[:, c:]], dim=1)
        case.compare(name, swapped(torch.cat([guided, second])), tolerance())


@adapter("latte", "official-trainstep")
def check_steps(case: Case) -> None:
    """Updates by the engine's own parts. The release's own, peer_out/, are those of its defects: ours must not be the same."""
    model = official_model(case, "model.")
    start = copy.deepcopy(model.state_dict())
    ema = Ema(copy.deepcopy(model), model, EmaConfig(decay=case.config("ema_decay"), warmup=False))
    losses, norms = run_updates(case, model, ema)
    recorded = case.tensor("out/losses")
    case.expect("losses", losses.flatten() if recorded.numel() == losses.numel() else losses.mean(dim=1), AFTER_STEPS)
    case.expect("grad_norms", norms, AFTER_STEPS)
    for group, after in (("delta", model), ("ema_delta", ema.module)):
        change = export_official({name: value - start[name] for name, value in after.state_dict().items()}, model.config)
        for name in case.names(f"out/{group}/"):
            case.compare(name, change[name.rpartition("/")[2]], AFTER_STEPS)
    for name in case.names("peer_out/"):
        ours, theirs = case.tensor(name.removeprefix("peer_")), case.tensor(name)
        different = ours.shape != theirs.shape or bool((ours - theirs).abs().max() > AFTER_STEPS * ours.abs().max())
        assert different or name.endswith("losses"), f"{name}: the case does not tell the defect from what is required"


def run_updates(case: Case, model: Latte, ema: Ema) -> tuple[Tensor, Tensor]:
    """Losses (updates, micro-batches) and norms (updates,) of the case's updates; the weights change in place."""
    optim = OptimConfig(
        lr=case.config("lr"),
        betas=tuple(case.config("betas")),
        eps=case.config("eps"),
        weight_decay=case.config("weight_decay"),
        clip_norm=case.config("clip_max_norm"),
        clip_start=case.config("start_clip_iter"),
    )
    diffusion = build(DiffusionConfig(variance="learned_range" if model.config.learn_sigma else "fixed_large"))
    parameters = list(model.parameters())
    optimizer = build_optimizer(parameters, optim, sharded=False)
    updates, parts = case.config("updates"), case.config("accumulation", 1)
    losses, norms = torch.zeros(updates, parts), torch.zeros(updates)
    for step in range(updates):
        for part in range(parts):
            at = step * parts + part
            x0, t, noise = (case.input(f"{name}_{at}") for name in ("x0", "t", "noise"))
            given = {"y": case.input(f"y_{at}")} if case.has(f"in/y_{at}") else {}
            loss = diffusion.training_losses(model, swapped(x0), t, swapped(noise), given)["loss"].mean()
            (loss / parts).backward()
            losses[step, part] = loss.detach()
        norms[step] = norm = gradient_norm(parameters)
        guarded_step(optimizer, norm, clip_limit(optim, step), torch.ones(()), torch.tensor(True))
        ema.update(step)
    return losses, norms
