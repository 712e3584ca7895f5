"""PVDM's pipeline: encode, decode and generate from exports and official checkpoints; what does not belong together is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from diffusion import DiffusionConfig
from launch.env import distributed
from models.official import pvdm_unet
from pipelines.loading import released_system
from pipelines.pvdm import PVDMPipeline
from pipelines.runs import find_family, systems_in
from pipelines.sampling import Sampling
from tests.pvdm_exports import AE, DIT, PROCESS, UNET, export_autoencoder, export_denoiser, family, official, without_condition
from tests.shard_sets import write_set
from utils.config import load_config
from utils.errors import UserError
from utils.weights import load_tensors

SAMPLING = Sampling(eta=1.0, clip=True, keep_eps=True, respacing="trailing4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pipeline(runs: dict[str, Path]) -> PVDMPipeline:
    return PVDMPipeline.from_exports(runs["denoiser"])


def test_clips_go_to_planes_and_back(pipeline: PVDMPipeline) -> None:
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    latents = pipeline.encode(video)
    assert latents.shape == (2, 4, 48) and pipeline.latent_shape == (4, 48) and pipeline.clip_shape == (4, 16, 16)
    assert torch.equal(pipeline.reconstruct(video), pipeline.decode(latents))
    assert torch.equal(pipeline.encode_latents(video)["latent"], latents)
    assert pipeline.identity()["system"] == "pvdm" and pipeline.identity()["sha256"] == pipeline.ae.sha256


def test_pairs_are_two_clips_in_a_row(runs: dict[str, Path], pipeline: PVDMPipeline) -> None:
    pairs = PVDMPipeline.from_exports(ae=runs["ae"], pairs=True)
    video = torch.rand(2, 3, 8, 16, 16) * 2 - 1
    found = pairs.encode_latents(video)
    first, second = (pipeline.encode(part) for part in video.split(4, dim=2))
    assert pairs.clip_shape == (8, 16, 16) and set(found) == {"previous", "latent"}
    assert torch.equal(found["previous"], first) and torch.equal(found["latent"], second)
    with pytest.raises(UserError, match="not the autoencoder alone"):
        pairs.generate([0])


def test_scaled_latents_come_back(runs: dict[str, Path], tmp_path: Path, pipeline: PVDMPipeline) -> None:
    run = export_denoiser(tmp_path / "scaled", runs["ae"], latent={"scale": 2.0, "shift": 0.1})
    scaled = PVDMPipeline.from_exports(run)
    video = torch.rand(1, 3, 4, 16, 16) * 2 - 1
    assert torch.allclose(scaled.encode(video), (pipeline.encode(video) - 0.1) * 2)
    assert torch.equal(scaled.encode_latents(video)["latent"], pipeline.encode(video)), "sets store the planes as they are"
    assert torch.allclose(scaled.reconstruct(video), pipeline.reconstruct(video), atol=1e-5)


def test_a_sample_is_a_function_of_seed_number_and_clip_before(pipeline: PVDMPipeline) -> None:
    both = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING)
    assert torch.equal(pipeline.generate_latents([5], seed=1, sampling=SAMPLING)[0], both[1]) and not torch.equal(both[0], both[1])
    assert not torch.equal(pipeline.generate_latents([5], seed=2, sampling=SAMPLING)[0], both[1])
    assert both.abs().max() <= 1, "estimates are kept in the range of the planes"
    after = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both)
    swapped = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both.flip(0))
    zeros = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=torch.zeros_like(both))
    nothing = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1)
    assert not torch.equal(after, swapped) and not torch.equal(after, zeros)
    assert torch.equal(zeros, nothing), "no clip before is zeros, not a black clip"
    assert not torch.equal(nothing, both), "each clip has noise of its own"
    together = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both, exact=False)
    assert torch.allclose(together, after, atol=1e-4)
    assert torch.equal(pipeline.generate([3, 5], seed=1, sampling=SAMPLING), torch.cat([pipeline.decode(row[None]) for row in both]))


def test_guidance_leads_away_from_no_clip_before(pipeline: PVDMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    assert pipeline.denoiser is not None
    pipeline.denoiser.module.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((len(args[0]), bool((kwargs["previous"][-1] == 0).all()))), with_kwargs=True
    )
    before = torch.rand(1, 4, 48)
    plain = pipeline.generate_latents([0], sampling=SAMPLING, previous=before)
    assert set(calls) == {(1, False)} and len(calls) == 4, "guidance 1 asks the network once a step"
    calls.clear()
    guided = pipeline.generate_latents([0], sampling=dataclasses.replace(SAMPLING, guidance=2.0), previous=before)
    assert set(calls) == {(2, True)} and not torch.equal(guided, plain)
    pipeline.denoiser.module._forward_hooks.clear()


def test_transformers_and_flows_generate_too(tmp_path: Path) -> None:
    runs = family(tmp_path, DIT, DiffusionConfig(process="flow"))
    pipeline = PVDMPipeline.from_exports(runs["denoiser"])
    first = pipeline.generate_latents([0], sampling=Sampling(steps=3))
    after = pipeline.generate_latents([0], sampling=Sampling(steps=3), clip=1, previous=first)
    assert not torch.equal(after, pipeline.generate_latents([0], sampling=Sampling(steps=3), clip=1))


def test_classes_are_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    run = export_denoiser(tmp_path / "classes", runs["ae"], dataclasses.replace(UNET, num_classes=3))
    pipeline = PVDMPipeline.from_exports(run)
    made = pipeline.generate_latents([0, 0], [0, 2], sampling=SAMPLING, previous=torch.rand(2, 4, 48))
    assert not torch.equal(made[0], made[1])
    guided = dataclasses.replace(SAMPLING, guidance=1.5)
    assert pipeline.generate([0], [1], sampling=guided, previous=torch.rand(1, 4, 48)).shape == (1, 3, 4, 16, 16)
    with pytest.raises(UserError, match="no class 3"):
        pipeline.generate([0], [3], sampling=SAMPLING)


# Official checkpoints.


@pytest.mark.parametrize("form", ["dots", "without", "module"])
def test_official_checkpoints_generate_what_exports_do(runs: dict[str, Path], tmp_path: Path, pipeline: PVDMPipeline, form: str) -> None:
    paths = official(tmp_path)
    state = load_tensors(paths["denoiser"])
    if form == "without":  # the release's object for averages: no dots in names, parameters only
        state = {name.replace(".", ""): value for name, value in state.items() if not name.endswith(".zeros")}
        torch.save(state | {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(7)}, paths["denoiser"])
    elif form == "module":
        torch.save({f"module.{name}": value for name, value in load_tensors(paths["ae"]).items()}, paths["ae"])
    released = PVDMPipeline.from_exports(paths["denoiser"], paths["ae"])
    assert released.denoiser is not None and pipeline.denoiser is not None
    assert released.ae.config == AE and released.denoiser.config == UNET
    for ours, theirs in ((pipeline.ae, released.ae), (pipeline.denoiser, released.denoiser)):
        assert all(torch.equal(value, theirs.module.state_dict()[name]) for name, value in ours.module.state_dict().items())
    assert released.denoiser.card["diffusion"] == {"schedule": PROCESS.schedule, "variance": PROCESS.variance}
    assert released_system(paths["ae"]) == "pvdm" and (released.scale, released.shift) == (1.0, 0.0)


def test_mistaken_checkpoints_are_refused(tmp_path: Path) -> None:
    paths = official(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of PVDM's autoencoder that can be read: it is the denoiser's"):
        PVDMPipeline.from_exports(paths["denoiser"], paths["denoiser"])
    with pytest.raises(UserError, match="no checkpoint of PVDM's denoiser"):
        PVDMPipeline.from_exports(paths["ae"], paths["ae"])
    with pytest.raises(UserError, match="is not known: give --ae"):
        PVDMPipeline.from_exports(paths["denoiser"])
    with pytest.raises(UserError, match="for clips of 16 x 16, not 32 x 32"):
        PVDMPipeline.from_exports(ae=paths["ae"], image_size=(32, 32))
    longer = dataclasses.replace(UNET, latent_frames=8)
    official(tmp_path / "longer", longer)
    with pytest.raises(UserError, match=r"latents of 4 channels on planes of 4x4, 8x4, 8x4, the autoencoder .* has 4 channels on"):
        PVDMPipeline.from_exports(tmp_path / "longer" / "ema_model_100.pth", paths["ae"])


# Families.


def test_a_denoiser_without_a_clip_before_cannot_go_on(runs: dict[str, Path], tmp_path: Path) -> None:
    run = export_denoiser(tmp_path / "alone", runs["ae"], without_condition())
    pipeline = PVDMPipeline.from_exports(run)
    assert pipeline.generate_latents([0], sampling=SAMPLING).shape == (1, 4, 48)
    with pytest.raises(UserError, match="knows no previous clip"):
        pipeline.generate_latents([0], sampling=SAMPLING, previous=torch.zeros(1, 4, 48))
    assert not pvdm_unet.load(load_tensors(official(tmp_path / "o", without_condition())["denoiser"]), latent_res=(4, 4))[1].conditional


def test_what_was_not_trained_together_is_refused(tmp_path: Path) -> None:
    runs = family(tmp_path)
    other = export_autoencoder(tmp_path / "002-pvdm-autoencoder", seed=5)
    with pytest.raises(UserError, match="was trained on another autoencoder"):
        PVDMPipeline.from_exports(runs["denoiser"], other)
    assert systems_in(tmp_path) == ["pvdm"] and find_family(tmp_path, "pvdm")["autoencoder"] == runs["ae"]
    shutil.rmtree(runs["ae"])
    with pytest.raises(UserError, match="which is not there: give --ae"):
        PVDMPipeline.from_exports(runs["denoiser"])


def test_reconstruction_is_measured(runs: dict[str, Path], tmp_path: Path) -> None:
    """An export, and an official checkpoint, whose names say what it is."""
    write_set(tmp_path / "shards", [3], lengths=(9,), size=(16, 16))
    found = []
    for ae in (runs["ae"], official(tmp_path / "official")["ae"]):
        line = ["--ae", str(ae), "--data-path", str(tmp_path / "shards"), "--perceptual", "none", "--psnr-per-clip"]
        config = load_config(dict.fromkeys(evaluate.ENCODERS, evaluate.ReconstructConfig), line, prog="evaluate.py")
        with distributed(60) as env:
            found.append(evaluate.measure_reconstruction(config, env))
    assert found[0]["psnr"] == found[1]["psnr"] and found[0]["clips"] == 3
    assert (found[0]["protocol"]["frames"], found[0]["protocol"]["size"]) == (4, [16, 16])
