"""Checks of PVDM: the average of the weights with its warm-up, and the learning rate's warm-up."""

import torch
from torch import nn

from engine.config import EmaConfig, OptimConfig
from engine.ema import Ema
from engine.optim import learning_rate
from tests.parity.case import Case, adapter


@adapter("pvdm", "ema")
def check_ema(case: Case) -> None:
    """Weights after each update. The release's two buffers are its bookkeeping: the decay, and how often it updated (-1: not counted)."""
    config = EmaConfig(case.config("decay"), case.config("warmup"))
    source = holder(case.group("in/step0/"))
    average = holder(case.group("in/step0/"))
    ema = Ema(average, source, config)
    for number in range(1, case.config("updates") + 1):
        source.load_state_dict({key.replace(".", "/"): value for key, value in case.group(f"in/step{number}/").items()})
        ema.update(number)
        for key, value in average.named_parameters():
            case.expect(f"step{number}/{key.replace('/', '')}", value)
        expected = {"decay": torch.tensor(config.decay), "num_updates": torch.tensor(number if config.warmup else -1)}
        for key, value in expected.items():
            name = f"out/step{number}/{key}"
            if case.has(name):
                case.compare(name, value.reshape(case.tensor(name).shape), 1e-6)


def holder(values: dict[str, torch.Tensor]) -> nn.Module:
    """A module with these parameters; names without dots, which parameters may not have."""
    module = nn.Module()
    for key, value in values.items():
        module.register_parameter(key.replace(".", "/"), nn.Parameter(value.clone()))
    return module


@adapter("pvdm", "lr_schedule")
def check_lr_schedule(case: Case) -> None:
    (steps,), (start,), (top,), (end,) = (case.config(name) for name in ("warm_up_steps", "f_start", "f_max", "f_min"))
    assert end == top, "one cycle of a falling rate is no schedule of ours"
    assert case.config("cycle_lengths")[0] > int(case.input("n").max())
    # From 0 our own rule is a step ahead; a share next to nothing has the release's.
    config = OptimConfig(lr=top, warmup_steps=steps, warmup_start=max(start / top, 1e-12))
    factors = torch.tensor([learning_rate(config, int(n), 10**6) for n in case.input("n")])
    case.expect("factor", factors, 1e-6, 1e-9, each=True)
