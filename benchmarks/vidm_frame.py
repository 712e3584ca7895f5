"""One frame of VIDM's videos with and without what its denoising steps can share, in one run: the pixels must be the same.

Without, every step of every video has the whole forward pass: flow, maps of PosGN, first-frame features, UNet. With, the flow is computed
once a frame and the maps once a step for all videos (pipelines/vidm_frame.py). Both for videos that go through the network together and
for videos that go through it one by one (--exact of sample.py), where the pixels are the same to the last bit.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import CLOCKS, alternate, machine, processes
from diffusion import DiffusionConfig
from models import resolve
from models.unets.vidm_motion import MotionUNet
from pipelines.loading import Loaded
from pipelines.sampling import Sampling, in_groups, sample
from pipelines.vidm import Drawing, VIDMPipeline
from utils.config import to_dict

AGREE = 5e-4
"""Largest difference of pixels in [-1, 1] where videos go through together: matrix products of other shapes round differently, and
every step carries that on."""
FRAME = 1


def pipeline_of(args: argparse.Namespace, device: torch.device) -> VIDMPipeline:
    """With random weights everywhere: what starts at zero would be no work to tell apart."""
    given = {name: getattr(args, name) for name in ("channel_mult", "num_res_blocks") if getattr(args, name) is not None}
    given |= {"image_size": tuple(args.image_size), "model_channels": args.model_channels}
    config = resolve("VIDM-motion", **given, num_head_channels=min(64, args.model_channels))
    torch.manual_seed(0)
    network = MotionUNet(config)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    card = {"diffusion": to_dict(DiffusionConfig(steps=config.diffusion_timesteps))}
    return VIDMPipeline(Loaded(network.eval().requires_grad_(False), config, card, "", "random weights"), device=device)


def whole_forward(pipeline: VIDMPipeline, first: Tensor, previous: Tensor, drawing: Drawing) -> Tensor:
    """The frames b 3 h w, every step by the forward pass that training has."""
    made = []
    process = DiffusionConfig(**pipeline.motion.card["diffusion"])
    groups = in_groups(range(len(first)), None, None, seed=drawing.seed, num_classes=0, exact=drawing.exact, device=pipeline.device)
    for group, rng, _ in groups:
        index = torch.full((len(group),), FRAME, device=pipeline.device)
        given = {"frame": index, "previous": previous[group], "first": first[group]}
        shape = (3, *pipeline.image_size)
        made.append(sample(pipeline.network, process, shape, rng, f"motion/frame-{FRAME}", drawing.motion, always=given))
    return torch.cat(made).clamp(-1, 1)


def measure(pipeline: VIDMPipeline, args: argparse.Namespace, device: torch.device) -> None:
    """Prints what each way takes, and how far their pixels are apart."""
    generator = torch.Generator(device).manual_seed(1)
    first, previous = (torch.rand(args.videos, 3, *pipeline.image_size, device=device, generator=generator) * 2 - 1 for _ in range(2))
    for words, exact in (("together", False), ("one by one", True)):
        sampling = Sampling(steps=args.steps, sampler="ddpm", clip=True)
        drawing = Drawing(motion=sampling, exact=exact)
        ways: dict[str, Callable[[], Tensor]] = {
            "the whole forward pass": functools.partial(whole_forward, pipeline, first, previous, drawing),
            "shared (ours)": functools.partial(pipeline.next_frames, range(args.videos), first, previous, FRAME, drawing),
        }
        whole, shared = (way() for way in ways.values())
        apart = float((whole - shared).abs().max())
        assert apart == 0 if exact else apart < AGREE, f"the pixels are not the same: {apart:.1e} apart"
        medians = alternate(ways, args.rounds, device, CLOCKS[args.clock])
        slowest = max(medians.values())
        print(f"{args.videos} videos {words}: pixels apart by at most {apart:.1e}, {'0' if exact else f'{AGREE:g}'} allowed")
        for name, median in medians.items():
            print(f"  {name:<24}{median * 1e3:>10.1f} ms a frame   {slowest / median:.2f} times as fast", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--videos", type=int, default=8, help="videos that are made together (default 8)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of the frame (default 2; all cost the same)")
    parser.add_argument("--image-size", type=int, nargs=2, default=[64, 64], metavar=("H", "W"), help="(default 64 64; paper 128 128)")
    parser.add_argument("--model-channels", type=int, default=64, help="width (default 64; paper 128)")
    parser.add_argument("--channel-mult", type=int, nargs="+", help="widths of the levels over it in place of the paper's")
    parser.add_argument("--num-res-blocks", type=int, help="residual blocks of a level in place of the paper's")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both ways, of which the median counts (default 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    args = parser.parse_args()
    if args.device == "cuda" and (not cuda or args.clock == "cpu"):
        parser.error("--device cuda: torch sees no GPU here, or --clock cpu was asked for, which does not see it")
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        pipeline = pipeline_of(args, env.device)
        size = sum(parameter.numel() for parameter in pipeline.network.parameters()) / 1e6
        height, width = pipeline.image_size
        print(
            f"{height}x{width}, {size:.1f} million parameters, {args.steps} steps, fp32; median {args.clock} time of {args.rounds} rounds"
        )
        measure(pipeline, args, env.device)


if __name__ == "__main__":
    main()
