"""One training step of PVDM's networks: ours against the same networks written down plainly from the paper, in one run.

The plain autoencoder rearranges its tokens for every attention, writes attention out, and projects all positions; the plain UNet
takes the three planes one after the other and writes attention out. They have the weights of ours and must give the same outputs.
A step is loss, backward, norm, fused AdamW, and for the UNet the moving average.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.network_step import Maker, Subject, add_arguments, run
from benchmarks.plain_tokens import PlainTokens, spread
from diffusion import DiffusionConfig, build
from engine.config import EmaConfig
from models import resolve
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.layers.planes import join_planes, split_planes
from models.unets.adm import AttentionBlock, ResBlock
from models.unets.plane_stages import Stage
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig

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


class PlainAutoencoder(PlainTokens):
    """Planes are made one after the other, and spread over the clip."""

    net: PVDMAutoencoder

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, f, h, w) -> its reconstruction."""
        net = self.net
        latent = {axis: net.to_latent[axis](plane).tanh() for axis, plane in self.planes(self.tokens(video)).items()}
        z = spread({axis: net.from_latent[axis](plane) for axis, plane in latent.items()})
        return self.pixels(z.flatten(1, 3))


# ---- steps


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


MAKERS: dict[str, Maker] = {"autoencoder": autoencoder, "unet": unet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--networks", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--model", default="S", help="size of the UNet: S or L (default S)")
    parser.add_argument("--channel-mult", type=int, nargs="+", default=[], help="of the UNet; default: the size's")
    parser.add_argument("--res-blocks", type=int, default=0, help="of a level of the UNet; default: the size's")
    parser.add_argument("--ae-dim", type=int, default=384, help="width of the autoencoder (default 384)")
    parser.add_argument("--ae-depth", type=int, default=8, help="layers of its encoder and of its decoder (default 8)")
    args = parser.parse_args()
    run(parser, args, [MAKERS[name] for name in args.networks])


if __name__ == "__main__":
    main()
