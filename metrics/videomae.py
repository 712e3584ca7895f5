"""VideoMAE's ViT-g/14 (Tong et al. 2022; Wang et al. 2023), finetuned on Something-Something v2, for a distance that looks at motion.

Content-debiased FVD (Ge et al. 2024) takes its pooled features in place of I3D's logits, of pixels / 255 without mean and deviation. A
video becomes cubes of 2 x 14 x 14 pixels, one token each; all tokens attend to all. The layers bear the names of
vit_g_hybrid_pt_1200e_ssv2_ft.pth, so that file loads as it is. Letters: B batch, N tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.errors import UserError
from utils.weights import load_tensors

FILE = "vit_g_hybrid_pt_1200e_ssv2_ft.pth"


@dataclass(frozen=True)
class VideoMaeConfig:
    """Sizes of the network; those of the published file where nothing else is said."""

    width: int = 1408
    depth: int = 40
    heads: int = 16
    hidden: int = 6144
    """Of the feed-forward layers: 48 / 11 of the width."""
    classes: int = 174
    frames: int = 16
    size: int = 224
    """Height and width of the input."""
    tubelet: int = 2
    """Frames of a token."""
    patch: int = 14
    """Height and width of a token."""

    @property
    def tokens(self) -> int:
        return (self.frames // self.tubelet) * (self.size // self.patch) ** 2


class Attention(nn.Module):
    """All tokens to all; queries and values have a bias, keys none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = rearrange(F.linear(x, self.qkv.weight, bias), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention, then feed-forward, each on normalised tokens and added to them."""

    def __init__(self, config: VideoMaeConfig) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.width, eps=1e-6), Attention(config.width, config.heads)
        self.norm2, self.mlp = nn.LayerNorm(config.width, eps=1e-6), Mlp(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cubes of pixels to tokens."""

    def __init__(self, config: VideoMaeConfig) -> None:
        super().__init__()
        cube = (config.tubelet, config.patch, config.patch)
        self.proj = nn.Conv3d(3, config.width, cube, stride=cube)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, t, h, w) -> (B, N, D): time first, then rows, then columns."""
        return rearrange(self.proj(x), "b d t h w -> b (t h w) d")


class VideoMae(nn.Module):
    """The network in evaluation mode, random until weights are loaded (`load_videomae`)."""

    def __init__(self, config: VideoMaeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VideoMaeConfig()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        self.eval()

    def forward(self, video: Tensor) -> Tensor:
        """Features (B, D), the normalised mean over tokens, of videos (B, 3, T, size, size) in [0, 1]. ValueError for another size."""
        wanted = (3, self.config.frames, self.config.size, self.config.size)
        if video.ndim != 5 or tuple(video.shape[1:]) != wanted:
            raise ValueError(f"VideoMAE takes {wanted[1]} frames of {wanted[2]} x {wanted[3]}, not {list(video.shape)}")
        x = self.patch_embed(video)
        x = x + positions(self.config.tokens, self.config.width).to(x)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))


def positions(count: int, width: int) -> Tensor:
    """Position table (count, width): sine at even places, cosine at odd ones (Vaswani et al. 2017), of the token's number."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def load_videomae(path: str | Path, config: VideoMaeConfig | None = None) -> VideoMae:
    """The network with the weights of a file, its own state dict or one under `module` or `model`. Raises UserError, of one line."""
    tensors: Mapping[str, Any] = load_tensors(path)
    tensors = next((tensors[name] for name in ("module", "model") if isinstance(tensors.get(name), Mapping)), tensors)
    with torch.device("meta"):
        net = VideoMae(config)
    for name, value in net.state_dict().items():
        found = tensors.get(name)
        if not isinstance(found, Tensor) or found.shape != value.shape:
            has = f"of shape {list(found.shape)}" if isinstance(found, Tensor) else "missing"
            raise UserError(f"{path} is not VideoMAE's ViT-g/14 ({FILE}): {name} is {has}, {list(value.shape)} is wanted")
    net.load_state_dict({name: tensors[name].float() for name in net.state_dict()}, assign=True)
    return net.requires_grad_(False)
