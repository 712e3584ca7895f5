"""Checks of CMD: autoencoder and its loss, motion and content model, position tables, data transform. cmd_stages.py has the rest."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.transforms import resize_clip
from losses import reconstruction
from losses.adversarial import discriminator_loss, feature_matching, generator_loss
from losses.perceptual import lpips_distance
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.discriminators import DiscriminatorConfig, Discriminators
from models.layers.embeddings import sincos_2d
from models.official.cmd import export_autoencoder, export_content, export_motion, import_autoencoder, import_content, import_motion
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from tests.parity import cmd_stages  # noqa: F401 - registers its checks
from tests.parity.adapters_dit import (
    check_content,
    check_labels,
    check_network,
    dit_fields,
    expect_grad_norms,
    load_checked,
    pair,
)
from tests.parity.case import Case, adapter
from tests.parity.data_cases import resize_settings

LOSS = 1e-6
"""Loss terms, relative."""


# ---- autoencoder


@adapter("cmd", "ae")
def check_autoencoder(case: Case) -> None:
    fields = {name: case.config(name) for name in ("dim", "patch_size", "channels", "n_frames", "embed_dim", "depth", "heads", "mode")}
    model = CMDAutoencoder(CMDAEConfig(image_size=pair(case.config("image_size")), rotary=case.config("rotary", "none"), **fields))
    official = case.state()
    model.load_state_dict(import_autoencoder(official))
    assert all(torch.equal(value, official[name]) for name, value in export_autoencoder(model.state_dict()).items())
    x = case.input("x").requires_grad_()
    clips = model.clips(x)
    b, _, t, h, w = clips.shape
    tokens = model.tokens(clips)
    case.expect("enc_tokens", tokens.permute(1, 0, 2, 3).flatten(1, 2))
    case.expect("frame_weights", model.frame_weights(tokens).transpose(0, 1))
    recon, z_c, z_m = model(x)
    case.expect("z_c", z_c)
    case.expect("z_m", z_m)
    case.expect("recon", recon.transpose(1, 2).flatten(0, 1))
    assert torch.equal(model.encode(clips.transpose(1, 2).reshape(b * t, -1, h, w))[1], z_m), "4-D input must be read as (b t) c h w"
    loss = sum(value.square().sum() for value in (recon, z_m, z_c))
    case.expect("loss", loss.reshape(1))
    loss.backward()
    expect_grad_norms(case, model, export_autoencoder)
    case.expect_grad("x", x.grad)
    if case.has("in/z_c_free"):
        free = model.decode(case.input("z_c_free"), case.input("z_m_free"))
        case.expect("recon_free", free.transpose(1, 2).flatten(0, 1))


# ---- its loss


class _ReleaseLoss:
    """The release's loss object from our pieces, with the stub perceptual distance and the stored frame indices of the case."""

    def __init__(self, case: Case) -> None:
        self.weights = {name: case.config(f"{name}_weight", 1.0) for name in ("pixel", "perceptual", "feature", "disc")}
        self.start, self.kind = case.config("disc_start"), case.config("disc_loss", "hinge")
        self.train = case.config("discriminators_train_mode", True)
        self.x, self.frame = case.input("x"), case.input("frame_idx")
        widths = {"ndf": case.config("disc_ndf", 64), "n_layers": case.config("disc_num_layers", 3)}
        self.disc = Discriminators(DiscriminatorConfig(channels=self.x.shape[1], **widths))
        self.state = case.state()

    def restored(self) -> Discriminators:
        """The discriminators as in the file."""
        self.disc.load_state_dict(self.state)
        self.disc.zero_grad()
        return self.disc.train(self.train)

    def stages(self, recon: Tensor) -> tuple[Any, Any]:
        """Stage outputs of both discriminators on the real, then on the generated side."""
        disc = self.restored()
        pick = reconstruction.pick_frame
        return disc(pick(self.x, self.frame), self.x), disc(pick(recon, self.frame), recon)

    def generator(self, recon: Tensor, step: int) -> Tensor:
        """optimizer_idx 0."""
        stub = reconstruction.perceptual(lambda a, b: (a - b).square().flatten(1).mean(1), self.x, recon, self.frame)
        total = self.weights["pixel"] * reconstruction.l1(self.x, recon) + self.weights["perceptual"] * stub
        if step >= self.start:
            for real, fake in zip(*self.stages(recon), strict=True):
                total = total + self.weights["disc"] * generator_loss(fake[-1]) + self.weights["feature"] * feature_matching(real, fake)
        return total.mean()

    def discriminator(self, recon: Tensor, step: int) -> Tensor:
        """optimizer_idx 1."""
        pairs = zip(*self.stages(recon), strict=True)
        total = sum(discriminator_loss(real[-1], fake[-1], self.kind) for real, fake in pairs).mean()
        return total if step >= self.start else 0 * total


