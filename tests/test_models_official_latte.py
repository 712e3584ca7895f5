"""Latte checkpoints of both releases: both directions are exact, each convention becomes the other, wrong files are named."""

import re
from typing import Any

import pytest
import torch
from einops import rearrange

from models import resolve
from models.layers.embeddings import sincos_2d
from models.official import latte as official
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.latte import Latte, LatteConfig

SMALL: dict[str, Any] = {"input_size": (4, 6), "hidden_size": 32, "depth": 4, "num_heads": 2, "n_frames": 3}
TUTORIAL: dict[str, Any] = {"time_embed_order": "sin_cos", "pos_embed_order": "hw", "learn_sigma": False}


def latte(**changes: Any) -> Latte:
    torch.manual_seed(1)
    model = Latte(LatteConfig(**SMALL | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def output(model: Latte) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(2, 4, 3, 4, 6, generator=generator), torch.tensor([3, 700]))


@pytest.mark.parametrize("changes", [{}, {"num_classes": 5}, {"cond_dim": 12, "cond_in_final": False}, {"learn_sigma": False}])
def test_official_there_and_back(changes):
    model = latte(**changes)
    state = official.export_official(model.state_dict(), model.config)
    assert state["pos_embed"].shape == (1, 6, 32) and state["temp_embed"].shape == (1, 3, 32)
    assert ("text_embedding_projection.1.weight" in state) == ("cond_dim" in changes)
    assert same(official.import_official(state), model.state_dict())
    assert official.official_config(state, num_heads=2) == model.config
    loaded, config = official.load(state, num_heads=2)
    assert same(loaded, model.state_dict()) and config == model.config


def test_tutorial_there_and_back():
    model = latte(**TUTORIAL, head_dim=12)
    state = official.export_tutorial(model.state_dict(), model.config)
    assert state["patch_embed_layer.patch_embed.0.weight"].shape == (32, 16) and "pos_embed" not in state
    assert same(official.import_tutorial(state), model.state_dict())
    known = {"num_heads": 2, "input_size": (4, 6), "n_frames": 3}
    assert official.tutorial_config(state, **known) == model.config
    loaded, config = official.load(state, **known)
    assert same(loaded, model.state_dict()) and config == model.config
    patch = model.x_embedder.proj.weight
    assert torch.equal(state["patch_embed_layer.patch_embed.0.weight"], rearrange(patch, "d c p q -> d (p q c)"))


def test_official_weights_in_the_tutorials_convention_and_back():
    model = latte(learn_sigma=False)
    with pytest.raises(ValueError, match="pos_embed_order 'wh': the tutorial's network computes 'hw' positions itself"):
        official.export_tutorial(model.state_dict(), model.config)
    state = official.export_tutorial(model.state_dict(), model.config, foreign_positions=True)
    loaded, config = official.load(state, num_heads=2, input_size=(4, 6), n_frames=3, pos_embed_order="wh")
    assert config.time_embed_order == "sin_cos" and not same(loaded, model.state_dict())
    other = Latte(config)
    other.load_state_dict(loaded)
    torch.testing.assert_close(output(other), output(model), rtol=1e-5, atol=1e-5)
    back, config = official.reorder_time(loaded, config, "cos_sin")
    assert same(back, model.state_dict()) and config == model.config


def test_tutorial_weights_in_the_official_convention_and_back():
    """The official release loads the position table with the weights, so any order goes."""
    model = latte(**TUTORIAL)
    state = official.export_official(model.state_dict(), model.config)
    assert torch.equal(state["pos_embed"][0], sincos_2d(32, (2, 3), order="hw"))
    loaded, config = official.load(state, num_heads=2)
    assert (config.time_embed_order, config.pos_embed_order, config.input_size) == ("cos_sin", "hw", (4, 6))
    other = Latte(config)
    other.load_state_dict(loaded)
    torch.testing.assert_close(output(other), output(model), rtol=1e-5, atol=1e-5)
    assert same(official.export_tutorial(loaded, config), official.export_tutorial(model.state_dict(), model.config))


def test_prefixes_and_averages():
    model = latte()
    state = official.export_official(model.state_dict(), model.config)
    average = {name: value + 1 if "embed" not in name else value for name, value in state.items()}
    for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        wrapped = {"model": {prefix + name: value for name, value in state.items()}, "opt": {}}
        assert same(official.import_official(wrapped), model.state_dict())
    assert same(official.import_official({"model": state, "ema": average}), official.import_official(average))
    by_block = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in state.items()}
    assert same(official.import_official(by_block), model.state_dict())


def test_stored_tables_are_checked():
    model = latte()
    state = official.export_official(model.state_dict(), model.config)
    assert official.official_config({k: v.half() for k, v in state.items()}, num_heads=2).input_size == (4, 6)
    for name in ("pos_embed", "temp_embed"):
        with pytest.raises(ValueError, match=f"{name} is not the fixed sine-cosine table"):
            official.load(state | {name: state[name] + 0.1}, num_heads=2)
    without = {name: value for name, value in state.items() if name not in ("pos_embed", "temp_embed")}
    loaded, config = official.load(without, num_heads=2, input_size=(4, 6), n_frames=3)
    assert same(loaded, model.state_dict()) and config == model.config


