"""Steps whose loss or gradient is not finite: what of them is left out, and which samples are named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.archive import PARTS, pack
from engine.loop import fit
from engine.tally import Guard, Tally, name_samples
from engine.task import LossOutput
from launch.env import Env, distributed
from tests.toy_task import ToySource, ToyTask, toy_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    with distributed(60) as env:
        yield env


def test_a_critic_learns_nothing_in_a_step_whose_generator_is_left_out(tmp_path: Path, env: Env) -> None:
    config = toy_config(tmp_path, max_steps=9, max_bad_steps=3, mode="ddp", **{"checkpoint.every": 1, "keep_last": 0})
    with pytest.raises(UserError, match="saved as step_0000004"):
        fit(ToyTask(config, gan=True, bad_from=4), ToySource(config, 0, 1), config, env)
    found = {}
    for name in ("step_0000004", "step_0000005.abandoned"):
        pack(tmp_path / "000-toy/checkpoints" / name, file := tmp_path / f"{name}.safetensors", list(PARTS))
        # Averages go on, and a forward pass counts for the statistics of batch norms.
        kept = {key: value for key, value in load_file(file).items() if not key.startswith("ema")}
        found[name] = {key: value for key, value in kept.items() if "running" not in key and "num_batches" not in key}
    before, after = found.values()
    assert [key for key in before if "critic" in key and key.startswith("optim")]
    assert before.keys() == after.keys() and not [key for key in before if not torch.equal(before[key], after[key])]


def outcome(env: Env, losses: list[float], norm: float = 1.0) -> str:
    """What a guard says when steps with micro-batches of these losses go on."""
    guard = Guard(env, 1, 0)
    tally = Tally(env)
    for loss in losses:
        tally.add(LossOutput(torch.tensor(loss), 2))
    sums = tally.reduce()
    guard.end_step(3, [(sums, sums.finite(torch.tensor(norm)))])
    error = guard.stop(lambda step, bad: name_samples(lambda index: f"clip {index}", step, bad, 2 * len(losses), 1, len(losses)))
    return str(error or "")


def test_the_micro_batch_that_was_not_finite_is_named(env: Env) -> None:
    assert outcome(env, [1.0, 2.0, 3.0]) == ""
    assert "the loss of rank 0 on clip 6, clip 7:" in outcome(env, [float("nan")])
    assert "the loss of rank 0 on clip 20, clip 21:" in outcome(env, [1.0, float("inf"), float("nan")])
    assert "the loss of rank 0 on clip 22, clip 23:" in outcome(env, [1.0, 2.0, float("-inf")])
    assert "a gradient on clip 18, clip 19, clip 20, clip 21, clip 22, clip 23:" in outcome(env, [1.0, 2.0, 3.0], norm=float("nan"))


def test_names_are_of_the_bad_rank_and_no_more_than_a_few() -> None:
    def named(bad: dict[int, int]) -> str:
        return name_samples(str, 2, bad, 64, 4, 2)

    assert named({3: 2, 1: 1}) == "152, 153, 154, 155, 156, 157, 158, 159", "rank 1, the last of its two micro-batches"
    assert named({3: 2}).startswith("176,") and named({}).endswith("135 and 56 more")
