"""Where a run of PVDM's first stage starts from, which settings it refuses, and its recipes."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from models.autoencoders.pvdm import PVDMAEConfig
from models.discriminators import DiscriminatorConfig, Discriminators
from models.official.criterion import Criterion, export_criterion
from models.official.pvdm import export_autoencoder
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from tests.pvdm_stage import CLIPS, batch, config, export, modules, task
from utils.config import load_config
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng
from utils.weights import write_export

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("ucf101", "sky", "ucf101-adversarial", "sky-adversarial")


# ---- where it starts from


def official(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> str:
    torch.save({prefix + name: value for name, value in state.items()}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["run", "export", "file", "release", "release of several processes"])
def test_a_run_starts_from_trained_weights(tmp_path: Path, kind: str) -> None:
    run = export(tmp_path / "run", seed=7)
    trained = modules(task(), seed=7)["ae"]
    paths = {"run": run, "export": run / "export", "file": run / "export" / "model.safetensors"}
    if kind.startswith("release"):
        state = export_autoencoder(trained.state_dict(), trained.config)
        paths[kind] = official(tmp_path / "model_last.pth", state, "module." if "several" in kind else "")
    started = modules(task(f"--init-from {paths[kind]}"), seed=1)["ae"].state_dict()
    assert started.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, started[name]) for name, value in trained.state_dict().items())


def test_a_run_starts_from_the_average_where_there_is_one(tmp_path: Path) -> None:
    plain, average = (modules(task(), seed=seed)["ae"].state_dict() for seed in (1, 2))
    write_export(tmp_path / "export", {"model": plain, "ema": average}, task().card())
    started = modules(task(f"--init-from {tmp_path}"))["ae"].state_dict()
    assert torch.equal(started["patch_in.weight"], average["patch_in.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.dim 24", "its dim is 16, that of the run 24"),
        ("--model.depth 2", "its depth is 1, that of the run 2"),
        ("--model.frame_rotary corrected", "its frame_rotary is release, that of the run corrected"),
        ("--model.readout token", "its readout is first, that of the run token"),
        ("--model.plane_head_dim 8", "its plane_head_dim is 2, that of the run 8"),
        ("--splits 2", "its clip_frames is 4, that of the run 2"),
    ],
)
def test_a_network_that_differs_does_not_start_a_run(tmp_path: Path, flags: str, message: str) -> None:
    run = export(tmp_path / "run")
    with pytest.raises(UserError, match=re.escape(f"--init-from {run} cannot start this run: {message}")) as caught:
        task(f"--init-from {run}", flags).networks()
    assert "\n" not in str(caught.value)


def test_parts_of_a_clip_are_not_part_of_the_network(tmp_path: Path) -> None:
    """Trained on single clips of 4 frames, it goes on with training clips of 8 frames in 2 parts; the width of heads may be spelled out."""
    run = export(tmp_path / "run")
    clips = dataclasses.replace(CLIPS, n_frames=8)
    made = task(f"--init-from {run} --splits 2 --model.plane_head_dim 2", clips=clips)
    nets, samples = modules(made), batch(2, clips=clips)
    assert made.loss("ae", nets, samples, SampleRng(0, samples["index"])).count == 2
    latents = nets["ae"].encode(to_float(samples["video"]))
    assert len(latents) == 4, "each part has planes of its own"
    joined = torch.cat(list(nets["ae"].decode(latents[:2])), dim=1)
    torch.testing.assert_close(joined, nets["ae"](to_float(samples["video"]))[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", ["other stage", "discriminators", "nothing"])
def test_a_file_that_is_no_autoencoder_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    if content == "other stage":
        write_export(tmp_path / "export", {"model": {}}, {"system": "cmd", "stage": "autoencoder"})
    elif content == "discriminators":
        official(tmp_path / "loss_last.pth", Discriminators(DiscriminatorConfig(ndf=4)).state_dict())
    path = {"other stage": tmp_path, "discriminators": tmp_path / "loss_last.pth", "nothing": tmp_path / "none.pth"}[content]
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        task(f"--init-from {path}").networks()
    assert "\n" not in str(caught.value)


def test_a_run_starts_from_released_discriminators(tmp_path: Path) -> None:
    """The release saves them and never reads them back."""
    trained = modules(task("--adversarial"), seed=3)["disc"].state_dict()
    trunk, heads = criterion_parts()
    path = official(tmp_path / "loss_last.pth", export_criterion(Criterion(trained, trunk, heads)))
    started = modules(task(f"--adversarial --init-disc-from {path}"), seed=1)["disc"].state_dict()
    assert all(torch.equal(value, started[name]) for name, value in trained.items())
    with pytest.raises(UserError, match=r"--init-disc-from .*loss_last\.pth cannot start these discriminators: ") as caught:
        task(f"--adversarial --loss.adversarial.ndf 8 --init-disc-from {path}").networks()
    assert "\n" not in str(caught.value)


def criterion_parts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Empty weights of LPIPS: only their names matter here."""
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    trunk = {f"features.{place}.{kind}": torch.zeros(1) for place in places for kind in ("weight", "bias")}
    return trunk, {f"lin{k}.model.1.weight": torch.zeros(1) for k in range(5)}


