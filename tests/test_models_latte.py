"""Latte: published sizes and costs, layouts, frames and images, conditions, and one step under each way of training."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import distributed

from engine.config import EmaConfig, OptimConfig, ParallelConfig, RunConfig
from engine.task import Network
from engine.team import Team
from launch.env import Env
from models import MODELS, resolve
from models.layers.embeddings import frame_table, grid_table
from models.transformers.latte import Latte, LatteConfig, temporal

SMALL: dict[str, Any] = {"input_size": (4, 6), "hidden_size": 32, "depth": 4, "num_heads": 2, "time_embed_dim": 16, "n_frames": 3}


def latte(**changes: Any) -> Latte:
    """A small one with random weights everywhere: a fresh one gives zeros."""
    torch.manual_seed(1)
    model = Latte(LatteConfig(**SMALL | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clips(count: int = 2, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, frames, 4, 6, generator=generator), torch.arange(count) * 300 + 7


SIZES = {"S": (32.48, 32.54, 32.76), "B": (129.55, 129.66, 130.10), "L": (456.82, 456.96, 457.55), "XL": (673.68, 673.85, 674.51)}
GMAC = {
    "S": ((88.5, 22.3, 5.7), (5.1, 0.38, 0.04)),
    "B": ((353.8, 88.8, 22.6), (10.3, 0.75, 0.08)),
    "L": ((1257.7, 315.5, 80.0), (27.4, 2.0, 0.20)),
    "XL": ((1857.0, 465.8, 118.0), (35.9, 2.6, 0.26)),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_and_costs(size):
    """The releases repeat the condition for every frame and every position before a linear; ours has it once a clip."""
    for at, patch in enumerate((2, 4, 8)):
        config = resolve(f"Latte-{size}/{patch}")
        with torch.device("meta"):
            model = MODELS[f"Latte-{size}/{patch}"].network(config)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == SIZES[size][at]
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 4, 16, 32, 32), torch.empty(1))
        operators = counter.get_flop_counts()["Global"]
        linear = sum(flops for operator, flops in operators.items() if "mm" in str(operator) and "bmm" not in str(operator)) / 2e9
        attention = sum(operators.values()) / 2e9 - linear
        tokens, d = config.grid[0] * config.grid[1], config.hidden_size
        repeated = (6 * d**2 * config.depth // 2 * (15 + tokens - 1) + 2 * d**2 * 15) / 1e9
        assert linear + repeated == pytest.approx(GMAC[size][0][at], abs=0.06)
        assert attention == pytest.approx(GMAC[size][1][at], abs=0.06 if at == 0 else 0.06 * GMAC[size][1][at])


def test_fresh_model_gives_zeros_and_is_initialised_as_dit():
    torch.manual_seed(0)
    model = Latte(LatteConfig(**SMALL | {"hidden_size": 128, "num_classes": 7}))
    x, t = clips()
    assert model(x, t, torch.tensor([1, 2])).abs().max() == 0
    for name, parameter in model.state_dict().items():
        if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
            assert parameter.abs().max() == 0, name
        elif "t_embedder" in name or "embedding_table" in name:
            assert abs(float(parameter.std()) / 0.02 - 1) < 0.1, name
        else:
            fan_out, fan_in = parameter.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert parameter.abs().max() <= bound and abs(float(parameter.std()) / (bound / 3**0.5) - 1) < 0.1, name


def test_settings_that_cannot_be_are_refused():
    for changes, words in (
        ({"depth": 5}, "depth 5 is odd"),
        ({"input_size": (5, 6)}, "5 x 6 is not a multiple of patch_size 2"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"hidden_size": 30, "num_heads": 2}, "not a multiple of 4"),
        ({"time_embed_dim": 15}, "time_embed_dim 15 is odd"),
        ({"n_frames": 0}, "n_frames 0: at least 1"),
        ({"head_dim": -2}, "head_dim -2: at least 1"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0: nothing is left"),
    ):
        with pytest.raises(ValueError, match=words):
            LatteConfig(**SMALL | changes)
    assert latte(num_heads=3, head_dim=10)(*clips()).shape == (2, 8, 3, 4, 6)
    with pytest.raises(ValueError, match=r"takes clips \(b, 4, frames, 4, 6\) with at least one frame, not \(2, 4, 3, 6, 4\)"):
        latte()(torch.zeros(2, 4, 3, 6, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="of which 3 are images"):
        latte()(*clips(), images=3)


def test_positions():
    table = grid_table(32, (2, 3), "wh", torch.device("cpu")).unflatten(0, (2, 3))
    rows_first = grid_table(32, (2, 3), "hw", torch.device("cpu")).unflatten(0, (2, 3))
    assert torch.equal(table, torch.cat(rows_first.split(16, dim=2)[::-1], dim=2))
    assert torch.equal(table[0, :, :16], table[1, :, :16]) and not torch.equal(table[:, 0, :16], table[:, 1, :16])
    assert torch.equal(frame_table(32, 5, torch.device("cpu"))[:3], frame_table(32, 3, torch.device("cpu")))
    with torch.inference_mode():
        assert not grid_table(8, (3, 1), "wh", torch.device("cpu")).is_inference()


@pytest.mark.parametrize("layout", ["interleaved", "late"])
def test_blocks_attend_in_space_or_in_time(layout):
    model = latte(block_layout=layout)
    half = {"interleaved": [False, True, False, True], "late": [False, False, True, True]}
    assert temporal(model.config) == half[layout]
    seen = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, kwargs, out: seen.append(tuple(args[0].shape)), with_kwargs=True)
    model(*clips())
    assert seen == [(3, 2 * 6, 32) if in_time else (3 * 2, 6, 32) for in_time in half[layout]]


def test_layouts_share_weights_and_differ():
    late, interleaved = latte(block_layout="late"), latte()
    late.load_state_dict(interleaved.state_dict())
    assert not torch.allclose(late(*clips()), interleaved(*clips()), atol=1e-3)


def test_frames_see_each_other_and_know_their_place():
    model, (x, t) = latte(), clips()
    changed = x.clone()
    changed[:, :, 2] += 1
    assert not torch.allclose(model(x, t)[:, :, 0], model(changed, t)[:, :, 0])
    assert not torch.allclose(model(x.flip(2), t).flip(2), model(x, t), atol=1e-3)
    assert model(*clips(frames=7)).shape == (2, 8, 7, 4, 6) and model(*clips(frames=1)).shape == (2, 8, 1, 4, 6)
    single = model(x[1:], t[1:])
    torch.testing.assert_close(model(x, t)[1:], single, rtol=1e-4, atol=1e-5)


def test_images_are_alone():
    model, (x, t) = latte(num_classes=5), clips(frames=5)
    y, image_y = torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 0]])
    out = model(x, t, y, images=2, image_y=image_y)
    torch.testing.assert_close(out[:, :, :3], model(x[:, :, :3], t, y), rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[:, :, 3] += 1
    again = model(changed, t, y, images=2, image_y=image_y)
    torch.testing.assert_close(again[:, :, [0, 1, 2, 4]], out[:, :, [0, 1, 2, 4]])
    assert not torch.allclose(again[:, :, 3], out[:, :, 3])
    other = model(x, t, y, images=2, image_y=torch.tensor([[3, 1], [5, 0]]))
    assert torch.equal(other[:, :, :4], out[:, :, :4]) and not torch.allclose(other[0, :, 4], out[0, :, 4])
    dropped = model(x, t, y, images=2, image_y=torch.tensor([[3, 5], [5, 5]]))
    drop = torch.tensor([[False, True], [False, True]])
    assert torch.equal(model(x, t, y, images=2, image_y=image_y, image_drop=drop), dropped)
    none = torch.full_like(image_y, 5)
    torch.testing.assert_close(model(x, t, y, images=2), model(x, t, y, images=2, image_y=none))


def test_conditions_can_be_taken_away():
    x, t = clips()
    model, y, drop = latte(num_classes=5), torch.tensor([1, 2]), torch.tensor([True, False])
    null = torch.full_like(y, 5)
    torch.testing.assert_close(model(x, t), model(x, t, null))
    mixed = model(x, t, y, drop=drop)
    assert torch.equal(mixed[0], model(x, t, null)[0]) and torch.equal(mixed[1], model(x, t, y)[1])
    with pytest.raises(ValueError, match="no null label"):
        latte(num_classes=5, class_dropout_prob=0.0)(x, t)
    text, cond = latte(cond_dim=12), torch.randn(2, 3, 4)
    torch.testing.assert_close(text(x, t), text(x, t, cond=torch.zeros(2, 12)))
    mixed = text(x, t, cond=cond, drop=drop)
    assert torch.equal(mixed[0], text(x, t)[0]) and torch.equal(mixed[1], text(x, t, cond=cond)[1])
    assert not torch.allclose(text(x, t, cond=cond), text(x, t, cond=cond.flip(0)))
    with_images = text(*clips(frames=4), cond=cond, images=1)
    torch.testing.assert_close(with_images[:, :, 3], text(*clips(frames=4), images=1)[:, :, 3])


def test_text_in_the_final_layer_is_a_setting():
    x, t = clips()
    everywhere, release = latte(cond_dim=12), latte(cond_dim=12, cond_in_final=False)
    cond, seen = torch.randn(2, 12), {}
    for name, model in (("all", everywhere), ("release", release)):
        model.final_layer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: args[1]}))
        model(x, t, cond=cond)
    assert not torch.allclose(seen["all"], seen["release"])
    torch.testing.assert_close(seen["release"], release.t_embedder(t)[None])
    release(*clips(frames=5), cond=cond, images=2)
    assert seen["release"].shape[0] == 5
    torch.testing.assert_close(seen["release"], release.t_embedder(t).expand(5, -1, -1))  # of images as well


class Copies(TorchDispatchMode):
    """Names of the operators that move a tensor's numbers about."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        if name in ("aten.clone", "aten.copy_", "aten.cat", "aten.stack", "aten.repeat", "aten.index_select", "aten.expand_copy"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_time", [False, True])
