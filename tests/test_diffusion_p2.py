"""The weight of P2 over the steps, and the robust penalty (spec: VIDM section 6)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion, build
from utils.errors import ConfigError

STEPS = torch.tensor([0, 10, 400, 999])


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples in [-1, 1], noise, and a network's output of noise and variance."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    return x0.clamp(-1, 1), noise, torch.randn(4, 6, 2, 2, generator=generator)


def process(**settings: object) -> GaussianDiffusion:
    built = build(DiffusionConfig(**settings))  # type: ignore[arg-type]
    assert isinstance(built, GaussianDiffusion)
    return built


def losses(diffusion: GaussianDiffusion, output: Tensor) -> dict[str, Tensor]:
    x0, noise, _ = draw()
    return diffusion.training_losses(lambda x, t: output, x0, STEPS, noise)


def test_gamma_and_k_of_one_leave_the_share_of_noise() -> None:
    for respacing in ("", "100", "ddim100"):
        diffusion = process(weighting="p2", respacing=respacing)
        weights = diffusion.error_weight(torch.arange(diffusion.num_timesteps))
        np.testing.assert_allclose(weights, 1 - diffusion.tables["alphas_cumprod"], rtol=1e-5)


@pytest.mark.parametrize(("gamma", "k"), [(0.5, 1.0), (1.0, 0.1), (2.0, 3.0), (0.0, 1.0), (1.0, 0.0)])
def test_other_weights_by_hand(gamma: float, k: float) -> None:
    diffusion = process(weighting="p2", p2_gamma=gamma, p2_k=k)
    np.testing.assert_allclose(diffusion.error_weight(STEPS), (k + diffusion.tables["snr"][STEPS]) ** -gamma, rtol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "robust"])
def test_the_error_is_weighted_and_the_bound_is_not(loss: str) -> None:
    _, _, output = draw()
    weighted, plain = (process(loss=loss, weighting=weighting) for weighting in ("p2", "none"))
    ours, before = losses(weighted, output), losses(plain, output)
    assert torch.equal(ours[loss], before[loss]) and torch.equal(ours["vb"], before["vb"])
    torch.testing.assert_close(ours["loss"], weighted.error_weight(STEPS) * before[loss] + before["vb"])
    assert (ours["vb"] > 0).all()


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_the_weighted_loss_does_not_depend_on_the_words(predict: str) -> None:
    """The weight is that of the noise's squared error, whatever the network predicts."""
    x0, noise, output = draw()
    steps = torch.tensor([100, 300, 500, 700])
    settings = {"variance": "fixed_small", "weighting": "p2", "p2_gamma": 0.7}
    of_eps, other = process(**settings), process(**settings, predict=predict)
    estimate = x0 + 0.1 * output[:, :3]
    x_t = of_eps.q_sample(x0, steps, noise)
    eps = of_eps.eps_from_x0(x_t, steps, estimate)
    expected = of_eps.training_losses(lambda x, t: eps, x0, steps, noise)["loss"]
    said = estimate if predict == "x0" else of_eps.velocity(estimate, steps, eps)
    torch.testing.assert_close(other.training_losses(lambda x, t: said, x0, steps, noise)["loss"], expected, rtol=1e-3, atol=1e-7)


def test_the_penalty_by_hand_and_its_ends() -> None:
    """Elementwise sqrt(d^2 + eta^2): about a size where eta is small, smooth where the error is zero."""
    _, noise, output = draw()
    d = noise - output[:, :3]
    by_hand = (d.double() ** 2 + 0.3**2).sqrt().mean(dim=(1, 2, 3))
    terms = losses(process(loss="robust", robust_eta=0.3, variance="fixed_small"), output[:, :3])
    torch.testing.assert_close(terms["robust"].double(), by_hand, rtol=1e-6, atol=0)
    small = losses(process(loss="robust", variance="fixed_small"), output[:, :3])["loss"]
    torch.testing.assert_close(small, losses(process(loss="l1", variance="fixed_small"), output[:, :3])["loss"])
    for eta in (1e-8, 1e-18):
        exact = noise.clone().requires_grad_()
        losses(process(loss="robust", robust_eta=eta, variance="fixed_small"), exact)["loss"].sum().backward()
        assert exact.grad is not None and (exact.grad == 0).all(), "no error: no gradient, and no NaN"


def test_the_variance_learns_of_the_bound_alone() -> None:
    _, _, output = draw()
    output.requires_grad_()
    terms = losses(process(loss="robust", weighting="p2"), output)
    terms["vb"].sum().backward()
    assert output.grad is not None and (output.grad[:, :3] == 0).all() and (output.grad[:, 3:] != 0).any()


@pytest.mark.parametrize("loss", ["mse", "robust"])
def test_losses_are_compiled_whole(loss: str) -> None:
    x0, noise, output = draw()
    diffusion = process(loss=loss, weighting="p2", p2_gamma=0.5)

    def total(output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return diffusion.training_losses(lambda x, t: output, x0, t, noise)["loss"]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(output, x0, STEPS, noise), total(output, x0, STEPS, noise))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"p2_gamma": 0.5}, "diffusion.p2_gamma 0.5: means nothing with diffusion.weighting none"),
        ({"weighting": "min_snr", "p2_k": 2.0}, "diffusion.p2_k 2.0: means nothing with diffusion.weighting min_snr"),
        ({"weighting": "p2", "min_snr_gamma": 2.0}, "diffusion.min_snr_gamma 2.0: means nothing with diffusion.weighting p2"),
        ({"robust_eta": 0.1}, "diffusion.robust_eta 0.1: means nothing with diffusion.loss mse"),
        ({"process": "flow", "loss": "robust"}, "diffusion.loss robust: means nothing in the process flow"),
        ({"weighting": "p2", "loss": "l1"}, "weighting p2 weighs the mse or robust, which loss 'l1' does not have"),
        ({"weighting": "min_snr", "loss": "robust"}, "weighting min_snr weighs the mse, which loss 'robust' does not have"),
        ({"weighting": "p2", "loss": "robust", "predict": "v"}, "that of the noise's error: predict eps, not v"),
        ({"weighting": "p2", "p2_k": -1.0}, "p2_k -1.0: 0 or more"),
        ({"weighting": "p2", "p2_gamma": -0.5}, "p2_gamma -0.5: 0 or more"),
        ({"loss": "robust", "robust_eta": 0.0}, "robust_eta 0.0: 1e-18 or more"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        process(**setting)
    assert message in str(error.value) and "\n" not in str(error.value)
