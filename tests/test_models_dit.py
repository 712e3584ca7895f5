"""The diffusion transformers: published sizes, position tables, conditions and their null entries, initial state."""

import pytest
import torch

from models import MODELS, resolve
from models.layers.embeddings import sincos_2d, timestep_frequencies, unpatchify
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig

SIZE = {"hidden_size": 32, "depth": 2, "num_heads": 2}


def wake(model: torch.nn.Module) -> torch.nn.Module:
    """A fresh DiT gives zeros; random weights everywhere show what depends on what."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def content(**changes) -> ContentDiT:
    return wake(ContentDiT(DiTConfig(**({"input_size": (4, 6), "num_classes": 5} | SIZE | changes))))


def motion(**changes) -> MotionDiT:
    return wake(MotionDiT(MotionDiTConfig(**({"input_size": (4, 8), "in_channels": 3, "keyframe_size": (8, 12)} | SIZE | changes))))


@pytest.mark.parametrize(
    ("name", "count"),
    [("DiT-S/2", 32_963_360), ("DiT-B/2", 130_512_416), ("DiT-L/2", 458_102_816), ("DiT-XL/2", 675_129_632)]
    + [("MotionDiT-S/2", 32_714_560), ("MotionDiT-B/2", 130_014_784), ("MotionDiT-L/2", 457_439_296), ("MotionDiT-XL/2", 674_383_168)],
)
def test_parameter_counts_are_the_published(name, count):
    model = MODELS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in model.network(model.config).parameters()) == count


def test_names():
    assert resolve("DiT-B/4", family="MotionDiT") == resolve("B/4", family="MotionDiT") == resolve("MotionDiT-B/4")
    assert resolve("MotionDiT-B/4", family="MotionDiT", keyframe_patch_size=8).keyframe_patch_size == 8
    assert resolve("DiT-XL/2").num_classes == 1000
    with pytest.raises(ValueError, match=r"'MotionDit-B/2'; the nearest is 'MotionDiT-B/2'"):
        resolve("MotionDit-B/2")
    with pytest.raises(ValueError, match=r"no model is called 'ContentDiT-B/2'; the nearest is 'MotionDiT-"):
        resolve("ContentDiT-B/2", family="MotionDiT")
    with pytest.raises(ValueError, match="no setting 'input_sise'; the nearest is 'input_size'"):
        resolve("DiT-B/2", input_sise=(4, 4))


def test_position_table_knows_rows_and_columns():
    table = sincos_2d(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8]) and torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert len(torch.unique(table.reshape(15, 16), dim=0)) == 15
    scrambled = sincos_2d(16, (2, 8), "release")
    assert torch.equal(scrambled, sincos_2d(16, (4, 4))) and not torch.equal(scrambled, sincos_2d(16, (2, 8)))
    with pytest.raises(ValueError, match="square number of tokens, not 3 x 5"):
        sincos_2d(16, (3, 5), "release")


def test_unpatchify_keeps_the_grid():
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(tokens, (2, 3), 2), image)


def test_odd_frequency_width_ends_in_a_zero():
    out = timestep_frequencies(torch.tensor([0, 7]), 9)
    assert out.shape == (2, 9) and out[:, -1].abs().max() == 0 and torch.equal(out[0, :4], torch.ones(4))


def test_fresh_model_gives_zeros_and_blocks_are_the_identity():
    model = ContentDiT(DiTConfig(input_size=(4, 6), **SIZE))
    assert model(torch.randn(2, 3, 4, 6), torch.tensor([1, 2])).abs().max() == 0
    x = torch.randn(2, 6, 32)
    assert torch.equal(model.units()[1](x, torch.randn(2, 32)), x)
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    assert model.x_embedder.proj.weight.flatten(1).abs().max() <= (6 / (12 + 32)) ** 0.5  # Xavier on the flattened weight


@torch.no_grad()
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_shapes(learn_sigma):
    out = content(learn_sigma=learn_sigma)(torch.randn(2, 3, 4, 6), torch.tensor([0, 999]), torch.tensor([0, 4]))
    assert out.shape == (2, 6 if learn_sigma else 3, 4, 6)
    out = motion(learn_sigma=learn_sigma)(torch.randn(2, 3, 4, 8), torch.tensor([0, 999]), torch.randn(2, 3, 8, 12))
    assert out.shape == (2, 6 if learn_sigma else 3, 4, 8)


@torch.no_grad()
def test_dropped_label_null_label_and_no_label_are_one():
    model, x, t = content(), torch.randn(3, 3, 4, 6), torch.tensor([1, 2, 3])
    y = torch.tensor([0, 1, 2])
    dropped = model(x, t, y, drop=torch.tensor([False, True, True]))
    null = model(x, t, torch.full_like(y, 5))
    assert torch.equal(dropped[1:], null[1:]) and torch.equal(null, model(x, t))
    assert torch.equal(dropped[:1], model(x, t, y)[:1]) and not torch.allclose(dropped[0], null[0])


def test_without_null_entry_a_condition_is_needed():
    model = content(class_dropout_prob=0.0, cond_dim=4)
    assert len(model.y_embedder.embedding_table.weight) == 5 and model.cond_embedder.null is None
    x, t, y, cond = torch.randn(1, 3, 4, 6), torch.tensor([1]), torch.tensor([0]), torch.randn(1, 4)
    assert model(x, t, y, cond).isfinite().all()
    with pytest.raises(ValueError, match="label is needed"):
        model(x, t, cond=cond)
    with pytest.raises(ValueError, match="condition vector is needed"):
        model(x, t, y)


@torch.no_grad()
def test_motion_condition_is_optional_and_drops_apart_from_the_content_frame():
    model = motion(num_classes=5, cond_dim=4)
    x, t, frame, cond = torch.randn(2, 3, 4, 8), torch.tensor([1, 2]), torch.randn(2, 3, 8, 12), torch.randn(2, 4)
    y, drop = torch.tensor([1, 2]), torch.tensor([True, True])
    assert torch.equal(model(x, t, frame, y, cond, drop), model(x, t, frame))
    for other in (model(x, t, frame, y, cond), model(x, t, frame, y), model(x, t, frame, cond=cond), model(x, t, frame.flip(3))):
        assert not torch.allclose(other, model(x, t, frame))
    assert not any("y_embedder" in name or "cond_embedder" in name for name in motion().state_dict())


def test_release_tables_are_for_the_latent_alone():
    model = motion(input_size=(4, 16), patch_size=2, keyframe_size=(8, 16), keyframe_patch_size=4, pos_grid="release")
    width = model.config.hidden_size
    assert torch.equal(model.pos_embed[0], sincos_2d(width, (4, 4)))
    assert torch.equal(model.keyframe_pos_embed[0], sincos_2d(width, (2, 4)))


def test_every_trained_parameter_has_a_gradient():
    model = motion(num_classes=5, cond_dim=4).train()
    out = model(
        torch.randn(2, 3, 4, 8),
        torch.tensor([1, 2]),
        torch.randn(2, 3, 8, 12),
        torch.tensor([1, 2]),
        torch.randn(2, 4),
        torch.tensor([True, False]),
    )
    out.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"pos_embed", "keyframe_pos_embed"}


def test_forward_draws_nothing():
    model = motion(num_classes=5).train()
    before = torch.get_rng_state()
    model(torch.zeros(2, 3, 4, 8), torch.tensor([1, 2]), torch.zeros(2, 3, 8, 12), torch.tensor([1, 2]))
    assert torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def test_bfloat16_weights_take_float32_inputs():
    model, x, t = content(depth=1), torch.randn(1, 3, 4, 6), torch.tensor([999])
    reference = model(x, t)
    out = model.bfloat16()(x, t)
    assert out.dtype == torch.bfloat16 and (out.float() - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (content, {"input_size": (5, 6)}, "patch_size"),
        (content, {"hidden_size": 30}, "hidden_size"),
        (motion, {"keyframe_size": (8, 10)}, "keyframe_patch_size"),
        (content, {"patch_size": -2}, "patch_size -2: at least 1"),
        (content, {"pos_grid": "release"}, "not 2 x 3; use pos_grid 'true'"),
        (motion, {"keyframe_patch_size": 0}, "keyframe_patch_size 0"),
    ],
)
def test_impossible_settings(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_wrong_input_size_is_named():
    with pytest.raises(ValueError, match=r"\(b, 3, 4, 6\), not \(1, 3, 6, 4\)"):
        content()(torch.zeros(1, 3, 6, 4), torch.tensor([1]))