def test_nothing_is_copied_to_attend(in_time):
    """With more keys than a CPU's short way takes: the fused kernel gets views and its output is one, in space and in time."""
    model = latte()
    with torch.no_grad(), Copies() as copies:
        out = model.blocks[0](torch.randn(70, 2, 66, 32), torch.randn(1, 2, 32), over_first=in_time)
    assert out.is_contiguous() and not copies.found


@pytest.mark.parametrize("images", [0, 2])
def test_the_network_copies_little(images):
    """Tensors are joined for the images alone, once per temporal block, beside the step's sines and cosines."""
    model, (x, t) = latte(), clips(frames=5)
    with torch.no_grad(), Copies() as copies:
        model(x, t, images=images)
    assert copies.found.count("aten.cat") == (2 if images else 0) + 1


# ---- one step under each way of training

PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "fsdp": {"mode": "fsdp"},
    "recomputed": {"mode": "fsdp", "activation_checkpointing": "block"},
    "selective": {"mode": "ddp", "activation_checkpointing": "selective"},
    "both": {"mode": "fsdp", "compile": "on", "activation_checkpointing": "selective"},
}


def trained(env: Env, plans: list[str]) -> dict[str, list[float]]:
    """Gradient norm and a digest of weights and average after one step of each plan; every rank takes its share of four clips."""
    x, t = clips(4, frames=5)
    y, image_y = torch.arange(4), torch.arange(8).reshape(4, 2) % 5
    mine = slice(env.rank * 4 // env.world_size, (env.rank + 1) * 4 // env.world_size)
    results = {}
    for plan in plans:
        torch._dynamo.reset()
        optim, ema = OptimConfig(lr=1e-2, clip_norm=1.0), EmaConfig(decay=0.5)
        network = Network(latte(num_classes=5), optim=optim, ema=ema, units=lambda module: module.units())
        team = Team({"model": network}, RunConfig(parallel=ParallelConfig(precision="fp32", **PLANS[plan])), env)
        with team.turn("model") as modules:
            team.synchronise("model", last=True)
            out = modules["model"](x[mine], t[mine], y[mine], images=2, image_y=image_y[mine])
            out.square().mean().backward()
        norm = team.gradient_norm("model")
        team.step("model", 0, 1, norm, torch.ones(()), torch.tensor(True))
        member = team.members["model"]
        assert member.ema is not None
        weights = [p.full_tensor() if isinstance(p, DTensor) else p for m in (member.module, member.ema.module) for p in m.parameters()]
        results[plan] = [float(norm), *(float(w.detach().double().square().sum()) for w in weights)]
    return results


def check_plans(plans: list[str]) -> None:
    ranks = distributed.run(trained, processes=2, timeout=300, plans=["ddp", *plans])
    assert ranks[0] == ranks[1]
    for plan in plans:
        torch.testing.assert_close(torch.tensor(ranks[0][plan]), torch.tensor(ranks[0]["ddp"]), rtol=1e-4, atol=1e-5, msg=plan)


def test_sharded_and_recomputed_training_agree_over_two_processes():
    check_plans(["fsdp", "recomputed", "selective"])


@pytest.mark.slow
def test_compiled_training_agrees_over_two_processes():
    check_plans(["both"])


def test_bf16_keeps_to_fp32():
    model, (x, t) = latte(), clips()
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x, t)
    assert float((rounded - exact).abs().max() / exact.abs().max()) < 0.05