# ---- settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss.l1 -1", r"loss\.l1 -1\.0: 0 or more"),
        ("--loss.l1 0", "nothing is left to train on"),
        ("--disc-start -1", r"loss\.adversarial\.start_step -1: 0 or more"),
        ("--loss.adversarial.disc_clip_norm nan", r"loss\.adversarial\.disc_clip_norm nan: 0 or more"),
        ("--loss.adversarial.disc_betas 0.5 1", r"disc_betas 0\.5 1\.0: 0 or more, and below 1"),
        ("--loss.adversarial.n_layers 0", "must be at least 1"),
        ("--best-metric fvd --best-mode min", "--best-metric fvd: evaluations measure l1, psnr, ssim$"),
        ("--best-metric perceptual", "--best-metric perceptual: evaluations measure l1, psnr, ssim$"),
    ],
)
def test_impossible_settings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(flags)
    assert "\n" not in str(caught.value)


SIZES_THAT_CANNOT_BE = [
    *((flag, (16, 24)) for flag in ("--patch-size 5", "--patch-size 0", "--splits 3", "--embed-dim 0", "--model.depth -1")),
    *((flag, (16, 24)) for flag in ("--model.dim 0 --model.plane_head_dim 4", "--model.heads 0", "--model.plane_depth 0")),
    ("", (18, 24)),
]


@pytest.mark.parametrize(("flags", "size"), SIZES_THAT_CANNOT_BE)
def test_sizes_that_cannot_be_are_one_line(flags: str, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"^model: ") as caught:
        task(flags, clips=dataclasses.replace(CLIPS, image_size=size))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_the_release_s_network(recipe: str) -> None:
    argv = ["--config", str(ROOT / f"configs/pvdm/{recipe}.yaml")]
    setting = load_config({"pvdm": PVDMAutoencoderConfig}, argv, prog="train_ae.py")
    setting.validate()
    adversarial = setting.loss.adversarial
    clips = dataclasses.replace(CLIPS, n_frames=setting.data.n_frames, image_size=setting.data.image_size)
    assert dataclasses.replace(setting.model.of(clips), plane_head_dim=0) == PVDMAEConfig()
    assert (setting.optim.lr, setting.optim.betas, setting.optim.weight_decay, setting.ema.decay) == (1e-4, (0.5, 0.9), 0.01, 0)
    assert (setting.train.global_batch_size, setting.train.accumulation, setting.loss.l1, setting.loss.perceptual.weight) == (24, 3, 4, 4)
    assert adversarial.enabled == recipe.endswith("adversarial") == bool(setting.best.metric)
    if adversarial.enabled:
        defaults = PVDMAutoencoderConfig().loss.adversarial
        assert adversarial == dataclasses.replace(defaults, enabled=True, disc_lr=1e-4), "the defaults are the release's"