def test_what_does_not_fit_is_named_in_one_line():
    model, classes = latte(), latte(num_classes=3, **TUTORIAL)
    state = official.export_official(model.state_dict(), model.config)
    missing = {name: value for name, value in state.items() if name != "blocks.1.mlp.fc1.bias"}
    cases = [
        (lambda: official.load(missing), "missing blocks.1.mlp.fc1.bias"),
        (lambda: official.load(state | {"blocks.9.extra": state["pos_embed"]}), "missing blocks.4"),
        (lambda: official.load(state | {"strange": state["pos_embed"]}), "unknown strange"),
        (lambda: official.load({"weight": state["pos_embed"]}), "not a Latte checkpoint"),
        (lambda: official.load({"epoch": 3}), "no state dict in the checkpoint"),
        (lambda: official.load(state), "number of heads cannot be told from width 32"),
        (lambda: official.load(state, num_heads=5), "num_heads 5: the attention is 32 wide"),
        (lambda: official.export_official(model.state_dict(), LatteConfig(**SMALL, block_layout="late")), "both releases interleave"),
        (lambda: official.export_official(latte(head_dim=12).state_dict(), latte(head_dim=12).config), "head_dim 12"),
        (lambda: official.export_official(latte(cond_dim=3).state_dict(), latte(cond_dim=3).config), "cond_in_final"),
        (lambda: official.export_tutorial(classes.state_dict(), classes.config), "no class"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            call()
        assert "\n" not in str(error.value)
    tutorial = official.export_tutorial(latte(**TUTORIAL).state_dict(), latte(**TUTORIAL).config)
    with pytest.raises(ValueError, match="no square of 3 channels"):
        official.load(tutorial, in_channels=3, num_heads=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_embedder.proj.weight", (32, 16)),
        ("pos_embed", (6, 32)),
        ("temp_embed", (3,)),
        ("temp_embed", (1, 3, 31)),
        ("final_layer.linear.weight", ()),
        ("blocks.x.y", (1,)),
    ],
)
def test_tensors_of_other_shapes_are_named_in_one_line(name, shape):
    model = latte()
    state = official.export_official(model.state_dict(), model.config)
    with pytest.raises(ValueError, match=f"^[^\n]*{re.escape(name)}[^\n]*$"):
        official.load(state | {name: torch.zeros(shape)}, num_heads=2)
    tutorial = official.export_tutorial(latte(**TUTORIAL).state_dict(), latte(**TUTORIAL).config)
    with pytest.raises(ValueError, match=r"patch_embed\.0\.weight has shape"):
        official.load(tutorial | {"patch_embed_layer.patch_embed.0.weight": torch.zeros(3)}, num_heads=2)


@pytest.mark.parametrize(("changes", "words"), [({"learn_sigma": True}, "learn_sigma"), ({"mlp_ratio": 2.0}, "mlp_ratio 2.0")])
def test_what_the_tutorial_cannot_be_is_not_written(changes, words):
    model = latte(**TUTORIAL | changes)
    with pytest.raises(ValueError, match=words):
        official.export_tutorial(model.state_dict(), model.config)


def test_the_official_step_embedding_has_one_width():
    model = latte(time_embed_dim=64)
    with pytest.raises(ValueError, match="time_embed_dim 64"):
        official.export_official(model.state_dict(), model.config)


def test_labels_without_a_null_row():
    model = latte(num_classes=3, class_dropout_prob=0.0)
    state = official.export_official(model.state_dict(), model.config)
    assert official.official_config(state, num_heads=2, class_dropout_prob=0.0) == model.config


def test_named_sizes_need_no_heads():
    with torch.device("meta"):
        states = {name: Latte(resolve(name)).state_dict() for name in ("Latte-S/2", "Latte-XL/8")}
    for name, state in states.items():
        config = official.official_config(state, input_size=(32, 32), n_frames=16)
        assert config == resolve(name)


def test_a_dit_starts_a_latte():
    torch.manual_seed(0)
    dit = ContentDiT(DiTConfig(input_size=(4, 4), in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=10))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    part = official.init_from_dit({"model": dit.state_dict()})
    assert not {"pos_embed", "y_embedder.embedding_table.weight"} & part.keys()
    model = latte(num_classes=5)
    found = model.load_state_dict(part, strict=False)
    assert found.missing_keys == ["y_embedder.embedding_table.weight"] and not found.unexpected_keys
    assert torch.equal(model.blocks[3].mlp.fc1.weight, dit.blocks[3].mlp.fc1.weight)
    other = latte(**TUTORIAL)
    other.load_state_dict(official.init_from_dit(dit.state_dict(), other.config))
    t = torch.tensor([3, 700])
    torch.testing.assert_close(other.t_embedder(t), dit.t_embedder(t))
    tokens = torch.randn(2, 6, 32)
    eps = model.final_layer(tokens, t[:, None].expand(2, 32) / 700).unflatten(-1, (2, 2, 8))[..., :4]
    torch.testing.assert_close(other.final_layer(tokens, t[:, None].expand(2, 32) / 700).unflatten(-1, (2, 2, 4)), eps)
    compiled = {f"_orig_mod.{name}": value for name, value in dit.state_dict().items()}
    assert same(official.init_from_dit(compiled), part)
    with pytest.raises(ValueError, match=re.escape("blocks.0.mlp.fc1.weight has shape ()")):
        official.init_from_dit(dit.state_dict() | {"blocks.0.mlp.fc1.weight": torch.zeros(())}, other.config)
    with pytest.raises(ValueError, match=re.escape("the DiT checkpoint has hidden_size")):
        official.init_from_dit(dit.state_dict(), latte(depth=2).config)
