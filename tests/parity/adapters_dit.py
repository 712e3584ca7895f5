"""Checks of the DiT: the network with its gradients and guidance, and the timestep frequencies."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import ClassifierFreeGuidance
from models.layers.embeddings import timestep_frequencies
from models.official.dit import export_dit, import_dit
from models.transformers.dit import ContentDiT, DiTConfig
from tests.parity.case import Case, adapter

State = dict[str, Tensor]
Export = Callable[[State], State]
RELEASE_GUIDED = 3
"""Channels that the releases guide, whatever the input has."""


RECORDED_EXP = {12: 0.4216964840888977, 13: 0.3924189805984497, 44: 0.04216965287923813}
"""Frequencies of the step embedding as the recording machine computed them, where CPUs differ."""


def same_exp() -> bool:
    """Does this CPU's float32 exp give the recorded bits?"""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
    return all(float(frequencies[i]) == value for i, value in RECORDED_EXP.items())


def tolerance() -> float:
    """1e-5 of the largest value, the spec's, where the CPU computes exp as the recording machine did; else 5e-5.

    One bit of the step embedding's first frequencies is an angle of 3e-5 at step 999, whatever is done after it: measured
    1.7e-5 through eight guided sampling steps, and 7e-6 there with the recorded frequencies put in.
    """
    return 1e-5 if same_exp() else 5e-5


def pair(size: Any) -> tuple[int, int]:
    """A side or a (height, width) of a case's config."""
    return (size, size) if isinstance(size, int) else tuple(size)


def dit_fields(case: Case) -> dict[str, Any]:
    """Settings that every DiT case states, those of the network alone."""
    fields = {name: case.config(name) for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")}
    rows, columns = (side // fields["patch_size"] for side in pair(case.config("input_size")))
    fields["pos_grid"] = case.config("pos_grid", default_grid(rows * columns))
    options = {"mlp_ratio": case.config("mlp_ratio", 4.0), "learn_sigma": case.config("learn_sigma", True)}
    return {"input_size": pair(case.config("input_size"))} | fields | options


def default_grid(tokens: int) -> str:
    """The release's own, where it can build one at all."""
    return "release" if math.isqrt(tokens) ** 2 == tokens else "true"


def load_checked(case: Case, model: torch.nn.Module, load: Callable[[State], State], export: Export) -> None:
    """Loads state/ through the importer. The position tables that we build must be those that the release stored."""
    official = case.state()
    for name in [name for name in official if name.endswith("pos_embed")]:
        case.compare(f"state/{name}", model.get_parameter(name), 1e-6)
    model.load_state_dict(load(official))
    back = export(model.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in back)


def expect_grad_norms(case: Case, model: torch.nn.Module, export: Export = dict, group: str = "grad_norm", rel: float = 1e-5) -> None:
    """Norms of the trained parameters' gradients under their official names.

    Some gradients are zero but for rounding (a bias before a softmax or a batch norm): the floor is 1e-6 of the largest norm.
    """
    grads = {name: torch.full_like(p, torch.nan) if p.grad is None else p.grad for name, p in model.named_parameters()}
    grads = {name: grad for name, grad in export(grads).items() if not grad.isnan().any()}
    case.expect_grad_norms(grads, group, rel, abs=1e-6 * max(float(grad.norm()) for grad in grads.values()))


def check_network(case: Case, model: torch.nn.Module, inputs: dict[str, Tensor], export: Export) -> None:
    """Output, step embedding, loss = sum of squares, and all gradients of a DiT called with `inputs`."""
    differentiable = {name: value.requires_grad_() for name, value in inputs.items() if value.is_floating_point()}
    out = model(**inputs)
    case.expect("out", out, tolerance())
    case.expect("t_emb", model.t_embedder(inputs["t"]), tolerance())
    loss = out.square().sum()
    case.expect("loss", loss.reshape(1), tolerance())
    loss.backward()
    expect_grad_norms(case, model, export, rel=tolerance())
    for name, value in differentiable.items():
        case.expect_grad(name, value.grad, tolerance())


def check_content(case: Case, load: Callable[[State], State], export: Export) -> None:
    """A class-conditional DiT."""
    config = DiTConfig(
        **dit_fields(case), num_classes=case.config("num_classes"), class_dropout_prob=case.config("class_dropout_prob", 0.1)
    )
    model = ContentDiT(config).eval()
    load_checked(case, model, load, export)
    check_network(case, model, {name: case.input(name) for name in ("x", "t", "y")}, export)
    check_labels(case, model)


def check_labels(case: Case, model: Any) -> None:
    """What a case records of a label condition beside the plain output: labels that are dropped, and guidance."""
    if case.has("in/force_drop"):
        case.expect("label_emb_forced", model.y_embedder(case.input("y"), case.input("force_drop") == 1))
    scale = case.config("cfg_scale", None)
    if case.has("in/cfg_x"):
        check_guidance(case, model, scale)


@torch.no_grad()
def check_guidance(case: Case, model: Any, scale: float) -> None:
    """Both channel rules. The release doubles the batch and feeds the first half twice; both halves get the guided channels."""
    x, t, y = case.input("cfg_x"), case.input("cfg_t"), case.input("cfg_y")
    n = len(x) // 2
    x, null = x[:n], y[n:]
    assert torch.equal(t[:n], t[n:]) and bool((null == model.config.num_classes).all())
    kept = {"keyframe": case.input("cfg_keyframe")[:n]} if case.has("in/cfg_keyframe") else {}
    rules = {"cfg_three_channels": case.config("cfg_channels", RELEASE_GUIDED), "cfg_all_channels": None}
    for name, channels in rules.items():
        first = ClassifierFreeGuidance(model, scale, {"y": model.config.num_classes}, channels)(x, t[:n], y=y[:n], **kept)
        guided = min(channels or x.shape[1], x.shape[1])
        second = torch.cat([first[:, :guided], model(x, t[n:], y=null, **kept)[:, guided:]], dim=1)
        case.expect(name, torch.cat([first, second]), tolerance())


@adapter("dit", "dit")
def check_dit(case: Case) -> None:
    check_content(case, import_dit, export_dit)


@adapter("dit", "tembed")
def check_tembed(case: Case) -> None:
    t = case.input("t")
    one_bit = 0.0 if same_exp() else float(t.abs().max()) * 2.0**-24  # of a frequency, as an angle
    for name in case.names("out/dim"):
        dim = int(name.removeprefix("out/dim"))
        case.expect(f"dim{dim}", timestep_frequencies(t, dim, case.config("max_period")), abs=one_bit)
