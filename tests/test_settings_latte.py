"""Settings of Latte's denoiser: what the recipes hold, what the releases' flags reach, what is refused."""

from pathlib import Path

import pytest

from tasks.latent_config import LatteRunConfig
from tests.latte_denoiser import config
from utils.config import load_config
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def recipe(name: str) -> LatteRunConfig:
    found = load_config({"latte": LatteRunConfig}, ["--config", str(ROOT / f"configs/latte/{name}.yaml")], prog="train_dit.py")
    found.validate()
    return found


@pytest.mark.parametrize(("name", "interval", "epochs"), [("mmnist", 2, 300), ("ucf101", 3, 1000)])
def test_tutorial_recipes_hold_its_values(name: str, interval: int, epochs: int) -> None:
    found = recipe(name)
    train, optim, data, model = found.train, found.optim, found.data, found.model
    assert (train.global_batch_size, train.accumulation, train.epochs, train.seed) == (4, 1, epochs, 1111)
    assert (optim.lr, optim.weight_decay, optim.clip_norm, found.ema.decay, found.parallel.precision) == (1e-4, 0, 0, 0, "fp32")
    assert (data.n_frames, data.frame_interval, data.clip_rule, data.images) == (16, interval, "linspace", 8)
    sizes = (model.name, model.patch_size, model.depth, model.hidden_size, model.num_heads, model.head_dim, model.time_embed_dim)
    assert sizes == ("Latte-B/2", 2, 12, 768, 12, 64, 256)
    assert (model.time_embed_order, model.pos_embed_order) == ("sin_cos", "hw")
    process = found.diffusion
    assert (process.steps, process.schedule, process.predict, process.variance, process.loss) == (
        1000,
        "linear",
        "eps",
        "fixed_small",
        "mse",
    )
    assert found.condition.num_classes == 0


@pytest.mark.parametrize(
    ("name", "start", "joint_start", "rule", "flip", "classes", "guidance"),
    [
        ("ffs", 20_000, 500_000, "linspace", True, 0, 1.0),
        ("sky", 20_000, 20_000, "consecutive", False, 0, 1.0),
        ("ucf101", 100_000, 100_000, "linspace", True, 101, 7.0),
        ("taichi", 500_000, 500_000, "consecutive", True, 0, 1.0),
    ],
)
def test_official_recipes_hold_its_values(
    name: str, start: int, joint_start: int, rule: str, flip: bool, classes: int, guidance: float
) -> None:
    for joint in (False, True):
        found = recipe(f"{name}-official{'-joint' * joint}")
        train, optim, data = found.train, found.optim, found.data
        assert (train.global_batch_size, train.max_steps, train.seed, train.accumulation) == (32 if joint else 40, 1_000_000, 3407, 1)
        assert (optim.lr, optim.weight_decay, optim.betas, optim.schedule) == (1e-4, 0, (0.9, 0.999), "constant")
        assert (optim.clip_norm, optim.clip_start) == (0.1, joint_start if joint else start)
        assert (data.n_frames, data.frame_interval, data.clip_rule, data.flip) == (16, 3, rule, flip)
        assert (data.images, data.image_size, data.num_workers) == (8 if joint else 0, (256, 256), 8)
        assert (found.ema.decay, found.model.name, found.diffusion.variance, found.diffusion.loss) == (
            0.9999,
            "Latte-XL/2",
            "learned_range",
            "mse",
        )
        assert (found.condition.num_classes, found.condition.dropout, found.preview.guidance) == (classes, 0.1, guidance)
        assert (found.latent.scale, found.checkpoint.every, found.preview.steps) == (0.18215, 10_000, 250)


def test_release_flags_reach_their_settings() -> None:
    flags = "--model Latte-B/4 --num-classes 7 --use-image-num 3 --start-clip-iter 9 --gradient-accumulation-steps 2 --clip-max-norm 0.1"
    more = "--max-train-steps 5 --global-seed 3 --scale-factor 0.5 --vae FOLDER --gradient-checkpointing --ckpt-every 4"
    found = load_config({"latte": LatteRunConfig}, [*flags.split(), *more.split()], prog="train_dit.py")
    assert (found.model.name, found.condition.num_classes, found.data.images, found.optim.clip_start) == ("Latte-B/4", 7, 3, 9)
    assert (found.train.accumulation, found.optim.clip_norm, found.train.max_steps, found.train.seed) == (2, 0.1, 5, 3)
    assert (found.latent.scale, found.vae.path, found.parallel.activation_checkpointing, found.checkpoint.every) == (
        0.5,
        "FOLDER",
        "block",
        4,
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "Latte-Q/2"], "--model Latte-Q/2: .* nearest"),
        (["--model.depth", "3"], "depth 3 is odd"),
        (["--model.num_heads", "5"], "not a multiple of num_heads 5"),
        (["--latent-scale", "-1"], "--latent-scale -1.0"),
        (["--latent-scale", "inf"], "--latent-scale inf"),
        (["--latent-scale", "1", "--latent-shift", "nan"], "--latent-shift nan"),
        (["--latent-shift", "1"], "needs a --latent-scale"),
        (["--latent.measure_clips", "0"], "at least 1"),
        (["--ae", "a", "--vae", "b"], "give one of them"),
        (["--vae.chunk", "0"], "at least 1 frame"),
        (["--init-from-dit", "nowhere.pt"], "no such file"),
        (["--condition.dropout", "1"], "dropout"),
        (["--preview.steps", "2000"], "1000"),
        (["--process", "flow", "--diffusion.predict", "x0"], "means nothing in the process flow"),
        (["--diffusion.beta_end", "1", "--diffusion.steps", "10", "--preview.steps", "5"], "nothing is left but noise"),
    ],
)
def test_impossible_settings_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*argv)
