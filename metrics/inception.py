"""Inception v3 (Szegedy et al. 2016) as TensorFlow published it on 2015-12-05, which FID is measured with (Heusel et al. 2017).

It differs from torchvision's Inception v3 in its weights, in 1008 classes, and in three places of arithmetic: average pooling counts
no padding, the last block pools by the maximum, and pixels are scaled to [-1, 1] with no mean and deviation of a data set. The layers
bear the names of pt_inception-2015-12-05-6726825d.pth, so that file loads as it is. Letters: N images.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.published import WeightFile
from utils.weights import load_tensors

FILE = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth", "91 MB", flag="--inception", also="NVIDIA's TorchScript of the network, inception-2015-12-05.pt"
)
SIZE = 299
"""Height and width of the input."""
DIM = 2048
"""Features: the mean of the last map over its positions."""

Kernel = int | tuple[int, int]
Units = dict[str, tuple[str, int, Kernel]]
"""Name of a unit -> name of what it reads (INPUT, POOLED or a unit before it), output channels, kernel."""
INPUT, POOLED = "input", "pooled"
ROW, COLUMN = (1, 7), (7, 1)


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels, out, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Units side by side and behind each other, and a pooling; what nothing reads is concatenated on the channels."""

    def __init__(self, channels: int, units: Units, pooling: Literal["average", "largest", "halve"]) -> None:
        """`halve`: the largest of every second window; the units whose output leaves the block take every second position too, unpadded."""
        super().__init__()
        self.pooling, self.units = pooling, units
        read = {source for source, _, _ in units.values()}
        self.outputs = [name for name in (*units, POOLED) if name not in read]
        widths = {INPUT: channels, POOLED: channels}
        for name, (source, out, kernel) in units.items():
            halved = pooling == "halve" and name in self.outputs
            self.add_module(name, Unit(widths[source], out, kernel, stride=2 if halved else 1, pad=not halved))
            widths[name] = out
        self.width = sum(widths[name] for name in self.outputs)

    def pool(self, x: Tensor) -> Tensor:
        """3x3 windows."""
        if self.pooling == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=2) if self.pooling == "halve" else F.max_pool2d(x, 3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = {INPUT: x, POOLED: self.pool(x)}
        for name, (source, _, _) in self.units.items():
            seen[name] = self.get_submodule(name)(seen[source])
        return torch.cat([seen[name] for name in self.outputs], dim=1)


def _five(pooled: int) -> Units:
    """A block at 35x35."""
    units: Units = {"branch1x1": (INPUT, 64, 1), "branch5x5_1": (INPUT, 48, 1), "branch5x5_2": ("branch5x5_1", 64, 5)}
    units |= {"branch3x3dbl_1": (INPUT, 64, 1), "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3), "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3)}
    return units | {"branch_pool": (POOLED, pooled, 1)}


def _seven(inner: int) -> Units:
    """A block at 17x17."""
    units: Units = {"branch1x1": (INPUT, 192, 1), "branch7x7_1": (INPUT, inner, 1), "branch7x7_2": ("branch7x7_1", inner, ROW)}
    units |= {"branch7x7_3": ("branch7x7_2", 192, COLUMN), "branch7x7dbl_1": (INPUT, inner, 1)}
    units |= {"branch7x7dbl_2": ("branch7x7dbl_1", inner, COLUMN), "branch7x7dbl_3": ("branch7x7dbl_2", inner, ROW)}
    units |= {"branch7x7dbl_4": ("branch7x7dbl_3", inner, COLUMN), "branch7x7dbl_5": ("branch7x7dbl_4", 192, ROW)}
    return units | {"branch_pool": (POOLED, 192, 1)}


_HALVE_35: Units = {
    "branch3x3": (INPUT, 384, 3),
    "branch3x3dbl_1": (INPUT, 64, 1),
    "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3),
    "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3),
}
_HALVE_17: Units = {
    "branch3x3_1": (INPUT, 192, 1),
    "branch3x3_2": ("branch3x3_1", 320, 3),
    "branch7x7x3_1": (INPUT, 192, 1),
    "branch7x7x3_2": ("branch7x7x3_1", 192, ROW),
    "branch7x7x3_3": ("branch7x7x3_2", 192, COLUMN),
    "branch7x7x3_4": ("branch7x7x3_3", 192, 3),
}
_WIDE: Units = {
    "branch1x1": (INPUT, 320, 1),
    "branch3x3_1": (INPUT, 384, 1),
    "branch3x3_2a": ("branch3x3_1", 384, (1, 3)),
    "branch3x3_2b": ("branch3x3_1", 384, (3, 1)),
    "branch3x3dbl_1": (INPUT, 448, 1),
    "branch3x3dbl_2": ("branch3x3dbl_1", 384, 3),
    "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3)),
    "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1)),
    "branch_pool": (POOLED, 192, 1),
}


class FidInception(nn.Module):
    """The network in evaluation mode, random until weights are loaded (`load_inception`)."""

    def __init__(self, classes: int = 1008) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, pad=False)
        self.Mixed_5b = Block(192, _five(32), "average")
        self.Mixed_5c = Block(256, _five(64), "average")
        self.Mixed_5d = Block(288, _five(64), "average")
        self.Mixed_6a = Block(288, _HALVE_35, "halve")
        self.Mixed_6b = Block(768, _seven(128), "average")
        self.Mixed_6c = Block(768, _seven(160), "average")
        self.Mixed_6d = Block(768, _seven(160), "average")
        self.Mixed_6e = Block(768, _seven(192), "average")
        self.Mixed_7a = Block(768, _HALVE_17, "halve")
        self.Mixed_7b = Block(1280, _WIDE, "average")
        self.Mixed_7c = Block(DIM, _WIDE, "largest")
        self.fc = nn.Linear(DIM, classes)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 2048) of images (N, 3, 299, 299) in [-1, 1]. ValueError for another size."""
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"Inception takes (any, 3, {SIZE}, {SIZE}), not {list(images.shape)}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return x.mean(dim=(2, 3))


def load_inception(path: str | Path) -> FidInception:
    """The network with the weights of a file of these names. Raises UserError, of one line, for others."""
    tensors = load_tensors(path)
    rows = len(tensors["fc.weight"]) if isinstance(tensors.get("fc.weight"), Tensor) else 1008
    if rows == 1000:
        raise UserError(f"{path} is torchvision's Inception v3 (1000 classes), another network than FID's: give {FILE.name}")
    with torch.device("meta"):
        net = FidInception()
    # Counts of training steps, which nothing here reads and the file lacks.
    wanted = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, value in wanted.items():
        found = tensors.get(name)
        if not isinstance(found, Tensor) or found.shape != value.shape:
            has = f"of shape {list(found.shape)}" if isinstance(found, Tensor) else "missing"
            raise UserError(f"{path} is not the Inception of 1008 classes that FID uses ({FILE.name}): {name} is {has}")
    counts = {name: torch.zeros(()) for name in net.state_dict() if name not in wanted}
    net.load_state_dict({name: tensors[name].float() for name in wanted} | counts, assign=True)
    return net.requires_grad_(False)


def preprocess(images: Tensor) -> Tensor:
    """uint8 (N, 3, h, w) -> float32 (N, 3, 299, 299) in [-1, 1]: both sides stretched, bilinear with half-pixel centres, no antialias.

    As the file's own project does it; TensorFlow's first FID had its pixel centres at corners, which NVIDIA's TorchScript repeats.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images of {images.dtype}: uint8 is wanted, as they are stored")
    return F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False) * 2 - 1
