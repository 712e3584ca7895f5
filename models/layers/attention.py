"""Scaled dot-product attention without layout copies.

Letters: B batch, N tokens, D width, H heads, E = D / H head width, T frames, S positions of a frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.rotary import Tables, rotate

_MAX_BATCH = 65535
"""Attention kernels put the batch on a CUDA grid axis of this size; attention over time has a "batch" of clips x positions."""


_SHORT = 64
"""Up to this many keys a CPU is faster with plain products: its fused kernel costs something per sample and head, in bf16 most of all."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v for (B, H, N, E) of any strides with a dense last axis."""
    if q.device.type == "cpu" and k.shape[2] <= _SHORT:
        return _plain(q, k, v)
    if q.shape[0] <= _MAX_BATCH:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(q.split(_MAX_BATCH), k.split(_MAX_BATCH), v.split(_MAX_BATCH), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in the open, scores in float32 at least, as the fused kernels hold them."""
    with torch.autocast(q.device.type, enabled=False):
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(exact) * q.shape[-1] ** -0.5) @ k.to(exact).transpose(-1, -2)
        return scores.softmax(dim=-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention over axis 1 or axis 0 of a (N, M, D) or (M, N, D) tensor; fused qkv, output linear with bias."""

    def __init__(self, dim: int, heads: int, head_dim: int = 0, qkv_bias: bool = True) -> None:
        """`head_dim` 0: dim / heads."""
        super().__init__()
        self.heads = heads
        width = heads * head_dim or dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, rope: Tables | None = None, over_first: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), or (N, B, D) -> (N, B, D) when `over_first`; `rope` turns queries and keys by position.

        Queries, keys and values are views of the fused linear in either layout, and the kernel's output has the axis order in memory
        of its queries, so nothing is copied.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, E), or N first
        q, k, v = (qkv.permute(2, 1, 3, 0, 4) if over_first else qkv.permute(2, 0, 3, 1, 4)).unbind(0)  # (B, H, N, E)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = sdpa(q, k, v)  # (B, H, N, E)
        return self.proj((out.permute(2, 0, 1, 3) if over_first else out.transpose(1, 2)).flatten(2))

    def read(self, x: Tensor, position: int) -> Tensor:
        """(B, N, D) -> (B, D): `forward(x)[:, position]`, with the queries of the other positions left out."""
        weight, bias, width = self.qkv.weight, self.qkv.bias, self.proj.in_features
        q = F.linear(x[:, position], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, E)
        return self.proj(sdpa(q.unflatten(-1, (self.heads, 1, -1)), k, v).flatten(1))