@adapter("cmd", "aeloss")
def check_autoencoder_loss(case: Case) -> None:
    shape = case.input("x").shape
    assert shape == (case.config("batch"), shape[1], case.config("frames"), *pair(case.config("size")))
    if case.config("mode", "pixel") == "latent":
        recon = case.input("recon").requires_grad_()
        value = reconstruction.mse(case.input("x"), recon).mean()
        value.backward()
        for name in case.names("out/"):
            case.compare(name, value.reshape(1), LOSS)
        for name in case.names("grad/"):
            case.compare(name, recon.grad, LOSS)
        return
    loss = _ReleaseLoss(case)
    recon = case.input("recon")
    for when, step in (("before", loss.start - 1), ("after", loss.start)):
        leaf = recon.clone().requires_grad_()
        g = loss.generator(leaf, step)
        g.backward()
        case.expect(f"g_loss_{when}_start", g.reshape(1), LOSS)
        case.expect_grad(f"recon_{when}_start", leaf.grad)
        if step >= loss.start:
            expect_grad_norms(case, loss.disc, group="grad_norm_g")
        d = loss.discriminator(recon, step)
        case.expect(f"d_loss_{when}_start", d.reshape(1), LOSS)
        if step >= loss.start:
            d.backward()
            expect_grad_norms(case, loss.disc, group="grad_norm_d")
    disc = loss.restored()
    case.expect("d2_logits_frame0", disc.discriminator_2d(loss.x[:, :, 0])[-1])
    case.expect("d3_logits", disc.discriminator_3d(loss.x)[-1])
    after = disc.state_dict()
    for name in case.names("out/state_after_d3/"):
        case.expect(name.removeprefix("out/"), after[name.removeprefix("out/state_after_d3/")])


@adapter("cmd", "lpips")
def check_lpips(case: Case) -> None:
    draw = np.random.RandomState(case.config("numpy_seed"))  # the generator that the file states
    assert "13 VGG16 convs" in case.config("conv_order")
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    trunk = {}
    for place, before, after in zip(places, (3, *widths), widths, strict=False):
        weight = draw.standard_normal((after, before, 3, 3)) * math.sqrt(2 / (9 * before))
        trunk |= {f"features.{place}.weight": weight, f"features.{place}.bias": draw.standard_normal(after) * 0.01}
    heads = {f"lin{k}.model.1.weight": np.abs(draw.standard_normal(c)).reshape(1, -1, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    trunk, heads = ({name: torch.from_numpy(v).float() for name, v in weights.items()} for weights in (trunk, heads))
    distance = lpips_distance("vgg", trunk, "the stated generator", heads)
    a, b = case.input("a"), case.input("b").requires_grad_()
    value = distance(a, b)
    case.expect("value", value.reshape(-1, 1, 1, 1))
    value.sum().backward()
    case.expect_grad("b", b.grad)
    for side, image in (("a", a), ("b", b)):
        features = distance.net.net(distance.net.scaling_layer(image))
        for stage, feature in zip(("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"), features, strict=True):
            case.expect(f"{stage}_{side}", feature)
            case.expect(f"{stage}_{side}_mean", feature.mean((2, 3)))


# ---- diffusion models


@adapter("cmd", "content")
def check_content_model(case: Case) -> None:
    check_content(case, import_content, export_content)


@adapter("cmd", "motion")
def check_motion_model(case: Case) -> None:
    keyframe = {"keyframe_size": pair(case.config("keyframe_size")), "keyframe_channels": case.config("keyframe_channel", 3)}
    labels = {"num_classes": case.config("num_classes", 0), "class_dropout_prob": case.config("class_dropout_prob", 0.1)}
    conditional = case.has("state/y_embedder.embedding_table.weight")  # the release takes labels and ignores them
    options = keyframe | (labels if conditional else {})
    model = MotionDiT(MotionDiTConfig(**dit_fields(case), **options, keyframe_patch_size=case.config("keyframe_patch_size"))).eval()
    load_checked(case, model, import_motion, export_motion)
    inputs = {name: case.input(name) for name in ("x", "t", "keyframe")}
    if case.has("in/y"):
        label = case.input("y")
        inputs |= {"y": label} if conditional else {}
    check_network(case, model, inputs, export_motion)
    check_labels(case, model)


@adapter("cmd", "posembed")
def check_position_tables(case: Case) -> None:
    for name in case.names("out/"):
        kind, _, size = name.removeprefix("out/").partition("_")
        rows, _, columns = size.partition("x")
        width = case.config(f"{kind}_{size}", None) or case.config(f"true_{size}")
        case.expect(f"{kind}_{size}", sincos_2d(width, (int(rows), int(columns or rows)), "release" if kind == "release" else "true"), 1e-6)


@adapter("cmd", "preproc")
def check_transform(case: Case) -> None:
    frames = case.input("frames").float() / 127.5 - 1
    clip = resize_clip(frames.numpy(), pair(case.config("resolution")), **resize_settings("cmd"))
    case.expect("clip", torch.from_numpy(clip).permute(3, 0, 1, 2), 1e-6)
