"""CMD's pipeline: the same sample in any company, to the bit; what is guided; which networks belong together."""

import dataclasses
from pathlib import Path

import pytest
import torch

from diffusion import DiffusionConfig
from models.official import cmd as official
from pipelines.cmd import CMDPipeline
from pipelines.loading import load_autoencoder, load_content
from pipelines.runs import find_family
from pipelines.sampling import Sampling, respaced, sample
from tasks.content import CMDContentConfig, CMDContentTask
from tasks.diffusion_task import open_first_stage
from tests.cmd_family import CLIPS, autoencoder_task, config, content_task, export, family, motion_task
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng

CONTENT = Sampling(steps=3, guidance=3.0, clip=True)
MOTION = Sampling(steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pipeline(runs: dict[str, Path]) -> CMDPipeline:
    return CMDPipeline.from_exports(runs["ae"], runs["content"], runs["motion"])


def clips(pipeline: CMDPipeline, indices: list[int], **changes: object) -> torch.Tensor:
    labels = [i % 3 for i in indices]
    return pipeline.generate(indices, labels, **({"seed": 5, "content": CONTENT, "motion": MOTION} | changes))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_sample_is_the_same_bits_in_any_batch(pipeline: CMDPipeline, sampler: str, size: int) -> None:
    eta = 0.5 if sampler == "ddim" else 0.0
    changes = {name: dataclasses.replace(value, sampler=sampler, eta=eta) for name, value in (("content", CONTENT), ("motion", MOTION))}
    whole = clips(pipeline, list(range(6)), **changes)
    parts = [clips(pipeline, list(range(6))[i : i + size], **changes) for i in range(0, 6, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(clips(pipeline, [4, 1], **changes), whole[[4, 1]])


def test_together_is_the_same_to_rounding(pipeline: CMDPipeline) -> None:
    assert torch.allclose(clips(pipeline, [0, 1, 2], exact=False), clips(pipeline, [0, 1, 2]), atol=1e-3)


def test_seed_number_class_and_guidance_make_the_sample(pipeline: CMDPipeline) -> None:
    base = clips(pipeline, [0])
    assert base.shape == (1, 3, 4, 16, 24) and base.abs().max() <= 1
    assert not torch.equal(base, clips(pipeline, [3]))
    assert not torch.equal(base, clips(pipeline, [0], seed=6))
    assert not torch.equal(base, pipeline.generate([0], [1], seed=5, content=CONTENT, motion=MOTION))
    assert not torch.equal(base, clips(pipeline, [0], content=dataclasses.replace(CONTENT, guidance=1.0)))
    assert not torch.equal(base, clips(pipeline, [0], motion=dataclasses.replace(MOTION, guidance=1.0)))
    with pytest.raises(UserError, match="no class 3"):
        pipeline.generate([0], [3])


def test_reconstruction_is_decode_of_encode(pipeline: CMDPipeline) -> None:
    video = torch.rand(2, 3, 4, 16, 24) * 2 - 1
    content, motion = pipeline.encode(video)
    assert content.shape == (2, 3, 16, 24) and motion.shape == (2, 4, 4, 10)
    assert torch.equal(pipeline.reconstruct(video), pipeline.decode(content, motion))


def test_guidance_keeps_the_keyframe_and_drops_the_condition() -> None:
    """(1 - s) times the unconditional plus s times the conditional answer; the keyframe stands in both halves."""
    seen: dict[str, torch.Tensor] = {}

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor, keyframe: torch.Tensor) -> torch.Tensor:
        seen.update(drop=drop, keyframe=keyframe, t=t)
        eps = torch.where(drop, 0.0, y.float())[:, None, None, None].expand_as(x)
        return torch.cat([eps, torch.zeros_like(x)], dim=1)

    rng = SampleRng(0, torch.tensor([3, 9]))
    keyframe = torch.randn(2, 1)
    out = sample(
        model,
        DiffusionConfig(),
        (2, 4, 4),
        rng,
        "x",
        Sampling(steps=1, guidance=3.0),
        condition={"y": torch.tensor([1, 2])},
        always={"keyframe": keyframe},
    )
    assert seen["drop"].tolist() == [False, False, True, True]
    assert torch.equal(seen["keyframe"], torch.cat([keyframe, keyframe]))
    process = respaced(DiffusionConfig(), 1)
    start, zero = rng.normal("x/start", (2, 4, 4)), torch.zeros(2, dtype=torch.int64)
    expected = process.x0_from_eps(start, zero, 3 * torch.tensor([1.0, 2.0])[:, None, None, None].expand_as(start))
    assert torch.allclose(out, expected, rtol=1e-5)


def test_more_steps_than_the_process_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 1000"):
        respaced(DiffusionConfig(), 1001)


def test_models_of_another_autoencoder_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = export(autoencoder_task(), tmp_path / "ae", seed=9)
    with pytest.raises(UserError, match=r"content model .* another autoencoder"):
        CMDPipeline.from_exports(other, runs["content"], runs["motion"])


def test_models_of_another_size_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    wide = dataclasses.replace(CLIPS, image_size=(16, 32))
    ae = export(autoencoder_task(clips=wide), tmp_path / "ae")
    loaded, content = (
        load_autoencoder(ae),
        load_content(export(content_task(ae, clips=wide), tmp_path / "content"), load_autoencoder(ae).config),
    )
    assert CMDPipeline(loaded, content).num_classes == 3
    stranger = dataclasses.replace(load_content(runs["content"], loaded.config), card={})
    with pytest.raises(UserError, match=r"\(3, 16, 24\).*\(3, 16, 32\)"):
        CMDPipeline(loaded, stranger)


def test_a_model_without_a_null_condition_cannot_be_guided(runs: dict[str, Path], tmp_path: Path) -> None:
    content = export(content_task(runs["ae"], "--condition.dropout", "0"), tmp_path / "content")
    pipeline = CMDPipeline.from_exports(runs["ae"], content, runs["motion"])
    with pytest.raises(UserError, match="guidance scale of 1"):
        clips(pipeline, [0])
    assert clips(pipeline, [0], content=dataclasses.replace(CONTENT, guidance=1.0)).shape == (1, 3, 4, 16, 24)


def test_unconditional_models_need_no_label(runs: dict[str, Path], tmp_path: Path) -> None:
    content = export(content_task(runs["ae"], "--num-classes", "0"), tmp_path / "content")
    motion = export(motion_task(runs["ae"], "--num-classes", "0"), tmp_path / "motion")
    pipeline = CMDPipeline.from_exports(runs["ae"], content, motion)
    assert pipeline.num_classes == 0
    assert torch.equal(pipeline.generate([0], content=CONTENT, motion=MOTION), pipeline.generate([0], [2], content=CONTENT, motion=MOTION))


def test_a_class_must_be_known_to_both_models(runs: dict[str, Path], tmp_path: Path) -> None:
    motion = export(motion_task(runs["ae"], "--num-classes", "5"), tmp_path / "motion")
    pipeline = CMDPipeline.from_exports(runs["ae"], runs["content"], motion)
    assert pipeline.num_classes == 3
    with pytest.raises(UserError, match="no class 4"):
        pipeline.generate([0], [4], content=CONTENT, motion=MOTION)


def test_models_trained_on_an_official_autoencoder(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its checkpoint does not say the clip size; what was told must hold however often it is read."""
    module = load_autoencoder(export(autoencoder_task("--model.rotary", "none", "--model.heads", "8"), tmp_path / "ae")).module
    path = tmp_path / "autoenc.pt"
    torch.save({"autoenc": official.export_autoencoder(module.state_dict())}, path)
    setting = config(CMDContentConfig, "--ae", str(path))
    first = open_first_stage(setting.ae, setting.vae, CLIPS)
    content = export(CMDContentTask(setting, CLIPS, first), tmp_path / "content")
    pipeline = CMDPipeline.from_exports(path, content, n_frames=4, image_size=(16, 24))
    assert pipeline.ae.sha256 == first.ae.sha256 and pipeline.ae.config.image_size == (16, 24)


def test_official_checkpoints_are_read_like_exports(tmp_path: Path) -> None:
    """A family without positions and of a published width, written as the release writes it."""
    square = dataclasses.replace(CLIPS, image_size=(16, 16))
    ae = export(autoencoder_task("--model.rotary", "none", "--model.heads", "8", clips=square), tmp_path / "ae")
    small = ["--model.hidden_size", "384", "--model.num_heads", "6", "--num-classes", "3"]
    content = export(content_task(ae, *small, clips=square), tmp_path / "content")
    motion = export(motion_task(ae, *small, clips=square), tmp_path / "motion")
    ours = CMDPipeline.from_exports(ae, content, motion)
    states = {
        "autoenc": (ours.ae, official.export_autoencoder),
        "cdiff_model": (ours.content, official.export_content),
        "mdiff_model": (ours.motion, official.export_motion),
    }
    for entry, (part, convert) in states.items():
        assert part is not None
        torch.save({entry: convert(part.module.state_dict())}, tmp_path / f"{entry}.pt")
    theirs = CMDPipeline.from_exports(
        tmp_path / "autoenc.pt", tmp_path / "cdiff_model.pt", tmp_path / "mdiff_model.pt", n_frames=4, image_size=(16, 16)
    )
    assert torch.equal(clips(ours, [0, 1]), clips(theirs, [0, 1]))
    with pytest.raises(UserError, match="motion stage"):
        CMDPipeline.from_exports(tmp_path / "autoenc.pt", motion=tmp_path / "cdiff_model.pt", n_frames=4, image_size=(16, 16))


def test_the_newest_models_that_belong_together_are_found(tmp_path: Path) -> None:
    first = family(tmp_path / "r")
    found = find_family(tmp_path / "r")
    assert found == {"autoencoder": first["ae"], "content": first["content"], "motion": first["motion"]}
    export(autoencoder_task(), tmp_path / "r" / "003-cmd-autoencoder", seed=9)  # newer, but nothing was trained on it
    newer = export(motion_task(first["ae"]), tmp_path / "r" / "010-cmd-motion", seed=9)
    assert find_family(tmp_path / "r") == {"autoencoder": first["ae"], "content": first["content"], "motion": newer}


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_family(tmp_path / "nowhere")
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="no finished run in it"):
        find_family(tmp_path / "r")
    export(autoencoder_task(), tmp_path / "r" / "000-cmd-autoencoder")
    with pytest.raises(UserError, match="no finished content and no finished motion run"):
        find_family(tmp_path / "r")
