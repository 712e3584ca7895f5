"""Divided space-time transformer: what the video autoencoders with one token a patch are made of.

Letters: T frames, B clips, H' W' rows and columns of patches, S = H'W' positions of a frame, d width, p patch.
Tokens are kept frame-major, (T, B, S, d): merging (B, S) for attention over time and (T, B) for attention over space are then
both views, so neither needs a transposed copy of the activations.
"""

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers.attention import SelfAttention, sdpa
from models.layers.rotary import Tables, rotate

Sharing = Literal["repeat", "tile"]
"""Which slot of a coarser time axis a frame reads: repeat: slot t // r for r frames a slot; tile: slot t mod the number of slots."""


class Attention(nn.Module):
    """LayerNorm and attention over the frames of each position, or over the positions of each frame."""

    def __init__(self, dim: int, heads: int, over_time: bool, head_dim: int = 0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, head_dim, qkv_bias)

    def forward(self, x: Tensor, rope: Tables | None) -> Tensor:
        """(T, B, S, d) -> (T, B, S, d)."""
        y = self.norm(x)
        if self.over_time:
            return self.attn(y.flatten(1, 2), rope, over_first=True).unflatten(1, x.shape[1:3])
        return self.attn(y.flatten(0, 1), rope).unflatten(0, x.shape[0:2])


class GatedFeedForward(nn.Module):
    """LayerNorm, linear d -> 8d split into value and gate, value * GELU(gate), linear 4d -> d."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 8 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Layer(nn.Module):
    """Pre-norm residual layer: attention over time, attention over space, feed-forward."""

    def __init__(self, dim: int, heads: int, head_dim: int = 0, qkv_bias: bool = True) -> None:
        """`head_dim` 0: dim / heads."""
        super().__init__()
        self.time = Attention(dim, heads, True, head_dim, qkv_bias)
        self.space = Attention(dim, heads, False, head_dim, qkv_bias)
        self.ff = GatedFeedForward(dim)

    def forward(self, x: Tensor, time_rope: Tables | None, space_rope: Tables | None) -> Tensor:
        """(T, B, S, d) -> (T, B, S, d)."""
        x = x + self.time(x, time_rope)
        x = x + self.space(x, space_rope)
        return x + self.ff(x)


class CrossAttention(nn.Module):
    """LayerNorm and attention over time or space to other features: keys from one tensor, values from another, neither of them normed.

    Keys and values may have fewer frames than the queries, T' slots of r = T / T' frames each, shared as `sharing` says.
    """

    def __init__(self, dim: int, heads: int, over_time: bool, head_dim: int, sharing: Sharing) -> None:
        super().__init__()
        self.heads, self.over_time, self.sharing = heads, over_time, sharing
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, rope: Tables) -> Tensor:
        """x (T, B, S, d), keys and values (T', B, S, d) -> (T, B, S, d)."""
        q, k, v = self.q(self.norm(x)), self.k(keys), self.v(values)
        return self.proj(self._over_time(q, k, v, rope) if self.over_time else self._over_space(q, k, v, rope))

    def _over_time(self, q: Tensor, k: Tensor, v: Tensor, rope: Tables) -> Tensor:
        """(T, B, S, H E) and twice (T', B, S, H E) -> (T, B, S, H E): each position's frames; those of a slot differ by their rotary."""
        shared = (self._every_frame(part, len(q)) for part in (k, v))
        heads = (part.unflatten(-1, (self.heads, -1)).flatten(1, 2).permute(1, 2, 0, 3) for part in (q, *shared))  # (B S, H, T, E)
        q_heads, k_heads, v_heads = heads
        out = sdpa(rotate(q_heads, rope), rotate(k_heads, rope), v_heads)
        return out.permute(2, 0, 1, 3).flatten(2).unflatten(1, q.shape[1:3])

    def _over_space(self, q: Tensor, k: Tensor, v: Tensor, rope: Tables) -> Tensor:
        """The same for each frame's positions: the r frames of a slot are one longer row of queries to the same keys."""
        frames = "(s r)" if self.sharing == "repeat" else "(r s)"
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (q, k, v))  # (T or T', B, H, S, E)
        q = rearrange(rotate(q, rope), f"{frames} b h n e -> (s b) h (r n) e", s=len(k))
        out = sdpa(q, rotate(k, rope).flatten(0, 1), v.flatten(0, 1))
        return rearrange(out, f"(s b) h (r n) e -> {frames} b n (h e)", s=len(k), n=k.shape[3])

    def _every_frame(self, x: Tensor, frames: int) -> Tensor:
        """(T', ...) -> (T, ...)."""
        each = frames // len(x)
        if self.sharing == "repeat":
            return x[:, None].expand(-1, each, *x.shape[1:]).flatten(0, 1)
        return x.expand(each, *x.shape).flatten(0, 1)


class FusionLayer(nn.Module):
    """`Layer` whose attention is to other features: over time, then over space, then feed-forward (spec, hvdm.md section 4)."""

    def __init__(self, dim: int, heads: int, head_dim: int, sharing: Sharing) -> None:
        super().__init__()
        self.time = CrossAttention(dim, heads, True, head_dim, sharing)
        self.space = CrossAttention(dim, heads, False, head_dim, sharing)
        self.ff = GatedFeedForward(dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, time_rope: Tables, space_rope: Tables) -> Tensor:
        """x (T, B, S, d), keys and values (T', B, S, d) with T' dividing T -> (T, B, S, d)."""
        x = x + self.time(x, keys, values, time_rope)
        x = x + self.space(x, keys, values, space_rope)
        return x + self.ff(x)


class PatchHead(nn.ConvTranspose2d):
    """Transposed convolution of kernel = stride = patch, computed as one matrix product on channels-last tokens."""

    def __init__(self, dim: int, channels: int, patch: int) -> None:
        super().__init__(dim, channels, patch, patch)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(T, B, H'W', d) -> (T, B, C, h, w)."""
        out = F.linear(x, self.weight.flatten(1).t())
        p = self.kernel_size[0]
        out = rearrange(out, "t b (h w) (c p q) -> t b c (h p) (w q)", h=grid[0], p=p, q=p)
        return out if self.bias is None else out + self.bias[:, None, None]

    def pixels(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(T, B, H'W', d) -> 2 sigmoid(logits) - 1, a clip (B, C, T, h, w) in (-1, 1), dense in this order, float32."""
        p = self.kernel_size[0]
        bias = None if self.bias is None else self.bias.repeat_interleave(p * p)
        # Half precision has steps of a grey level near -1 and 1.
        out = (F.linear(x, self.weight.flatten(1).t(), bias).float() * 0.5).tanh()
        return rearrange(out, "t b (h w) (c p q) -> b c t (h p) (w q)", h=grid[0], p=p, q=p).contiguous()


def patch_vectors(x: Tensor, patch: int) -> Tensor:
    """(..., C, h, w) -> (..., H'W', p p C), channels fastest."""
    return rearrange(x, "... c (h p) (w q) -> ... (h w) (p q c)", p=patch, q=patch)
