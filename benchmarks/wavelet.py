"""The 3-D Haar transform's forms side by side: forward, and forward with an L1 loss and backward.

Ours (each axis split into pairs, one product with an 8 x 8 matrix), a convolution with eight filters a channel, sums and differences axis
by axis, eight strided corners that are added up, and PyWavelets, which has no gradient. All must give the same subbands.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import CLOCKS, alternate, machine, processes, seconds
from models.layers.wavelet import BANDS, haar3d

SHAPES = ((1, 3, 16, 256, 256), (4, 3, 16, 256, 256), (2, 3, 16, 128, 128))
AGREE = 1e-5
"""Largest difference of two forms' subbands of clips in [-1, 1]."""


def convolution(x: Tensor) -> Tensor:
    """(b, c, t, h, w) -> (b, 8, c, t/2, h/2, w/2), a view: the convolution gives the bands of a channel beside each other."""
    c = x.shape[1]
    kernels = filters(x.device)[:, None].repeat(c, 1, 1, 1, 1)  # (c 8, 1, 2, 2, 2)
    return F.conv3d(x, kernels, stride=2, groups=c).unflatten(1, (c, 8)).transpose(1, 2)


def butterflies(x: Tensor) -> Tensor:
    """The same by sums and differences of neighbours along one axis after the other."""
    parts = [x]
    for axis in (2, 3, 4):
        pairs = [part.unflatten(axis, (-1, 2)).unbind(axis + 1) for part in parts]
        parts = [half for a, b in pairs for half in ((a + b) * 0.5**0.5, (a - b) * 0.5**0.5)]
    return torch.stack(parts, dim=1)


def corners(x: Tensor) -> Tensor:
    """The same by adding up the eight corners of each cube with their signs."""
    cubes = [x[:, :, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    signs = filters(x.device).flatten(1).sign().tolist()
    bands = [sum((sign * cube for sign, cube in zip(row, cubes, strict=True)), torch.zeros_like(cubes[0])) for row in signs]
    return torch.stack(bands, dim=1) * 8**-0.5


def pywavelets(x: Tensor) -> Tensor:
    """The same by PyWavelets, on the CPU."""
    found = pywt.dwtn(x.detach().cpu().numpy(), "haar", axes=(2, 3, 4))
    return torch.from_numpy(np.stack([found[band.replace("L", "a").replace("H", "d")] for band in BANDS], axis=1)).to(x.device)


def filters(device: torch.device) -> Tensor:
    """(8, 2, 2, 2): how each subband weighs a cube."""
    low, high = torch.tensor([1.0, 1.0], device=device), torch.tensor([1.0, -1.0], device=device)
    taps = [[high if letter == "H" else low for letter in band] for band in BANDS]
    return torch.stack([t[:, None, None] * h[None, :, None] * w for t, h, w in taps]) * 8**-0.5


Form = Callable[[Tensor], Tensor]
FORMS: dict[str, Form] = {
    "8x8 product (ours)": haar3d,
    "grouped convolution": convolution,
    "sums and differences": butterflies,
    "strided corners": corners,
    "PyWavelets": pywavelets,
}
OURS = "8x8 product (ours)"


def trained(form: Form, x: Tensor, target: Tensor) -> Tensor:
    """Gradient of the mean absolute difference of the subbands."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad((form(x) - target).abs().mean(), x)
    return gradient


def measure(shape: tuple[int, ...], args: argparse.Namespace, device: torch.device) -> None:
    """Prints a table of the forms."""
    x = torch.rand(shape, device=device) * 2 - 1
    target = haar3d(torch.rand_like(x) * 2 - 1)
    apart = {name: float((form(x) - haar3d(x)).abs().max()) for name, form in FORMS.items()}
    assert max(apart.values()) < AGREE, f"the forms are not the same: {apart}"
    learning = {name: form for name, form in FORMS.items() if form is not pywavelets}
    print(f"{'x'.join(map(str, shape))}; forms apart by at most {max(apart.values()):.1e}, allowed {AGREE:g}")
    forward = {name: functools.partial(form, x) for name, form in FORMS.items()}
    backward = {name: functools.partial(trained, form, x, target) for name, form in learning.items()}
    for words, rounds in (("forward", forward), ("forward, L1, backward", backward)):
        for work in rounds.values():
            seconds(work, device)
        medians = alternate(rounds, args.rounds, device, CLOCKS[args.clock])
        for name, median in medians.items():
            print(f"  {words:<22}{name:<22}{median * 1e3:>9.2f} ms   {median / medians[OURS]:.2f} times the time of ours", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", type=int, nargs=5, metavar=("B", "C", "T", "H", "W"), help="one shape instead of three")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all forms, of which the median counts (default 9)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    args = parser.parse_args()
    if args.device == "cuda" and (not cuda or args.clock == "cpu"):
        parser.error("--device cuda: torch sees no GPU here, or --clock cpu was asked for, which does not see it")
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        print(f"median {args.clock} time of {args.rounds} alternating rounds")
        for shape in [tuple(args.shape)] if args.shape else SHAPES:
            measure(shape, args, env.device)


if __name__ == "__main__":
    main()
