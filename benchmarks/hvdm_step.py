"""One training step of HVDM's autoencoder: ours against the same network written down plainly from the paper, in one run.

The plain one takes subbands by adding and subtracting neighbours axis by axis, has 3-D convolutions and instance norms of 5-D volumes,
repeats the subbands' features in time, rearranges its tokens for every attention and writes attention out. It has the weights of ours and
must give the same outputs. A step is the reconstruction and subband terms of the loss, backward, norm and fused AdamW.
"""

import argparse

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.network_step import Subject, add_arguments, run
from benchmarks.plain_tokens import PlainTokens, spread
from benchmarks.wavelet import butterflies
from losses.reconstruction import subbands
from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.layers.frequency import FrequencyStem


class PlainAutoencoder(PlainTokens):
    """Everything at all positions and all frames."""

    net: HVDMAutoencoder

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, f, h, w) -> its reconstruction."""
        net = self.net
        volume = spread(self.planes(self.tokens(video))).flatten(1, 3)
        bands = butterflies(video)
        low = self.every_frame(plain_stem(net.low_bands, bands[:, 0]))
        high = self.every_frame(plain_stem(net.high_bands, torch.cat(bands[:, 1:].unbind(1), dim=1)))
        latent = net.to_latent(self.stack(net.fusion, volume, low, high).tanh()).tanh()
        return self.pixels(net.from_latent(latent))

    def every_frame(self, x: Tensor) -> Tensor:
        """(b, d, f / 2, h, w) -> (b, f h w, d)."""
        x = x.repeat_interleave(2, dim=2) if self.net.config.wavelet_time == "repeat" else torch.cat([x, x], dim=2)
        return rearrange(x, "b d f h w -> b (f h w) d")


def plain_stem(stem: FrequencyStem, x: Tensor) -> Tensor:
    """(b, c, f, h, w) -> (b, d, f, h', w')."""
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        x = F.conv3d(x, conv.weight[:, :, None], conv.bias, (1, *conv.stride), (0, 1, 1))
        x = F.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps).tanh()
    return x


def autoencoder(args: argparse.Namespace, device: torch.device) -> tuple[str, Subject]:
    """The terms of the loss that need no other network."""
    config = HVDMAEConfig(args.dim, (args.size, args.size), n_frames=args.frames, depth=args.depth, freq_widths=tuple(args.freq_widths))
    video = torch.rand(args.batch_size, 3, args.frames, args.size, args.size, device=device) * 2 - 1

    def loss(net: torch.nn.Module) -> Tensor:
        recon = net(video)
        return 4 * F.l1_loss(recon, video) + 4 * subbands(video, recon).mean()

    words = f"autoencoder, {args.batch_size} clip(s) of {args.frames}x{args.size}x{args.size}, width {config.dim}, depth {config.depth}"
    return words, Subject(lambda: HVDMAutoencoder(config), PlainAutoencoder, (video,), loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--dim", type=int, default=384, help="width of the tokens (default 384)")
    parser.add_argument("--depth", type=int, default=5, help="layers of the encoder and of the decoder (default 5)")
    parser.add_argument("--freq-widths", type=int, nargs="+", default=[64, 192, 384, 768], help="of the convolutions on the subbands")
    args = parser.parse_args()
    run(parser, args, [autoencoder])


if __name__ == "__main__":
    main()
