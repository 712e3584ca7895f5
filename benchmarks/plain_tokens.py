"""PVDM's and HVDM's autoencoders written down plainly from the papers, as far as they are the same: what the benchmarks compare ours with.

Tokens are (b, f h w, d), rearranged for every attention; attention is written out; projections are computed at all positions.
"""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.autoencoders.tokens import TokenAutoencoder
from models.layers.attention import SelfAttention
from models.layers.planes import PLANES, PlaneProjection
from models.layers.rotary import Tables, TimeLayout, grid_tables, rotate, time_tables
from models.layers.timesformer import CrossAttention, GatedFeedForward

OVER_TIME = "b (f n) d -> (b n) f d", "(b n) f d -> b (f n) d"
OVER_SPACE = "b (f n) d -> (b f) n d", "(b f) n d -> b (f n) d"
"""From tokens to sequences, and back."""
_SEQUENCES = {"xy": "b f h w d -> b h w f d", "yt": "b f h w d -> b f w h d", "xt": "b f h w d -> b f h w d"}
_SPREAD = {"xy": "b h w d -> b 1 h w d", "yt": "b f w d -> b f 1 w d", "xt": "b f h d -> b f h 1 d"}


class PlainTokens(nn.Module):
    """The way in, and the way out."""

    net: TokenAutoencoder

    def __init__(self, ours: TokenAutoencoder) -> None:
        super().__init__()
        self.net = copy.deepcopy(ours)

    def tokens(self, video: Tensor) -> Tensor:
        """(b, c, f, h, w) -> (b, f, h, w, d)."""
        net, p = self.net, self.net.config.patch_size
        x = net.patch_in(rearrange(video, "b c f (h p) (w q) -> b (f h w) (p q c)", p=p, q=p))
        return rearrange(self.stack(net.encoder, x), "b (f h w) d -> b f h w d", f=video.shape[2], h=net.config.grid[0])

    def planes(self, x: Tensor) -> dict[str, Tensor]:
        """(b, f, h, w, d) -> a plane of features for each pair of axes."""
        return {axis: plain_projection(self.net.projections[axis], rearrange(x, _SEQUENCES[axis])) for axis in PLANES}

    def pixels(self, x: Tensor) -> Tensor:
        """(b, f h w, d) -> (b, c, f, h, w)."""
        net, frames = self.net, self.net.config.clip_frames
        x = rearrange(self.stack(net.decoder, x), "b (f h w) d -> (b f) d h w", f=frames, h=net.config.grid[0])
        x = F.conv_transpose2d(x, net.to_pixels.weight, net.to_pixels.bias, stride=net.config.patch_size)
        return rearrange(2 * x.sigmoid() - 1, "(b f) c h w -> b c f h w", f=frames)

    def stack(self, layers: nn.ModuleList, x: Tensor, *context: Tensor) -> Tensor:
        """(b, f h w, d) -> the same; `context`: what cross-attention takes keys and values from, of the same shape."""
        config = self.net.config
        frames = config.clip_frames
        layout: TimeLayout = "halves" if config.frame_rotary == "release" else "pairs"
        time = time_tables(frames, config.head_dim, x.device, layout)
        space = grid_tables(*config.grid, config.head_dim, x.device)
        for layer in layers:
            for attention, tables, (there, back) in ((layer.time, time, OVER_TIME), (layer.space, space, OVER_SPACE)):
                parts = [rearrange(part, there, f=frames) for part in (attention.norm(x), *context)]
                out = plain_cross(attention, *parts, tables) if context else plain_attention(attention.attn, *parts, tables)
                x = x + rearrange(out, back, b=len(x))
            x = x + plain_feed_forward(layer.ff, x)
        return x


def spread(planes: dict[str, Tensor]) -> Tensor:
    """Planes (b, rows, columns, d) -> their sum over the clip (b, f, h, w, d)."""
    return sum((rearrange(plane, _SPREAD[axis]) for axis, plane in planes.items()), torch.zeros(()))


def plain_feed_forward(layer: GatedFeedForward, x: Tensor) -> Tensor:
    value, gate = layer.up(layer.norm(x)).chunk(2, dim=-1)
    return layer.down(value * F.gelu(gate))


def plain_attention(layer: SelfAttention, x: Tensor, tables: Tables | None = None) -> Tensor:
    return layer.proj(attend(*layer.qkv(x).chunk(3, dim=-1), layer.heads, tables))


def plain_cross(layer: CrossAttention, x: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> Tensor:
    return layer.proj(attend(layer.q(x), layer.k(keys), layer.v(values), layer.heads, tables))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, tables: Tables | None) -> Tensor:
    """(b, n, h e), three times -> (b, n, h e)."""
    q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=heads) for part in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    return rearrange((q @ k.transpose(2, 3)).softmax(dim=3) @ v, "b h n e -> b n (h e)")


def plain_projection(projection: PlaneProjection, x: Tensor) -> Tensor:
    """(b, i, j, n, d) -> (b, i, j, d): all positions are computed, one is taken."""
    i, j = x.shape[1:3]
    x = rearrange(x, "b i j n d -> (b i j) n d")
    x = torch.cat([x, projection.token.expand(len(x), -1, -1).to(x.dtype)], dim=1) + projection.positions
    for layer in projection.layers:
        x = x + plain_attention(layer.attn, layer.attn_norm(x))
        x = x + layer.down(F.gelu(layer.up(layer.ff_norm(x))))
    return rearrange(x[:, projection.position], "(b i j) d -> b i j d", i=i, j=j)
