"""One training step of Latte: ours against the same network written down plainly from the paper, both in bf16, in one run.

The plain network rearranges its tokens for every block, repeats the condition for every row, and writes attention out. Both start
from the same weights and must give the same outputs. A step is loss with learned variance, backward, norm and clipping, fused
AdamW, moving average. With `--device cuda` also clips/s, memory, and the share of the measured peak of a matrix product (MFU).
"""

import argparse
import dataclasses
import functools

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import CLOCKS, OURS, VARIANTS, StepTrainer, alternate, machine, processes, ratio_lines, seconds
from benchmarks.products import bound_line
from diffusion import DiffusionConfig, build
from engine.config import EmaConfig, OptimConfig
from launch.env import Env
from models import resolve
from models.layers.embeddings import frame_table, grid_table, timestep_frequencies
from models.transformers.latte import Latte, LatteConfig

AGREE = 1e-4
"""Largest difference of the two networks' outputs in fp32, relative to the largest output."""


class PlainBlock(nn.Module):
    """Modulated attention and MLP on (rows, tokens, D) with a condition for each row."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads, self.scale = config.num_heads, (d // config.num_heads) ** -0.5
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(normed(x) * (1 + scale1) + shift1)
        h = self.mlp["fc1"](normed(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp["fc2"](gelu(h, approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.attn["qkv"](x), "r n (k h e) -> k r h n e", k=3, h=self.heads)
        weights = (q @ k.transpose(2, 3) * self.scale).softmax(dim=3)
        return self.attn["proj"](rearrange(weights @ v, "r h n e -> r n (h e)"))


class PlainLatte(nn.Module):
    """Latte without labels and text, in the official conventions, with the state names of ours."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config, d, p = config, config.hidden_size, config.patch_size
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, d, p, p)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))})
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(d, p * p * config.out_channels), "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))}
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, T, h, w), t (B,) -> (B, 2 C, T, h, w)."""
        frames, (rows, columns), d = x.shape[2], self.config.grid, self.config.hidden_size
        x = rearrange(self.x_embedder["proj"](rearrange(x, "b c f h w -> (b f) c h w")), "r d h w -> r (h w) d")
        x = x + grid_table(d, self.config.grid, "wh", x.device)
        c = self.t_embedder["mlp"](timestep_frequencies(t, 256))
        in_space, in_time = repeat(c, "b d -> (b f) d", f=frames), repeat(c, "b d -> (b n) d", n=rows * columns)
        for k in range(0, len(self.blocks), 2):
            x = rearrange(self.blocks[k](x, in_space), "(b f) n d -> (b n) f d", f=frames)
            if k == 0:
                x = x + frame_table(d, frames, x.device)
            x = rearrange(self.blocks[k + 1](x, in_time), "(b n) f d -> (b f) n d", n=rows * columns)
        shift, scale = self.final_layer["adaLN_modulation"](in_space)[:, None].chunk(2, dim=2)
        x = self.final_layer["linear"](normed(x) * (1 + scale) + shift)
        p = self.config.patch_size
        return rearrange(x, "(b f) (h w) (p q c) -> b c f (h p) (w q)", f=frames, h=rows, p=p, q=p)


def normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def networks(config: LatteConfig) -> tuple[Latte, PlainLatte]:
    """Ours and the plain one with the same random weights everywhere: fresh ones would skip what the gates multiply by zero."""
    torch.manual_seed(0)
    ours, plain = Latte(config), PlainLatte(config)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@torch.no_grad()
def difference(config: LatteConfig, device: torch.device) -> float:
    """How far the two are apart on one clip in fp32, relative to the largest output."""
    ours, plain = (network.to(device) for network in networks(config))
    x, t = torch.randn(1, config.in_channels, config.n_frames, *config.input_size, device=device), torch.tensor([500], device=device)
    out = ours(x, t)
    return float((out - plain(x, t)).abs().max() / out.abs().max())


def make_trainer(name: str, config: LatteConfig, args: argparse.Namespace, env: Env) -> StepTrainer:
    """One variant, on a made-up batch of latents that lies on the device."""
    is_ours, how = VARIANTS[name]
    recompute = {"activation_checkpointing": args.activation_checkpointing} if is_ours else {}
    diffusion = build(DiffusionConfig())
    shape = (args.batch_size, config.in_channels, config.n_frames, *config.input_size)
    x0, noise = (torch.randn(shape, device=env.device) for _ in range(2))
    t = torch.randint(0, 1000, shape[:1], device=env.device)

    def loss(module: nn.Module) -> Tensor:
        return diffusion.training_losses(module, x0, t, noise, {})["loss"].mean()

    network = networks(config)[0 if is_ours else 1]
    return StepTrainer(network, is_ours, how | recompute, loss, env, OptimConfig(clip_norm=1.0), EmaConfig())


def flops_per_clip(config: LatteConfig) -> float:
    """FLOPs of a training step for one clip: forward and, twice as many, backward. Recomputation does not count."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Latte(config)(torch.empty(1, config.in_channels, config.n_frames, *config.input_size), torch.empty(1))
    return 3 * counter.get_total_flops()


