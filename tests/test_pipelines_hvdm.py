"""HVDM's pipeline: clips to volumes and back; generation after clips, from pictures, of a chosen motion; official checkpoints."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evaluate
from diffusion import DiffusionConfig
from launch.env import distributed
from models.layers.motion import motion_energy
from models.layers.tables import FROM_CLIP, FROM_IMAGE
from models.official import hvdm as official_autoencoder
from pipelines.hvdm import HVDMPipeline
from pipelines.loading import Loaded, diffusion_of, released_system
from pipelines.runs import find_family, systems_in
from pipelines.sampling import Sampling, count_steps
from tests.hvdm_exports import AE, DIT, PROCESS, TOLD, UNET, export_autoencoder, export_denoiser, family, official, told_family
from tests.shard_sets import write_set
from utils.config import load_config
from utils.errors import UserError
from utils.weights import load_tensors

SAMPLING = Sampling(eta=1.0, clip=True, keep_eps=True, respacing="trailing3")
SHAPE = (4, 4, 4, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pipeline(runs: dict[str, Path]) -> HVDMPipeline:
    return HVDMPipeline.from_exports(runs["denoiser"])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> HVDMPipeline:
    """Of a denoiser with all tables."""
    return HVDMPipeline.from_exports(told_family(tmp_path_factory.mktemp("told"))["denoiser"])


@pytest.fixture
def calls(told: HVDMPipeline) -> Any:
    """What the denoiser of `told` is called with: inputs of all calls."""
    found: list[dict[str, Any]] = []
    module = denoiser(told).module
    handle = module.register_forward_hook(lambda _, args, kwargs, out: found.append({"n": len(args[0]), **kwargs}), with_kwargs=True)
    yield found
    handle.remove()


def denoiser(pipeline: HVDMPipeline) -> Loaded:
    assert pipeline.denoiser is not None
    return pipeline.denoiser


def latents(*seeds: int) -> Tensor:
    return torch.stack([torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds])


def test_clips_go_to_volumes_and_back(pipeline: HVDMPipeline) -> None:
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    made = pipeline.encode(video)
    assert made.shape == (2, *SHAPE) and pipeline.latent_shape == SHAPE and pipeline.clip_shape == (4, 16, 16)
    assert torch.equal(pipeline.reconstruct(video), pipeline.decode(made))
    assert torch.allclose(pipeline.encode_each(video), made, atol=1e-5)
    assert pipeline.identity()["system"] == "hvdm" and pipeline.identity()["sha256"] == pipeline.ae.sha256


def test_a_still_is_a_clip_in_which_nothing_moves(pipeline: HVDMPipeline) -> None:
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    clips = pictures[:, :, None].repeat(1, 1, 4, 1, 1)
    assert motion_energy(clips).tolist() == [0, 0]
    assert torch.equal(pipeline.encode_still(pictures), pipeline.encode_each(clips))


def test_a_sample_is_a_function_of_seed_number_and_clip_before(pipeline: HVDMPipeline) -> None:
    both = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING)
    assert torch.equal(pipeline.generate_latents([5], seed=1, sampling=SAMPLING)[0], both[1]) and both.abs().max() <= 1
    after = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both)
    zeros = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=torch.zeros_like(both))
    nothing = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1)
    assert not torch.equal(after, pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both.flip(0)))
    assert torch.equal(zeros, nothing) and not torch.equal(after, zeros) and not torch.equal(nothing, both)
    together = pipeline.generate_latents([3, 5], seed=1, sampling=SAMPLING, clip=1, previous=both, exact=False)
    assert torch.allclose(together, after, atol=1e-4)
    assert torch.equal(pipeline.generate([3, 5], seed=1, sampling=SAMPLING), torch.cat([pipeline.decode(row[None]) for row in both]))


def test_the_usual_sampling_is_the_releases(pipeline: HVDMPipeline) -> None:
    usual = pipeline.usual
    assert (usual.eta, usual.clip, usual.keep_eps, usual.guidance) == (1, True, True, 1)
    full = dataclasses.replace(diffusion_of(denoiser(pipeline)), steps=1000)
    assert count_steps(full, usual) == 100


# What the network is told.


def test_clips_before_and_pictures_are_told_apart(told: HVDMPipeline, calls: list[dict[str, Any]]) -> None:
    before = latents(0)
    alone = told.generate_latents([0], sampling=SAMPLING)
    assert all("task" not in call and "previous" not in call for call in calls), "nothing is told, which means the row of no task"
    calls.clear()
    clip = told.generate_latents([0], sampling=SAMPLING, previous=before)
    assert len(calls) == 3 and all(call["n"] == 1 and call["task"].tolist() == [FROM_CLIP] for call in calls)
    calls.clear()
    image = told.generate_latents([0], sampling=SAMPLING, previous=before, image=True)
    assert all(call["task"].tolist() == [FROM_IMAGE] and torch.equal(call["previous"], before) for call in calls)
    assert torch.equal(image[:, :, :1], before[:, :, :1]), "the first frame is the picture's"
    assert not torch.equal(clip, image) and not torch.equal(clip, alone)


def test_a_network_without_the_table_takes_a_still_for_a_clip_before(pipeline: HVDMPipeline) -> None:
    before = pipeline.encode_still(torch.rand(1, 3, 16, 16))
    found = [pipeline.generate_latents([0], sampling=SAMPLING, previous=before, image=image, anchor=False) for image in (True, False)]
    assert torch.equal(*found)


def test_guidance_takes_condition_and_task_away(told: HVDMPipeline, calls: list[dict[str, Any]]) -> None:
    guided = dataclasses.replace(SAMPLING, guidance=2.0)
    told.generate_latents([0], sampling=guided, previous=latents(0), dynamics=1)
    for call in calls:
        assert call["n"] == 2 and call["task"].tolist() == [FROM_CLIP, 0] and bool((call["previous"][1] == 0).all())
        assert call["dynamics"].tolist() == [1, 1], "the motion that is asked for is guided for itself"
    calls.clear()
    told.generate_latents([0], sampling=guided, dynamics=1)
    assert all(call["n"] == 1 for call in calls), "of nothing to take away nothing is computed"


def test_motion_is_guided_from_any_towards_its_class(told: HVDMPipeline, calls: list[dict[str, Any]]) -> None:
    plain = told.generate_latents([0], sampling=SAMPLING, dynamics=2)
    assert all(call["n"] == 1 and call["dynamics"].tolist() == [2] for call in calls), "a guidance of 1 asks once a step"
    calls.clear()
    more = told.generate_latents([0], sampling=SAMPLING, dynamics=2, dynamics_guidance=3.0, previous=latents(0))
    assert all(call["dynamics"].tolist() == [2, TOLD.dynamics_bins] and call["task"].tolist() == [FROM_CLIP] * 2 for call in calls)
    assert not torch.equal(plain, more)
    others = [told.generate_latents([0], sampling=SAMPLING, dynamics=number) for number in (0, None)]
    assert not torch.equal(plain, others[0]) and not torch.equal(plain, others[1])
    nothing = told.generate_latents([0], sampling=SAMPLING, dynamics=2, dynamics_guidance=0.0)
    assert torch.allclose(nothing, others[1], atol=1e-4), "guidance 0 is any motion"


def test_both_guidances_go_together(told: HVDMPipeline) -> None:
    """One step, so that the guided estimate can be put together from four plain ones."""
    one = dataclasses.replace(SAMPLING, respacing="trailing1", clip=False, keep_eps=False, eta=0.0)
    before, found = latents(0), {}
    for given in (False, True):
        for dynamics in (None, 1):
            previous = before if given else None
            found[given, dynamics] = told.generate_latents([0], sampling=one, previous=previous, dynamics=dynamics)
    towards = {given: found[given, None] + 3 * (found[given, 1] - found[given, None]) for given in (False, True)}
    expected = towards[False] + 2 * (towards[True] - towards[False])
    both = dataclasses.replace(one, guidance=2.0)
    made = told.generate_latents([0], sampling=both, previous=before, dynamics=1, dynamics_guidance=3.0)
    assert torch.allclose(made, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_what_the_denoiser_does_not_know_is_refused(
    told: HVDMPipeline, pipeline: HVDMPipeline, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="was trained without dynamics"):
        pipeline.generate_latents([0], dynamics=1)
    with pytest.raises(UserError, match="was trained without frame strides"):
        pipeline.generate_latents([0], stride=1)
    with pytest.raises(UserError, match=r"no class 3 of dynamics: .* knows 0 to 2"):
        told.generate_latents([0], dynamics=3)
    with pytest.raises(UserError, match="no class 2 of frame strides"):
        told.generate_latents([0], stride=2)
    with pytest.raises(UserError, match="not the autoencoder alone"):
        HVDMPipeline.from_exports(ae=runs["ae"]).generate([0])
    alone = export_denoiser(tmp_path / "alone", runs["ae"], dataclasses.replace(UNET, conditional=False))
    with pytest.raises(UserError, match="knows no previous clip"):
        HVDMPipeline.from_exports(alone).generate_latents([0], previous=latents(0))


def test_transformers_flows_and_classes_generate_too(tmp_path: Path) -> None:
    runs = family(tmp_path, dataclasses.replace(DIT, num_classes=3), DiffusionConfig(process="flow"))
    found = HVDMPipeline.from_exports(runs["denoiser"])
    first = found.generate_latents([0, 0], [0, 2], sampling=Sampling(steps=2))
    assert not torch.equal(first[0], first[1])
    after = found.generate_latents([0, 0], [0, 2], sampling=Sampling(steps=2, guidance=2.0), clip=1, previous=first)
    assert not torch.equal(after, found.generate_latents([0, 0], [0, 2], sampling=Sampling(steps=2, guidance=2.0), clip=1))
    with pytest.raises(UserError, match="no class 3"):
        found.generate([0], [3], sampling=Sampling(steps=2))


# Official checkpoints and families.


@pytest.mark.parametrize("form", ["dots", "without", "module"])
def test_official_checkpoints_generate_what_exports_do(tmp_path: Path, form: str) -> None:
    ae = export_autoencoder(tmp_path / "ae", dataclasses.replace(AE, **official_autoencoder.RELEASE))
    ours = HVDMPipeline.from_exports(export_denoiser(tmp_path / "denoiser", ae))
    paths = official(tmp_path)
    state = load_tensors(paths["denoiser"])
    if form == "without":  # the release's object for averages: no dots in names, parameters only
        state = {name.replace(".", ""): value for name, value in state.items() if not name.endswith(".zeros")}
        torch.save(state | {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(7)}, paths["denoiser"])
    elif form == "module":
        torch.save({f"module.{name}": value for name, value in load_tensors(paths["ae"]).items()}, paths["ae"])
    released = HVDMPipeline.from_exports(paths["denoiser"], paths["ae"])
    assert released.ae.config == ours.ae.config and denoiser(released).config == UNET
    assert denoiser(released).card["diffusion"] == {"schedule": PROCESS.schedule, "variance": PROCESS.variance}
    assert released_system(paths["ae"]) == "hvdm" and (released.scale, released.shift) == (1.0, 0.0)
    same = dataclasses.replace(denoiser(released), card=denoiser(ours).card | {"ae": {}})
    assert torch.equal(HVDMPipeline(released.ae, same).generate([2], sampling=SAMPLING), ours.generate([2], sampling=SAMPLING))


def test_mistaken_checkpoints_are_refused(tmp_path: Path) -> None:
    paths = official(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of HVDM's autoencoder that can be read: it is the denoiser's"):
        HVDMPipeline.from_exports(paths["denoiser"], paths["denoiser"])
    with pytest.raises(UserError, match="no checkpoint of HVDM's denoiser"):
        HVDMPipeline.from_exports(paths["ae"], paths["ae"])
    with pytest.raises(UserError, match="is not known: give --ae"):
        HVDMPipeline.from_exports(paths["denoiser"])
    with pytest.raises(UserError, match="16 x 16, not 32 x 32"):
        HVDMPipeline.from_exports(ae=paths["ae"], image_size=(32, 32))
    longer = official(tmp_path / "longer", dataclasses.replace(UNET, latent_frames=8))
    with pytest.raises(UserError, match=r"makes latents of 4 channels of 8x4x4, the autoencoder .* has 4 channels of 4x4x4"):
        HVDMPipeline.from_exports(longer["denoiser"], paths["ae"])


def test_what_was_not_trained_together_is_refused(tmp_path: Path) -> None:
    runs = family(tmp_path)
    other = export_autoencoder(tmp_path / "002-hvdm-autoencoder", seed=5)
    with pytest.raises(UserError, match="was trained on another autoencoder"):
        HVDMPipeline.from_exports(runs["denoiser"], other)
    assert systems_in(tmp_path) == ["hvdm"] and find_family(tmp_path, "hvdm")["autoencoder"] == runs["ae"]
    shutil.rmtree(runs["ae"])
    with pytest.raises(UserError, match="which is not there: give --ae"):
        HVDMPipeline.from_exports(runs["denoiser"])


def test_reconstruction_is_measured(runs: dict[str, Path], tmp_path: Path) -> None:
    """An export, and an official checkpoint, whose names say what it is."""
    write_set(tmp_path / "shards", [2], lengths=(9,), size=(16, 16))
    for ae in (runs["ae"], official(tmp_path / "official")["ae"]):
        line = ["--ae", str(ae), "--data-path", str(tmp_path / "shards"), "--perceptual", "none"]
        config = load_config(dict.fromkeys(evaluate.ENCODERS, evaluate.ReconstructConfig), line, prog="evaluate.py")
        with distributed(60) as env:
            found = evaluate.measure_reconstruction(config, env)
        assert (found["clips"], found["protocol"]["frames"], found["protocol"]["size"]) == (2, 4, [16, 16])
