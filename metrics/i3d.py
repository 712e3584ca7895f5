"""I3D (Carreira and Zisserman 2017): Inception v1 with its filters inflated over time, trained on the 400 classes of Kinetics.

The layers bear the names of the weights that PVDM, HVDM and CMD compute FVD with (i3d_pretrained_400.pt), so that file loads as it is.
Letters: B batch, T frames.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.weights import load_tensors

SIZE = 224
"""Height and width of the input: the last pooling covers 7 x 7 positions, which is what 224 pixels become."""
MIN_FRAMES = 9
"""Fewer leave less than the two positions in time that the last pooling covers."""

Triple = tuple[int, int, int]

INCEPTION: tuple[tuple[str, int, tuple[int, int, int, int, int, int]], ...] = (
    ("Mixed_3b", 192, (64, 96, 128, 16, 32, 32)),
    ("Mixed_3c", 256, (128, 128, 192, 32, 96, 64)),
    ("Mixed_4b", 480, (192, 96, 208, 16, 48, 64)),
    ("Mixed_4c", 512, (160, 112, 224, 24, 64, 64)),
    ("Mixed_4d", 512, (128, 128, 256, 24, 64, 64)),
    ("Mixed_4e", 512, (112, 144, 288, 32, 64, 64)),
    ("Mixed_4f", 528, (256, 160, 320, 32, 128, 128)),
    ("Mixed_5b", 832, (256, 160, 320, 32, 128, 128)),
    ("Mixed_5c", 832, (384, 192, 384, 48, 128, 128)),
)
"""Name, input channels, and output channels of: 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; pooling then 1x1x1."""


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded as TensorFlow does ("same")."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out)  # eps 1e-5 as in the port with these names; 1e-3 elsewhere moves the logits by 1 %

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size[0], self.conv3d.stride[0]
        return F.relu(self.bn(self.conv3d(same(x, (kernel,) * 3, (stride,) * 3))))


class Inception(nn.Module):
    """Four branches side by side, concatenated on the channels."""

    def __init__(self, channels: int, out: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = Unit(channels, out[0])
        self.b1a, self.b1b = Unit(channels, out[1]), Unit(out[1], out[2], 3)
        self.b2a, self.b2b = Unit(channels, out[3]), Unit(out[3], out[4], 3)
        self.b3b = Unit(channels, out[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Logits(nn.Module):
    """The classifier, a convolution of size one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """The network in evaluation mode, random until weights are loaded (`load_i3d`)."""

    def __init__(self, num_classes: int = 400) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        for name, channels, out in INCEPTION:
            self.add_module(name, Inception(channels, out))
        self.logits = Logits(num_classes)
        self.eval()

    def forward(self, video: Tensor) -> Tensor:
        """Logits (B, classes), the mean over time, of videos (B, 3, T >= 9, 224, 224) in [-1, 1]. ValueError for another size."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE) or video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D takes (any, 3, at least {MIN_FRAMES} frames, {SIZE}, {SIZE}), not {list(video.shape)}")
        x = pool(self.Conv3d_1a_7x7(video), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name, _, _ in INCEPTION:
            if name == "Mixed_4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (B, 1024, positions in time, 1, 1)
        return self.logits(x).mean(dim=(2, 3, 4))


def same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """x (B, C, T, H, W) padded with zeros so that ceil(size / stride) positions come out; an odd one goes behind."""
    padding: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad wants the last axis first
    return F.pad(x, padding) if any(padding) else x


def pool(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """The largest of each window. Zeros at the border change nothing: x comes out of a ReLU."""
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


def load_i3d(path: str | Path) -> I3D:
    """The network with the weights of a file (i3d_pretrained_400.pt, or a safetensors file of its tensors). Raises UserError."""
    tensors = {name.removeprefix("module."): value for name, value in load_tensors(path).items()}
    bias = tensors.get("logits.conv3d.bias")
    net = I3D(len(bias) if isinstance(bias, Tensor) else 400)
    # Counts of training steps, which nothing here reads and some files lack.
    wanted = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, value in wanted.items():
        if name not in tensors or tensors[name].shape != value.shape:
            has = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
            raise UserError(f"{path} is not the I3D of 400 classes that FVD uses (i3d_pretrained_400.pt): {name} is {has}")
    net.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    return net.requires_grad_(False)
