"""One training step of PVDM's networks: ours against the same networks written down plainly from the paper, in one run.

The plain autoencoder rearranges its tokens for every attention, writes attention out, and projects all positions; the plain UNet
takes the three planes one after the other and writes attention out. They have the weights of ours and must give the same outputs.
A step is loss, backward, norm, fused AdamW, and for the UNet the moving average.
"""

import argparse
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from benchmarks.common import CLOCKS, VARIANTS, StepTrainer, alternate, machine, processes, ratio_lines, seconds
from diffusion import DiffusionConfig, build
from engine.config import EmaConfig
from launch.env import Env
from models import resolve
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.layers.attention import SelfAttention
from models.layers.planes import PLANES, PlaneProjection, join_planes, split_planes
from models.layers.rotary import Tables, grid_tables, rotate, time_tables
from models.layers.timesformer import GatedFeedForward
from models.unets.adm import AttentionBlock, ResBlock
from models.unets.plane_stages import Stage
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig

AGREE = 1e-4
"""Largest difference of the two networks' outputs in fp32, relative to the largest output."""


# ---- the plain UNet


class PlainUNet(nn.Module):
    """Three planes, one after the other."""

    def __init__(self, ours: PlaneUNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(ours)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, L), t (B,) -> (B, C, L)."""
        net = self.net
        planes = list(split_planes(torch.cat([x, torch.zeros_like(x)], dim=1), net.config.plane_shapes))
        emb, skips = net.t_embedder(t), []
        for stage in net.input_blocks:
            planes = plain_stage(stage, planes, emb)
            skips.append(planes)
        planes = plain_stage(net.middle_block, planes, emb)
        for stage in net.output_blocks:
            planes = plain_stage(stage, [torch.cat(pair, dim=1) for pair in zip(planes, skips.pop(), strict=True)], emb)
        return join_planes(*(net.out.conv(F.silu(norm32(net.out.norm, plane))) for plane in planes))


def norm32(norm: nn.Module, x: Tensor) -> Tensor:
    """Group norm in float32."""
    return norm(x.float()).to(x.dtype)


def plain_stage(stage: Stage, planes: list[Tensor], emb: Tensor) -> list[Tensor]:
    """Layers on each plane, then attention over all of them as one sequence."""
    for layer in stage.layers:
        if isinstance(layer, ResBlock):
            planes = [plain_residual(layer, plane, emb) for plane in planes]
        elif isinstance(layer, AttentionBlock):
            planes = [rearrange(plain_block(layer, plane.flatten(2)), "b c (h w) -> b c h w", h=plane.shape[2]) for plane in planes]
        else:
            planes = [layer(plane) for plane in planes]
    if stage.across is not None:
        planes = list(split_planes(plain_block(stage.across, join_planes(*planes)), [plane.shape[2:] for plane in planes]))
    return planes


def plain_residual(block: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    h = F.silu(norm32(block.in_layers[0], x))
    if block.kind == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif block.kind == "up":
        h, x = (F.interpolate(value, scale_factor=2, mode="nearest") for value in (h, x))
    h = block.in_layers[2](h)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    h = norm32(block.out_layers[0], h) * (1 + scale) + shift
    skip = block.skip_connection
    x = x if isinstance(skip, nn.Identity) else F.conv2d(x, skip.weight, skip.bias)
    return x + block.out_layers[3](F.silu(h))


def plain_block(block: AttentionBlock, x: Tensor) -> Tensor:
    """(B, C, N) -> (B, C, N)."""
    qkv = F.conv1d(norm32(block.norm, x), block.qkv.weight[..., None], block.qkv.bias)
    q, k, v = rearrange(qkv, "b (h k c) n -> k (b h) c n", h=block.heads, k=3)
    scale = q.shape[1] ** -0.25
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).float().softmax(dim=2).to(v.dtype)
    h = rearrange(torch.einsum("bts,bcs->bct", weights, v), "(b h) c n -> b (h c) n", h=block.heads)
    return x + F.conv1d(h, block.proj_out.weight[..., None], block.proj_out.bias)


# ---- the plain autoencoder


class PlainAutoencoder(nn.Module):
    """Tokens (b, f h w, d), rearranged for every attention."""

    def __init__(self, ours: PVDMAutoencoder) -> None:
        super().__init__()
        self.net = copy.deepcopy(ours)

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, f, h, w) -> its reconstruction."""
        net, (rows, columns), p = self.net, self.net.config.grid, self.net.config.patch_size
        frames = video.shape[2]
        x = net.patch_in(rearrange(video, "b c f (h p) (w q) -> b (f h w) (p q c)", p=p, q=p))
        x = rearrange(self.stack(net.encoder, x), "b (f h w) d -> b f h w d", f=frames, h=rows)
        layout = {"xy": "b f h w d -> b h w f d", "yt": "b f h w d -> b f w h d", "xt": "b f h w d -> b f h w d"}
        spread = {"xy": "b h w d -> b n h w d", "yt": "b f w d -> b f n w d", "xt": "b f h d -> b f h n d"}
        z = torch.zeros_like(x)
        for axis in PLANES:
            sequences = rearrange(x, layout[axis])
            plane = net.to_latent[axis](plain_projection(net.projections[axis], sequences)).tanh()
            count = {"xy": frames, "yt": rows, "xt": columns}[axis]
            z = z + repeat(net.from_latent[axis](plane), spread[axis], n=count)
        x = self.stack(net.decoder, rearrange(z, "b f h w d -> b (f h w) d"))
        x = rearrange(x, "b (f h w) d -> (b f) d h w", f=frames, h=rows)
        x = F.conv_transpose2d(x, net.to_pixels.weight, net.to_pixels.bias, stride=p)
        return rearrange(2 * x.sigmoid() - 1, "(b f) c h w -> b c f h w", f=frames)

    def stack(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        config = self.net.config
        frames, grid = config.clip_frames, config.grid
        time = time_tables(frames, config.head_dim, x.device, "halves")
        space = grid_tables(*grid, config.head_dim, x.device)
        for layer in layers:
            h = rearrange(layer.time.norm(x), "b (f n) d -> (b n) f d", f=frames)
            x = x + rearrange(plain_attention(layer.time.attn, h, time), "(b n) f d -> b (f n) d", b=len(x))
            h = rearrange(layer.space.norm(x), "b (f n) d -> (b f) n d", f=frames)
            x = x + rearrange(plain_attention(layer.space.attn, h, space), "(b f) n d -> b (f n) d", b=len(x))
            x = x + plain_feed_forward(layer.ff, x)
        return x


def plain_feed_forward(layer: GatedFeedForward, x: Tensor) -> Tensor:
    value, gate = layer.up(layer.norm(x)).chunk(2, dim=-1)
    return layer.down(value * F.gelu(gate))


def plain_attention(layer: SelfAttention, x: Tensor, tables: Tables | None = None) -> Tensor:
    q, k, v = rearrange(layer.qkv(x), "b n (k h e) -> k b h n e", k=3, h=layer.heads)
    q = q * q.shape[-1] ** -0.5
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    return layer.proj(rearrange((q @ k.transpose(2, 3)).softmax(dim=3) @ v, "b h n e -> b n (h e)"))


def plain_projection(projection: PlaneProjection, x: Tensor) -> Tensor:
    """(b, i, j, n, d) -> (b, i, j, d): all positions are computed, the first is taken."""
    i, j = x.shape[1:3]
    x = rearrange(x, "b i j n d -> (b i j) n d")
    x = torch.cat([x, projection.token.expand(len(x), -1, -1).to(x.dtype)], dim=1) + projection.positions
    for layer in projection.layers:
        x = x + plain_attention(layer.attn, layer.attn_norm(x))
        x = x + layer.down(F.gelu(layer.up(layer.ff_norm(x))))
    return rearrange(x[:, 0], "(b i j) d -> b i j d", i=i, j=j)


# ---- steps


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network with its plain form, inputs for it and the loss of a step."""

    ours: Callable[[], nn.Module]
    plain: Callable[[Any], nn.Module]
    inputs: tuple[Tensor, ...]
    loss: Callable[[nn.Module], Tensor]
    ema: EmaConfig | None = None


def autoencoder(args: argparse.Namespace, device: torch.device) -> tuple[str, Subject]:
    """The reconstruction term of the first stage: the other terms are other networks'."""
    config = PVDMAEConfig(args.ae_dim, (args.size, args.size), n_frames=args.frames, depth=args.ae_depth)
    video = torch.rand(args.batch_size, 3, args.frames, args.size, args.size, device=device) * 2 - 1
    words = f"autoencoder, {args.batch_size} clip(s) of {args.frames}x{args.size}x{args.size}, width {config.dim}, depth {config.depth}"
    return words, Subject(lambda: PVDMAutoencoder(config), PlainAutoencoder, (video,), lambda net: 4 * F.l1_loss(net(video), video))


def unet(args: argparse.Namespace, device: torch.device) -> tuple[str, Subject]:
    side = args.size // 8
    changes = {"channel_mult": tuple(args.channel_mult)} if args.channel_mult else {}
    changes |= {"num_res_blocks": args.res_blocks} if args.res_blocks else {}
    config: PlaneUNetConfig = resolve(args.model, "PVDM", latent_res=(side, side), latent_frames=args.frames, **changes)
    x0, noise = (torch.randn(args.batch_size, config.in_channels, config.length, device=device) for _ in range(2))
    t = torch.randint(0, 1000, (args.batch_size,), device=device)
    diffusion = build(DiffusionConfig(schedule="quad", variance="fixed_small"))

    def loss(net: nn.Module) -> Tensor:
        return diffusion.training_losses(net, x0, t, noise, {})["loss"].mean()

    planes = ", ".join("x".join(map(str, shape)) for shape in config.plane_shapes)
    words = f"UNet {args.model} {config.channel_mult}, {args.batch_size} latent(s) of planes {planes}"
    return words, Subject(lambda: PlaneUNet(config), PlainUNet, (x0, t), loss, EmaConfig())


SUBJECTS = {"autoencoder": autoencoder, "unet": unet}


def network(subject: Subject, is_ours: bool) -> nn.Module:
    """Ours or the plain one with the same random weights everywhere: fresh ones would skip what starts at zero."""
    torch.manual_seed(0)
    ours = subject.ours()
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return ours if is_ours else subject.plain(ours)


@torch.no_grad()
def difference(subject: Subject, device: torch.device) -> float:
    """How far the two are apart in fp32, relative to the largest output."""
    ours, plain = (network(subject, is_ours).to(device)(*subject.inputs) for is_ours in (True, False))
    return float((ours - plain).abs().max() / ours.abs().max())


def measure(subject: Subject, args: argparse.Namespace, env: Env) -> None:
    """Prints the table."""
    apart = difference(subject, env.device)
    print(f"plain and ours apart by {apart:.1e} of the largest output in fp32, allowed {AGREE:g}")
    assert apart < AGREE, "the two networks are not the same"
    trainers, first = {}, {}
    for name in [name for name in VARIANTS if name in args.variants]:
        is_ours, how = VARIANTS[name]
        trainers[name] = StepTrainer(network(subject, is_ours), is_ours, how, subject.loss, env, ema=subject.ema)
        first[name] = seconds(trainers[name].step, env.device)
    rounds = {name: functools.partial(trainer.steps, args.steps) for name, trainer in trainers.items()}
    medians = alternate(rounds, args.rounds, env.device, CLOCKS[args.clock])
    for line in ratio_lines(medians, args.steps, args.batch_size, first, {}):
        print(line, flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--networks", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--model", default="S", help="size of the UNet: S or L (default S)")
    parser.add_argument("--channel-mult", type=int, nargs="+", default=[], help="of the UNet; default: the size's")
    parser.add_argument("--res-blocks", type=int, default=0, help="of a level of the UNet; default: the size's")
    parser.add_argument("--ae-dim", type=int, default=384, help="width of the autoencoder (default 384)")
    parser.add_argument("--ae-depth", type=int, default=8, help="layers of its encoder and of its decoder (default 8)")
    parser.add_argument("--size", type=int, default=128, help="side of the clips, of which a latent has an eighth (default 128)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1, help="steps per round (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants, of which the median counts (default 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    args = parser.parse_args()
    if args.device == "cuda" and (not cuda or args.clock == "cpu"):
        parser.error("--device cuda: torch sees no GPU here, or --clock cpu was asked for, which does not see it")
    torch.set_float32_matmul_precision("high")  # as in training
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        for name in args.networks:
            words, subject = SUBJECTS[name](args, env.device)
            print(f"{words}; median {args.clock} time of {args.rounds} alternating rounds of {args.steps} step(s)", flush=True)
            measure(subject, args, env)


if __name__ == "__main__":
    main()
