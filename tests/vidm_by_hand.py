"""VIDM's networks by the spec's formulas, from weights under the release's names: what ours must compute in every layout.

Source: spec, vidm.md sections 3 and 4. `s` holds weights, `p` is the beginning of the names of a layer's.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.unets.pixel import PixelUNetConfig
from models.unets.vidm_content import ContentUNetConfig
from models.unets.vidm_motion import MotionUNetConfig

State = dict[str, Tensor]
Steer = Callable[[str, Tensor], Tensor]
"""What a residual block does after its first convolution, by the beginning of its names."""


def part(s: State, p: str) -> State:
    return {name.removeprefix(p): value for name, value in s.items() if name.startswith(p)}


def norm(s: State, p: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, s[f"{p}.weight"], s[f"{p}.bias"])


def conv(s: State, p: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = s[f"{p}.weight"]
    return F.conv2d(x, weight, s[f"{p}.bias"], stride, padding=weight.shape[-1] // 2)


def linear(s: State, p: str, x: Tensor) -> Tensor:
    return x @ s[f"{p}.weight"].T + s[f"{p}.bias"]


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def residual(s: State, p: str, x: Tensor, steer: Steer, resample: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    h = conv(s, f"{p}.in_layers.2", resample(F.silu(norm(s, f"{p}.in_layers.0", x))))
    x = resample(x)
    return steer(p, h) + (conv(s, f"{p}.skip_connection", x) if f"{p}.skip_connection.weight" in s else x)


def attention(s: State, p: str, x: Tensor, config: PixelUNetConfig) -> Tensor:
    b, width, h, w = x.shape
    heads = config.num_heads if config.num_head_channels == -1 else width // config.num_head_channels
    qkv = F.conv1d(norm(s, f"{p}.norm", x).flatten(2), s[f"{p}.qkv.weight"], s[f"{p}.qkv.bias"])
    if config.new_attention_order:
        q, k, v = (each.reshape(b, heads, -1, h * w) for each in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(b, heads, -1, h * w).chunk(3, dim=2)
    share = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(dim=-1)
    found = (v @ share.transpose(2, 3)).reshape(b, width, h * w)
    return x + F.conv1d(found, s[f"{p}.proj_out.weight"], s[f"{p}.proj_out.bias"]).reshape(x.shape)


def down(s: State, x: Tensor, config: PixelUNetConfig, steer: Steer, features: list[Tensor] | None = None) -> list[Tensor]:
    """What each input block gives; with features f of a first frame f + 0.2 h."""
    found, levels = list[Tensor](), len(config.channel_mult)

    def keep(h: Tensor) -> Tensor:
        found.append(h if features is None else features[len(found)] + 0.2 * h)
        return found[-1]

    x = keep(conv(s, "input_blocks.0.0", x))
    for level in range(levels):
        for _ in range(config.num_res_blocks):
            p = f"input_blocks.{len(found)}"
            h = residual(s, f"{p}.0", x, steer)
            x = keep(attention(s, f"{p}.1", h, config) if 2**level in config.attention_resolutions else h)
        if level < levels - 1:
            p = f"input_blocks.{len(found)}.0"
            x = keep(residual(s, p, x, steer, halved) if config.resblock_updown else conv(s, f"{p}.op", x, stride=2))
    return found


def unet(s: State, x: Tensor, config: PixelUNetConfig, steer: Steer, features: list[Tensor] | None = None) -> Tensor:
    skips = down(s, x, config, steer, features)
    x = residual(s, "middle_block.0", skips[-1], steer)
    x = residual(s, "middle_block.2", attention(s, "middle_block.1", x, config), steer)
    block = 0
    for level in reversed(range(len(config.channel_mult))):
        for k in range(config.num_res_blocks + 1):
            p, attends = f"output_blocks.{block}", 2**level in config.attention_resolutions
            x = residual(s, f"{p}.0", torch.cat([x, skips.pop()], dim=1), steer)
            x = attention(s, f"{p}.1", x, config) if attends else x
            if level and k == config.num_res_blocks:
                last = f"{p}.{1 + attends}"
                x = residual(s, last, x, steer, doubled) if config.resblock_updown else conv(s, f"{last}.conv", doubled(x))
            block += 1
    return conv(s, "out.2", F.silu(norm(s, "out.0", x)))


def by_vector(s: State, config: ContentUNetConfig, emb: Tensor) -> Steer:
    def steer(p: str, h: Tensor) -> Tensor:
        told = linear(s, f"{p}.emb_layers.1", F.silu(emb))[..., None, None]
        if config.use_scale_shift_norm:
            scale, shift = told.chunk(2, dim=1)
            h = norm(s, f"{p}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(s, f"{p}.out_layers.0", h + told)
        return conv(s, f"{p}.out_layers.3", F.silu(h))

    return steer


def by_place(s: State, config: MotionUNetConfig, t: Tensor, frame: Tensor) -> Steer:
    def steer(p: str, h: Tensor) -> Tensor:
        q, (b, _, rows, columns) = f"{p}.emb_layers", h.shape
        place = torch.empty(b, rows, columns, 4)
        place[..., 0] = torch.linspace(-1, 1, config.diffusion_timesteps)[t][:, None, None]
        place[..., 1] = torch.linspace(-1, 1, config.video_timesteps)[frame][:, None, None]
        place[..., 2] = torch.linspace(-1, 1, rows)[:, None]
        place[..., 3] = torch.linspace(-1, 1, columns)
        told = linear(s, f"{q}.linear_1.2", F.silu(linear(s, f"{q}.linear_1.0", linear(s, f"{q}.linear_0", place).sin())))
        scale, shift = told.permute(0, 3, 1, 2).chunk(2, dim=1)
        return conv(s, f"{q}.out_rest.1", F.silu(norm(s, f"{q}.out_norm", h) * (1 + scale) + shift))

    return steer


def content(s: State, config: ContentUNetConfig, x: Tensor, t: Tensor) -> Tensor:
    half = config.model_channels // 2
    angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)
    emb = linear(s, "dt_embed.2", F.silu(linear(s, "dt_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    return unet(s, torch.cat([x, s["input.input"].expand_as(x)], dim=1), config, by_vector(s, config, emb))


def motion(s: State, config: MotionUNetConfig, x: Tensor, t: Tensor, frame: Tensor, previous: Tensor, first: Tensor) -> Tensor:
    ours, encoder = part(s, "unet."), part(s, "encoder.")
    features = down(encoder, first, config, by_place(encoder, config, t, frame))
    seen = torch.cat([x, flow(part(s, "spynet."), first, previous)], dim=1)
    return unet(ours, seen, config, by_place(ours, config, t, frame), features)


def moved(picture: Tensor, by: Tensor) -> Tensor:
    """The picture at (column + by[0], row + by[1]), bilinear; beyond the edge, the edge."""
    b, _, h, w = picture.shape
    x, y = (torch.arange(w) + by[:, 0]).clamp(0, w - 1), (torch.arange(h)[:, None] + by[:, 1]).clamp(0, h - 1)
    left, top, which = x.floor().long(), y.floor().long(), torch.arange(b)[:, None, None]
    found = torch.zeros_like(picture)
    for row, high in ((top, 1 - (y - top)), ((top + 1).clamp(max=h - 1), y - top)):
        for column, wide in ((left, 1 - (x - left)), ((left + 1).clamp(max=w - 1), x - left)):
            found += (high * wide)[:, None] * picture[which, :, row, column].permute(0, 3, 1, 2)
    return found


def flow(s: State, ref: Tensor, supp: Tensor) -> Tensor:
    """Of pictures as they are given."""
    (h, w), resize = ref.shape[2:], F.interpolate
    sides = (math.ceil(h / 32) * 32, math.ceil(w / 32) * 32)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pairs = [tuple((resize(each, sides, mode="bilinear") - mean) / std for each in (ref, supp))]
    for _ in range(5):
        pairs.insert(0, tuple(map(halved, pairs[0])))
    found = torch.zeros(len(ref), 2, sides[0] // 32, sides[1] // 32)
    for level, (seen, other) in enumerate(pairs):
        found = 2 * resize(found, scale_factor=2, mode="bilinear", align_corners=True) if level else found
        x = torch.cat([seen, moved(other, found), found], dim=1)
        for k in range(5):
            x = conv(s, f"basic_module.{level}.basic_module.{k}.conv", x if k == 0 else x.relu())
        found = found + x
    return resize(found, (h, w), mode="bilinear") * torch.tensor([w / sides[1], h / sides[0]]).reshape(1, 2, 1, 1)
