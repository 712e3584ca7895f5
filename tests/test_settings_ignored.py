"""Settings that would be without effect, or contradict what is there: refused at the start, in one line."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion import DiffusionConfig
from diffusion import build as build_process
from engine.config import BestConfig
from engine.identity import identity
from pipelines.encoders import ENCODERS, EncoderOptions, system_of
from pipelines.image_vae import vae_of
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.content import CMDContentConfig
from tasks.diffusion_task import Condition, PreviewConfig
from tasks.frame_vae_config import FrameVAERunConfig
from tasks.hvdm_config import HVDMRunConfig
from tasks.latent_config import LatteRunConfig
from tasks.motion import CMDMotionConfig
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from tasks.pvdm_config import PVDMRunConfig
from tasks.vidm_config import VIDMContentConfig
from tests import hvdm_exports, latte_exports, pvdm_exports
from utils.config import load_config, load_yaml
from utils.errors import ConfigError
from utils.rng import SampleRng

ON_LATENTS = (LatteRunConfig, PVDMRunConfig, HVDMRunConfig)
DENOISERS = (*ON_LATENTS, CMDContentConfig, CMDMotionConfig)
RECIPES = [
    (path, schema)
    for path in sorted((Path(__file__).resolve().parent.parent / "configs").glob("*/*.yaml"))
    for schema in DENOISERS
    if schema.system == path.parent.name and schema.stage in load_yaml(path).get("stages", [load_yaml(path).get("stage")])
]
"""Recipes of stages that previews of theirs can be guided in, and the stages."""


def settings(schema: type[Any], *argv: str) -> Any:
    found = load_config({"": schema}, list(argv), prog="train.py")
    found.validate()
    return found


def refused(match: str, schema: type[Any], *argv: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        settings(schema, *argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schema", [*ON_LATENTS, CMDContentConfig, VIDMContentConfig])
def test_a_metric_that_no_evaluation_of_the_stage_has(schema: type[Any]) -> None:
    refused("--best-metric psnr: evaluations measure loss, mse", schema, "--best-metric", "psnr")
    for name in ("loss", "eval/loss", "mse"):
        assert settings(schema, "--best-metric", name, "--best-mode", "min")
    assert settings(schema, "--best-metric", "score/fvd256_16f", "--score-every", "1")


@pytest.mark.parametrize("schema", [CMDAutoencoderConfig, PVDMAutoencoderConfig, FrameVAERunConfig])
def test_a_metric_of_autoencoders(schema: type[Any]) -> None:
    refused("--best-metric loss: evaluations measure l1, psnr, ssim", schema, "--best-metric", "loss")
    assert settings(schema, "--best-metric", "psnr")
    assert settings(schema, "--best-metric", "score/rfvd256_16f_pvdm", "--score-every", "1"), "its name is known when the network is"


@pytest.mark.parametrize(
    "how", [{}, {"loss": "l1"}, {"loss": "robust"}, {"loss": "kl"}, {"variance": "learned_range"}, {"process": "flow"}], ids=str
)
def test_a_process_says_what_its_loss_is_made_of(how: dict[str, Any]) -> None:
    try:
        process = build_process(DiffusionConfig(**how))
    except ConfigError:
        process = build_process(DiffusionConfig(**how, variance="learned_range"))
    channels = 2 if getattr(process, "variance", "") == "learned_range" else 1
    rng = SampleRng(0, torch.arange(2))
    t = process.sample_timesteps(rng)
    made = process.training_losses(lambda x, t: torch.cat([x] * channels, dim=1), torch.rand(2, 3, 4, 4), t, rng.normal("noise", (3, 4, 4)))
    assert tuple(made) == process.terms


@pytest.mark.parametrize("schema", ON_LATENTS)
def test_guidance_with_nothing_to_guide_by(schema: type[Any]) -> None:
    refused(
        r"--preview-guidance 3: without classes \(--num-classes 0\) there is nothing to guide by; give --preview-guidance 1",
        schema, "--preview-guidance", "3", "--num-classes", "0",
    )  # fmt: skip
    refused("--preview-guidance 4: without classes", schema, "--preview-guidance", "4", "--num-classes", "0")
    refused(
        "--preview-guidance 3: with condition.dropout 0 there",
        schema, "--preview-guidance", "3", "--num-classes", "4", "--condition.dropout", "0",
    )  # fmt: skip
    assert settings(schema, "--preview-guidance", "3", "--num-classes", "-1"), "those of the shards"
    assert settings(schema, "--num-classes", "0") and settings(schema, "--preview-guidance", "1")


@pytest.mark.parametrize(("path", "schema"), RECIPES, ids=lambda value: getattr(value, "stem", "") or value.__name__)
def test_without_a_condition_a_recipe_serves_or_the_cure_that_it_is_refused_with_does(path: Path, schema: type[Any]) -> None:
    argv = ["--config", str(path)]
    assert settings(schema, *argv)
    for more in (["--num-classes", "0"], ["--condition.dropout", "0"], ["--num-classes", "0", "--preview-guidance", "4"]):
        try:
            settings(schema, *argv, *more)
            refusal = ""
        except ConfigError as error:
            refusal = str(error)
        assert bool(refusal) == (load_config({"": schema}, [*argv, *more], prog="").preview.guidance not in (None, 1.0))
        if refusal:
            cure = re.fullmatch(r"--preview-guidance .* nothing to guide by; give (--[\w-]+ \S+)", refusal)
            assert cure, refusal
            assert settings(schema, *argv, *more, *cure[1].split())


def test_recipes_of_every_system_with_a_condition_are_looked_at() -> None:
    assert {schema for _, schema in RECIPES} == set(DENOISERS) and len(RECIPES) > 20


def test_the_guidance_of_previews() -> None:
    usual, classes = settings(CMDContentConfig), Condition(3)
    assert classes.guidance(usual.preview) == 4 and Condition(3, 0, 0.0).guidance(usual.preview) == 1
    assert classes.guidance(PreviewConfig(guidance=2.5)) == 2.5
    told = dataclasses.replace(usual, preview=PreviewConfig(guidance=4.0))
    assert identity(told) == identity(usual), "runs whose settings have the usual one as a number go on"


def test_motion_that_the_network_is_not_told() -> None:
    refused("--dynamics-clips 99: without --dynamics-bins no clip is measured; drop it", HVDMRunConfig, "--dynamics-clips", "99")
    refused("--dynamics-dropout 0.3: without --dynamics-bins or --frame-strides", HVDMRunConfig, "--dynamics-dropout", "0.3")
    assert settings(HVDMRunConfig, "--dynamics-dropout", "0.3", "--frame-strides", "1", "2"), "it is of strides too"
    assert settings(HVDMRunConfig, "--dynamics-clips", "99", "--dynamics-bins", "3")


@pytest.mark.parametrize("recipe", ["ucf101", "sky", "taichi", "tiny"])
def test_the_release_goes_over_every_recipe(recipe: str) -> None:
    argv = ["--config", f"configs/hvdm/{recipe}.yaml", "--config", "configs/hvdm/release.yaml"]
    assert not settings(HVDMRunConfig, *argv).model.dynamics_bins


def test_an_encoder_of_another_system_or_behind_an_image_vae(tmp_path: Path) -> None:
    pvdm, hvdm = pvdm_exports.export_autoencoder(tmp_path / "pvdm"), hvdm_exports.export_autoencoder(tmp_path / "hvdm")
    assert system_of(str(pvdm)) == system_of(str(pvdm), "pvdm") == "pvdm" and system_of("", "latte") == "latte"
    with pytest.raises(ConfigError, match=rf"--system hvdm: --ae {pvdm} is an export of 'pvdm'; drop the flag"):
        system_of(str(pvdm), "hvdm")
    with pytest.raises(ConfigError, match="--system cmd: without --ae it is the image VAE that encodes"):
        system_of("", "cmd")
    for system, place in (("pvdm", pvdm), ("hvdm", hvdm)):
        with pytest.raises(ConfigError, match=rf"--vae there: --ae {place} takes pixels, no latents of an image VAE; drop the flag"):
            ENCODERS[system](EncoderOptions(str(place), vae="there"))
        assert ENCODERS[system](EncoderOptions(str(place)))
    frames = latte_exports.export_vae(tmp_path / "vae")
    with pytest.raises(ConfigError, match="which autoencoder"):
        ENCODERS["latte"](EncoderOptions(str(frames), vae="there"))
    with pytest.raises(ConfigError, match=r"--vae there: the autoencoder takes pixels \(--mode pixel\)"):
        vae_of({"model": {"mode": "pixel"}}, "there", 1.0)
    assert vae_of({"model": {"mode": "pixel"}}, "", 1.0) is None


def test_the_check_of_metrics_takes_their_long_names() -> None:
    BestConfig("eval/psnr").check_among(("psnr",))
    with pytest.raises(ConfigError, match="--best-metric eval/psnr: evaluations measure loss"):
        BestConfig("eval/psnr").check_among(("loss",))
