"""Checks of VIDM's diffusion: tables with the P2 weight, both losses, both samplers, and the step of its optimiser and average."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.samplers import ddim_sample, ddpm_sample
from engine.config import EmaConfig, OptimConfig
from engine.ema import Ema
from engine.optim import build_optimizer, gradient_norm, guarded_step
from tests.parity.case import Case, adapter

TABLES, FORWARD, TRAJECTORY = 1e-10, 1e-5, 5e-4
STUB = re.compile(r"eps=([\d.]+)\*x\+([\d.]+)\*cos\(([\d.]+)\*t\), var=tanh\(([\d.]+)\*x\), t = original .*; output cat\(\[eps,var\],1\)")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def process(case: Case, **changed: Any) -> GaussianDiffusion:
    """The process of a case, with the weights of P2 where it says them."""
    weights: dict[str, Any] = {}
    if "p2_gamma" in list(case.fields):
        weights = {"weighting": "p2", "p2_gamma": float(case.config("p2_gamma")), "p2_k": float(case.config("p2_k"))}
    kept = case.config("timestep_respacing", "")
    schedule: Any = SCHEDULES[case.config("noise_schedule")]
    built = build(DiffusionConfig(steps=case.config("steps"), schedule=schedule, respacing=kept, **weights | changed))
    assert isinstance(built, GaussianDiffusion)
    return built


@adapter("vidm", "diffusion tables (float64)")
def check_schedule(case: Case) -> None:
    diffusion = process(case)
    for name, table in diffusion.tables.items():
        case.expect(name, torch.from_numpy(table), TABLES, each=True)
    case.expect("timestep_map", torch.tensor(diffusion.timestep_map))
    # What the loss reads is of float32.
    case.expect("p2_weight", diffusion.error_weight(torch.arange(diffusion.num_timesteps)), 1e-6, each=True)


@adapter("vidm", "training loss with P2 weighting")
def check_loss(case: Case) -> None:
    learned, rescaled = case.config("learn_sigma"), case.config("rescale_learned_sigmas")
    assert not case.config("predict_xstart"), "the weight is that of the noise's error"
    diffusion = process(
        case, variance="learned_range" if learned else "fixed_large", loss="rescaled_mse" if rescaled and learned else "mse"
    )
    output, seen = case.input("model_output").requires_grad_(), list[Tensor]()

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.extend([x, t])
        return output

    t = case.input("t")
    terms = diffusion.training_losses(network, case.input("x_start"), t, case.input("noise"))
    terms["loss"].mean().backward()
    # The release's mse is weighted already; ours is logged as it is.
    for name, value in (("loss", terms["loss"]), ("mse", diffusion.error_weight(t) * terms["mse"]), ("vb", terms.get("vb"))):
        if value is not None:
            case.expect(name, value, FORWARD)
    assert output.grad is not None
    case.expect("grad_model_output", output.grad, FORWARD)
    case.expect("x_t", seen[0], FORWARD)
    case.expect("t_seen_by_model", seen[1])


@adapter("vidm", "robustness penalty")
def check_robust(case: Case) -> None:
    diffusion = process(case, variance="fixed_small", loss="robust", robust_eta=case.config("eta"))
    noise, estimate = case.input("noise"), case.input("pred").requires_grad_()
    penalty = diffusion.training_losses(lambda x, t: estimate, torch.zeros_like(noise), case.input("t"), noise)["loss"]
    penalty.mean().backward()
    assert estimate.grad is not None
    case.expect("penalty", penalty, FORWARD)
    case.expect("grad_pred", estimate.grad, FORWARD)


def stub_of(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The closed-form network that a case states."""
    stated = STUB.fullmatch(case.config("model"))
    assert stated, case.config("model")
    of_x, height, rate, of_v = map(float, stated.groups())

    def stub(x: Tensor, t: Tensor) -> Tensor:
        wave = height * torch.cos(rate * t.float()).reshape(-1, *[1] * (x.ndim - 1))
        return torch.cat([of_x * x + wave, torch.tanh(of_v * x)], dim=1)

    return stub


@adapter("vidm", "samplers (ancestral with learned-range variance; DDIM eta 0)")
def check_samplers(case: Case) -> None:
    diffusion, stub = process(case), stub_of(case)
    noise, start = case.input("step_noise"), case.input("x_T")
    states, estimates, smooth = [start], list[Tensor](), list[Tensor]()

    def see(k: int, x: Tensor, x0: Tensor) -> None:
        states.append(x)
        estimates.append(x0)

    ddpm_sample(diffusion, stub, start, noise=noise.__getitem__, clip_denoised=True, callback=see)
    case.expect("ancestral_x", torch.stack(states[1:]), TRAJECTORY)
    case.expect("ancestral_pred_xstart", torch.stack(estimates), TRAJECTORY)
    steps = [torch.full((len(start),), step) for step in reversed(range(diffusion.num_timesteps))]
    spread = [diffusion.p_mean_variance(stub, x, t).log_variance for x, t in zip(states, steps, strict=False)]
    case.expect("ancestral_log_variance", torch.stack(spread), TRAJECTORY)
    ddim_sample(diffusion, stub, start, noise=noise.__getitem__, clip_denoised=True, callback=lambda k, x, x0: smooth.append(x))
    case.expect("ddim_eta0_x", torch.stack(smooth), TRAJECTORY)


@adapter("vidm", "optimiser and EMA recipe")
def check_train_step(case: Case) -> None:
    """The engine's optimiser, clipping and average on a small network."""
    assert case.config("optimizer") == "AdamW"
    names = ("lr", "eps", "weight_decay")
    config = OptimConfig(
        **{name: case.config(name) for name in names}, betas=tuple(case.config("betas")), clip_norm=case.config("grad_clip")
    )
    x, y = case.input("x"), case.input("y")
    weights = case.state()
    networks = []
    for _ in range(2):
        hidden, inputs = weights["0.weight"].shape
        networks.append(nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, y.shape[-1])))
        networks[-1].load_state_dict(weights)
    model, average = networks
    optimizer = build_optimizer(list(model.parameters()), config, sharded=False)
    ema, norms, one = Ema(average, model, EmaConfig(case.config("ema_decay"))), list[Tensor](), torch.ones(())
    for step in range(case.config("steps")):
        ((model(x[step]) - y[step]) ** 2).mean().backward()
        norms.append(gradient_norm(model.parameters()).detach())
        guarded_step(optimizer, norms[-1], config.clip_norm, one, torch.tensor(True))
        ema.update(step + 1)
    case.expect("grad_norms_before_clip", torch.stack(norms), FORWARD)
    for group, module in (("model", model), ("ema", average)):
        for name, value in module.state_dict().items():
            case.expect(f"{group}/{name}", value, FORWARD)