def peak(device: torch.device, side: int = 8192, rounds: int = 20) -> float:
    """FLOP/s of a large bf16 matrix product on the device, as measured."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(rounds):
            a @ b

    products()
    return 2 * side**3 * rounds / seconds(products, device)


def measure(config: LatteConfig, args: argparse.Namespace, env: Env) -> None:
    """Prints the table."""
    cuda = env.device.type == "cuda"
    apart = difference(config, env.device)
    print(f"plain and ours apart by {apart:.1e} of the largest output in fp32, allowed {AGREE:g}")
    assert apart < AGREE, "the two networks are not the same"
    trainers, first, memory = {}, {}, {}
    for name in [name for name in VARIANTS if name in args.variants]:
        before = torch.cuda.memory_allocated() if cuda else 0
        trainers[name] = make_trainer(name, config, args, env)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        first[name] = seconds(trainers[name].step, env.device)
        trainers[name].step()
        memory[name] = torch.cuda.max_memory_allocated() - before if cuda else 0
    rounds = {name: functools.partial(trainer.steps, args.steps) for name, trainer in trainers.items()}
    medians = alternate(rounds, args.rounds, env.device, CLOCKS[args.clock])
    flops, able = flops_per_clip(config), peak(env.device) if cuda else 0.0
    if cuda:
        print(f"{flops / 1e12:.2f} TFLOP a clip; measured peak of a bf16 matrix product {able / 1e12:.0f} TFLOP/s")
    notes = {}
    for name in medians if cuda else ():
        mfu = flops * args.batch_size * args.steps / medians[name] / able
        notes[name] = f"   {memory[name] / 2**30:.1f} GiB   MFU {mfu:.1%}"
    for line in ratio_lines(medians, args.steps, args.batch_size, first, notes):
        print(line, flush=True)
    if OURS in trainers and not cuda:
        print(bound_line(trainers[OURS].step, medians, args.steps, CLOCKS[args.clock]), flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", default="", help="a named size; default: Latte-XL/2 with a GPU, else Latte-S/2")
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="height and width of the latents (default 32)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--depth", type=int, default=0, help="blocks; default: of the named size")
    parser.add_argument("--batch-size", type=int, default=0, help="clips per step; default: 16 with a GPU, else 1")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None, help="default: all; with a GPU compiled bf16 alone")
    parser.add_argument("--activation-checkpointing", choices=("none", "block", "selective"), default="none", help="of ours")
    parser.add_argument("--steps", type=int, default=0, help="steps per round; default: 10 with a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants, of which the median counts (default 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not cuda:
        parser.error("--device cuda: torch sees no GPU here")
    if on_gpu and args.clock == "cpu":
        parser.error("--clock cpu: a GPU's work is not seen by the processor's clock")
    args.batch_size = args.batch_size or (16 if on_gpu else 1)
    args.steps = args.steps or (10 if on_gpu else 1)
    args.variants = args.variants or (["compiled bf16"] if on_gpu else list(VARIANTS))
    size = {"input_size": (args.size[0], args.size[-1]), "n_frames": args.frames}
    name = args.model or ("Latte-XL/2" if on_gpu else "Latte-S/2")
    config = resolve(name, "Latte", **size, **({"depth": args.depth} if args.depth else {}))
    torch.set_float32_matmul_precision("high")  # as in training
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        how = f"median {args.clock} time of {args.rounds} alternating rounds of {args.steps} step(s)"
        shape = "x".join(map(str, (args.frames, *config.input_size)))
        print(f"{name}, {args.batch_size} clip(s) of {shape} latents a step; {how}", flush=True)
        measure(config, args, env)


if __name__ == "__main__":
    main()
