"""The processes through the stages that train denoisers, their exports and what generates with them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion import FlowMatching
from engine.task import Batch
from pipelines.cmd import CMDPipeline
from pipelines.cmd_sample import CMDSampleConfig, CMDSampleJob
from pipelines.loading import diffusion_of
from pipelines.sampling import Sampling
from tests.cmd_family import CLIPS, autoencoder_task, content_task, export, motion_task
from utils.config import save_yaml, to_dict
from utils.errors import ConfigError
from utils.rng import SampleRng
from utils.weights import load_card

PROCESSES = {
    "flow": ["--process", "flow"],
    "shifted flow": ["--process", "flow", "--diffusion.time_shift", "3", "--diffusion.time_sampling", "uniform"],
    "v, min-SNR": ["--diffusion.predict", "v", "--loss-weighting", "min_snr"],
    "x0, fixed": ["--diffusion.predict", "x0", "--diffusion.variance", "fixed_small", "--loss-weighting", "min_snr"],
}
STAGES = {"content": content_task, "motion": motion_task}


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(autoencoder_task(), tmp_path_factory.mktemp("runs") / "000-cmd-autoencoder")


def batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (count, 3, CLIPS.n_frames, *CLIPS.image_size), generator=generator, dtype=torch.uint8)
    return {"video": video, "label": torch.arange(count) % 3, "index": torch.arange(10, 10 + count)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_trains_every_stage(ae: Path, stage: str, process: str) -> None:
    """The variance follows from the process; the loss belongs to the samples and reaches every weight; the meta device counts it."""
    task = STAGES[stage](ae, *PROCESSES[process])
    learned = process == "v, min-SNR"
    assert task.model_config.learn_sigma == learned
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {name: network.module for name, network in task.networks().items()}
    for parameter in networks[stage].parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    samples = batch(3)
    whole = task.loss(stage, networks, samples, SampleRng(0, samples["index"]))
    whole.total.backward()
    assert not [name for name, value in networks[stage].named_parameters() if value.requires_grad and value.grad is None]
    assert set(whole.metrics) == ({"mse", "vb"} if learned else {"mse"})
    parts = [{name: value[part] for name, value in samples.items()} for part in (slice(0, 1), slice(1, 3))]
    split = [task.loss(stage, networks, part, SampleRng(0, part["index"])).total.item() for part in parts]
    assert sum(split) == pytest.approx(whole.total.item(), rel=1e-5)
    with torch.no_grad():
        for picture in task.preview(networks, samples, SampleRng(0, samples["index"])).values():
            assert bool(picture.isfinite().all()) and float(picture.abs().max()) <= 1
    on_meta = {name: network.to("meta") for name, network in networks.items()}
    spec = task.batch_spec(2)
    assert task.loss(stage, on_meta, spec, SampleRng(0, spec["index"], "meta")).total.is_meta


@pytest.fixture(scope="module")
def runs(ae: Path) -> Path:
    """A content model of a flow and a motion model of v, beside their autoencoder."""
    export(content_task(ae, *PROCESSES["shifted flow"]), ae.parent / "001-cmd-content", 1)
    export(motion_task(ae, *PROCESSES["v, min-SNR"]), ae.parent / "002-cmd-motion", 2)
    return ae.parent


def test_exports_say_their_process_and_generate_with_its_samplers(runs: Path) -> None:
    pipeline = CMDPipeline.from_exports(*sorted(runs.iterdir())[:3])
    assert pipeline.content is not None and pipeline.motion is not None
    content, motion = diffusion_of(pipeline.content), diffusion_of(pipeline.motion)
    assert (content.process, content.time_shift, content.time_sampling) == ("flow", 3.0, "uniform")
    assert (motion.process, motion.predict, motion.weighting) == ("ddpm", "v", "min_snr")
    sampled = {}
    for first, second in (("auto", "auto"), ("euler", "ddim"), ("heun", "dpm++"), ("euler", "ddpm")):
        settings = {"content": Sampling(steps=4, guidance=2.0, sampler=first), "motion": Sampling(steps=4, guidance=2.0, sampler=second)}
        sampled[first, second] = pipeline.generate([0, 1], [0, 1], **settings)
        assert torch.equal(sampled[first, second][1:], pipeline.generate([1], [1], **settings))
    assert torch.equal(sampled["auto", "auto"], sampled["euler", "ddim"])
    assert len({float(clips.double().sum()) for clips in sampled.values()}) == 3
    with pytest.raises(ConfigError, match=r"sampler ddim: the model's process is flow, which has euler, heun"):
        pipeline.generate([0], [0], content=Sampling(sampler="ddim"))


def test_cards_without_the_newer_settings_are_read(runs: Path, tmp_path: Path) -> None:
    """An export of before there was a choice of process."""
    motion = export(motion_task(runs / "000-cmd-autoencoder"), tmp_path / "motion")
    card = load_card(motion / "export")
    known = ("steps", "schedule", "predict", "variance", "loss", "respacing")
    card["diffusion"] = {name: card["diffusion"][name] for name in known}
    save_yaml(motion / "export" / "config.yaml", card)
    (motion / "export" / "config.json").unlink()
    pipeline = CMDPipeline.from_exports(runs / "000-cmd-autoencoder", motion=motion)
    assert pipeline.motion is not None and diffusion_of(pipeline.motion) == motion_task(runs / "000-cmd-autoencoder").config.diffusion


def test_sampling_settings_by_process(runs: Path, ae: Path, tmp_path: Path) -> None:
    """The record of samples names the sampler, and is what it was before the choice for those that had none."""
    config = CMDSampleConfig(run=str(runs), steps=3)
    job = CMDSampleJob(config, torch.device("cpu"))
    settings = job.settings()
    assert (settings["content"]["sampler"], settings["motion"]["sampler"]) == ("euler", "ddim")
    assert sorted(settings["motion"]) == ["cfg_channels", "clip", "eta", "guidance", "sampler", "steps"]
    with pytest.raises(ConfigError, match="sampler heun: the model's process is ddpm"):
        CMDSampleJob(dataclasses.replace(config, sampler="heun"), torch.device("cpu"))
    content = export(content_task(ae), tmp_path / "content", 1)
    only_steps = dataclasses.replace(config, content=str(content), sampler="dpm++", respacing="ddim10")
    assert CMDSampleJob(only_steps, torch.device("cpu")).settings()["content"]["respacing"] == "ddim10"
    with pytest.raises(ConfigError, match="--steps 3 and --respacing ddim10: give one of them"):
        only_steps.validate()
    with pytest.raises(ConfigError, match="ddim999"):
        CMDSampleJob(dataclasses.replace(only_steps, respacing="ddim999"), torch.device("cpu"))


@pytest.mark.parametrize("stage", STAGES.values())
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--process", "flow", "--diffusion.predict", "v"], "diffusion.predict v: means nothing"),
        (["--loss-weighting", "min_snr", "--diffusion.loss", "kl"], "does not have"),
        (["--preview.steps", "1001"], "preview.steps 1001"),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(ae: Path, stage, argv: list[str], message: str) -> None:
    config = stage(ae).config
    assert isinstance(stage(ae, "--process", "flow").process, FlowMatching) and to_dict(config.diffusion)["process"] == "ddpm"
    with pytest.raises(ConfigError, match=message):
        stage(ae, *argv).config.validate()
