"""What the released checkpoints of UNets have in common (spec, pvdm.md section 8, hvdm.md section 10, vidm.md section 10).

Those over latents, model_*.pth and ema_model_*.pth, are state dicts whose names begin with "diffusion_model."; the releases' object
for averages (LitEma) keeps them without their dots, beside two counters. Both are read; written are names with dots, and the buffer of
zeros.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.official.checkpoint import State, check_names, depth_of, unwrap

PREFIX = "diffusion_model."
ZEROS = "zeros"
"""The releases' buffer for a clip without another before it, (1, channels, positions)."""
_COUNTERS = ("decay", "num_updates")
_UP = ("in_layers.2.weight", "conv.weight")
"""What a second layer that doubles the sides has: a residual block, or a convolution."""

_POINTWISE = ("qkv.weight", "proj_out.weight")
"""Ends of the names of weights of 1x1 convolutions, which are linears of ours."""

Rules = Sequence[tuple[str, str]]


def renamed(name: str, rules: Rules) -> str:
    """A name by the first rule (pattern, replacement) that its beginning matches."""
    for pattern, replacement in rules:
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return name


def import_state(official: Mapping[str, Tensor], rules: Rules) -> State:
    """Tensors under our names, and as ours have them."""
    return {renamed(name, rules): value.flatten(1) if name.endswith(_POINTWISE) else value for name, value in official.items()}


def export_state(state: Mapping[str, Tensor], rules: Rules) -> State:
    """Tensors as the releases name and have them."""
    return {renamed(name, rules): value[..., None] if name.endswith(_POINTWISE) else value for name, value in state.items()}


def bare_names(checkpoint: Mapping[str, Any], heads: Sequence[str], stages: Sequence[str]) -> State:
    """The tensors under the release's names without the prefix, of either form.

    `heads`: the modules that the network consists of; `stages`: those of them that are lists of lists, with two numbers in their names.
    """
    state = {name: value for name, value in unwrap(checkpoint, "state_dict", "model", "ema").items() if name not in _COUNTERS}
    bare = {name.removeprefix(PREFIX).removeprefix(PREFIX[:-1]): value for name, value in state.items()}
    if any("." in name for name in bare):
        return bare
    undotted = re.compile(
        rf"(?P<head>{'|'.join(heads)})(?P<numbers>\d*)"
        r"(?P<layer>(?:in_layers|emb_layers|out_layers|skip_connection|norm|qkv|proj_out|op|conv)?)(?P<index>\d?)(?P<kind>weight|bias)"
    )
    return {_dotted(name, undotted, stages): value for name, value in bare.items()}


def _dotted(name: str, undotted: re.Pattern[str], stages: Sequence[str]) -> str:
    """ "input_blocks100in_layers2weight" -> "input_blocks.10.0.in_layers.2.weight": the last number of a stage is one digit."""
    found = undotted.fullmatch(name)
    if found is None:
        return name
    head, numbers = found["head"], found["numbers"]
    places = [numbers[:-1], numbers[-1:]] if head in stages else [numbers]
    return ".".join(part for part in (head, *places, found["layer"], found["index"], found["kind"]) if part)


def check_state(state: State, network: Callable[[], nn.Module], export: Rules) -> None:
    """Raises ValueError naming, as the release does, tensors that are missing, unknown or of another shape than the network's."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in network().state_dict().items()}
    check_names((renamed(name, export) for name in state), (renamed(name, export) for name in expected))
    for name, shape in expected.items():
        if state[name].shape != shape:
            found = tuple(state[name].shape)
            raise ValueError(f"{renamed(name, export)} is {found}, where the network that the other tensors tell of has {tuple(shape)}")


def settings(state: State, zeros: Tensor | None, export: Rules) -> dict[str, Any]:
    """What the tensors, under our names, tell of the stages. Averages leave `zeros` out, and so do networks of one input."""
    first, last, step = ends(state, ("input_blocks.0.layers.0.weight", "out.conv.weight", "t_embedder.mlp.0.weight"), export)
    widths, told = layout(state, export)
    channels = step.shape[1]
    conditional = first.shape[1] == 2 * (len(last) if zeros is None else zeros.shape[1])
    inputs = first.shape[1] // (2 if conditional else 1)
    return told | {
        "in_channels": inputs,
        "out_channels": 0 if inputs == len(last) else len(last),
        "model_channels": channels,
        "channel_mult": multiples(widths, channels),
        "use_scale_shift_norm": scales(state, widths[0], export),
        "conditional": conditional,
    }


def multiples(widths: Sequence[int], channels: int) -> tuple[float, ...]:
    """Widths over model_channels, as whole numbers where they are."""
    return tuple(width / channels if width % channels else width // channels for width in widths)


def ends(state: State, names: Sequence[str], export: Rules) -> list[Tensor]:
    """The tensors that a checkpoint must have for the others to be understood. Raises ValueError naming them all."""
    if any(name not in state for name in names):
        *others, end = (renamed(name, export) for name in names)
        raise ValueError(f"the state dict does not fit: it lacks {', '.join(others)} or {end}")
    return [state[name] for name in names]


def layout(state: State, export: Rules, prefix: str = "") -> tuple[list[int], dict[str, Any]]:
    """Widths of the levels, and num_res_blocks and resblock_updown, of the UNet under a prefix. Raises ValueError where blocks lack."""
    stages = depth_of(state, f"{prefix}output_blocks.")
    ups = [j for j in range(stages) if any(f"{prefix}output_blocks.{j}.layers.{k}.{what}" in state for k in (1, 2) for what in _UP)]
    blocks = ups[0] if ups else stages - 1
    convolutions = [f"{prefix}input_blocks.{i}.layers.0.in_layers.2.weight" for i in starts(blocks, len(ups) + 1)]
    if missing := [name for name in convolutions if name not in state]:
        raise ValueError(f"the state dict does not fit: missing {renamed(missing[0], export)}")
    updown = not any(name.endswith(".op.weight") for name in state)
    return [len(state[name]) for name in convolutions], {"num_res_blocks": blocks, "resblock_updown": updown}


def scales(state: State, width: int, export: Rules) -> bool:
    """Whether the vector scales and shifts, or is added; `width`: of the first level. Raises ValueError where that lacks."""
    name = "input_blocks.1.layers.0.emb_layers.1.weight"
    if name not in state:
        raise ValueError(f"the state dict does not fit: missing {renamed(name, export)}")
    return len(state[name]) == 2 * width


def attended(state: State, told: Mapping[str, Any], prefix: str = "") -> tuple[int, ...]:
    """The levels with attention of the UNet under a prefix, by how many times smaller their sides are."""
    firsts = enumerate(starts(told["num_res_blocks"], len(told["channel_mult"])))
    return tuple(2**level for level, i in firsts if f"{prefix}input_blocks.{i}.layers.1.norm.weight" in state)[::-1]


def starts(blocks: int, levels: int) -> list[int]:
    """Numbers of the first residual block of each level among the input blocks."""
    return [1 + level * (blocks + 1) for level in range(levels)]
