"""sample.py with VIDM: videos of any length frame after frame, the same for any batch size and number of processes, and after a stop."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.stored_video import iterate_frames
from diffusion import DiffusionConfig
from launch import report
from launch.env import Env, StopFlag, Stopped
from models.official import vidm as official
from models.unets.vidm_motion import MotionUNetConfig
from pipelines.pictures import read_picture
from pipelines.sampling import Sampling
from pipelines.systems import load_sampling
from pipelines.vidm import VIDMPipeline, released_pixels
from pipelines.vidm_sample import VIDMSampleConfig, VIDMSampleJob
from tests.cmd_family import family as cmd_family
from tests.distributed import command, interrupt
from tests.sampling import CPU, config, contents, make
from tests.vidm_exports import CONTENT, DATA, MOTION, content_network, export_network, family, motion_network
from utils.errors import ConfigError, UserError
from utils.media import to_uint8

STEPS = ["--steps", "2", "--seed", "3"]
LINE = ["--num-samples", "3", "--num-frames", "4", *STEPS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    family(root)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number, size in enumerate(((30, 40), (8, 12))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"{number}.png")
    return root


def job(*argv: object) -> VIDMSampleJob:
    found = config(*argv)
    assert isinstance(found, VIDMSampleConfig)
    return VIDMSampleJob(found, CPU)


def shown(path: Path) -> Tensor:
    """Frames t h w 3 of an mp4."""
    return torch.from_numpy(np.stack(list(iterate_frames(path))))


@pytest.fixture(scope="module")
def whole(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "out", results, *LINE)


def test_videos_of_both_stages_are_written(results: Path, whole: Path, tmp_path: Path) -> None:
    names = {f"{number:06d}.mp4" for number in range(3)}
    assert set(contents(whole)) == names | {"settings.json", "grid.mp4", "grid.png", "film.png", "index.html"}
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["num_frames"] == 4 and settings["fps"] == 10 and settings["system"] == "vidm"
    assert settings["sampling"]["motion"] == settings["sampling"]["content"]
    assert settings["sampling"]["motion"]["sampler"] == "ddpm" and settings["sampling"]["motion"]["respacing"] == "ddim2"
    videos = job(results, *LINE).generate([0, 1, 2])[""]
    assert videos.shape == (3, 3, 4, 8, 12) and videos.std() > 0.1
    grey = torch.stack([shown(whole / "000002.mp4").float().mean(3).flatten(), to_uint8(videos[2]).float().mean(0).flatten()])
    assert grey.corrcoef()[0, 1] > 0.8
    assert job(results, *STEPS).n_frames == 6  # as many as in training


def test_the_command_tells_the_seconds_of_a_video(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for frames in (2, 3):
        make(tmp_path / str(frames), results, *STEPS, "--num-samples", "2", "--num-frames", frames)
        assert re.search(rf"[\d.]+ s a video of {frames} frames \(2 finished in [\d.]+ s\)", capsys.readouterr().out)
    make(tmp_path / "3", results, *STEPS, "--num-samples", "2", "--num-frames", "3")
    assert "s a video" not in capsys.readouterr().out  # nothing was made


@pytest.mark.parametrize("batch", [1, 2])
def test_any_batch_size_gives_the_same_files(results: Path, whole: Path, tmp_path: Path, batch: int) -> None:
    assert contents(make(tmp_path / "out", results, *LINE, "--batch-size", batch)) == contents(whole)


def test_together_they_are_the_same_to_rounding(results: Path) -> None:
    alone, together = (job(results, *LINE, flag).generate([0, 1, 2])[""] for flag in ("--exact", "--no-exact"))
    assert 0 < (alone - together).abs().max() < 5e-4 or torch.equal(alone, together)


@pytest.mark.slow
def test_two_processes_make_each_video_once(results: Path, whole: Path, tmp_path: Path) -> None:
    """Every process of the released script made the same videos, and a last batch that was not full ended it."""
    done = command(["sample.py", results, *LINE, "--batch-size", "2", "--out", tmp_path / "out"], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(whole)


def test_a_video_that_was_stopped_goes_on_at_its_frame(results: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, made = StopFlag(), []
    advance = VIDMPipeline.advance

    def counted(self: VIDMPipeline, indices: list[int], position: int, *given: object) -> Tensor:
        made.append((len(indices), position))
        if position == 2:
            stop.set()
        return advance(self, indices, position, *given)

    monkeypatch.setattr(VIDMPipeline, "advance", counted)
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        make(out, results, *LINE, env=Env(0, 1, 0, 1, CPU, "gloo", stop))
    assert made == [(3, 0), (3, 1), (3, 2)] and len(list((out / "latents").rglob("*.safetensors"))) == 9
    made.clear()
    assert contents(make(out, results, *LINE)) == contents(whole) and made == [(3, 3)]


@pytest.mark.slow
def test_a_killed_video_goes_on(results: Path, tmp_path: Path) -> None:
    line = [results, *STEPS, "--num-samples", "1", "--num-frames", "80", "--reanchor"]
    out = tmp_path / "out"
    kept = out / "latents" / "000000"
    interrupt(["sample.py", *line, "--out", out], lambda: (kept / "00003.safetensors").is_file())
    assert 4 <= len(list(kept.glob("*.safetensors"))) < 80
    make(out, *line)
    found = {name: value for name, value in contents(out).items() if not name.endswith(".tmp")}
    assert found == contents(make(tmp_path / "one", *line))


def test_longer_videos_go_on_from_kept_frames_or_from_the_start(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [results, *STEPS, "--num-samples", 1]
    whole = contents(make(tmp_path / "whole", *line, "--num-frames", 6, "--keep-latents"))
    assert sum(name.startswith("latents/") for name in whole) == 6
    made = []
    advance = VIDMPipeline.advance
    monkeypatch.setattr(VIDMPipeline, "advance", lambda self, *given: (made.append(given[1]), advance(self, *given))[1])
    first = make(tmp_path / "first", *line, "--num-frames", 4, "--keep-latents")
    assert contents(make(tmp_path / "on", *line, "--num-frames", 6, "--keep-latents", "--continue-from", first)) == whole
    assert contents(make(first, *line, "--num-frames", 6)) == {name: data for name, data in whole.items() if "latents" not in name}
    assert made == [0, 1, 2, 3, 4, 5, 4, 5]
    again = make(tmp_path / "again", *line, "--num-frames", 4)
    assert contents(make(again, *line, "--num-frames", 6)) == contents(first) and made[8:] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="are fewer"):
        make(again, *line, "--num-frames", 5)


def test_beyond_the_frame_indices_it_goes_on_from_the_last_frame(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--num-frames 9: .* has 6 frame indices .*--reanchor"):
        job(results, *STEPS, "--num-frames", 9)
    made = job(results, *STEPS, "--num-frames", 9, "--reanchor", "--num-samples", 1)
    video = made.generate([0])[""]
    assert torch.equal(video[:, :, :6], job(results, *STEPS).generate([0])[""])
    drawing = dataclasses.replace(made.drawing)
    again = made.pipeline.next_frames([0], video[:, :, 5], video[:, :, 5], 6, drawing)
    assert torch.equal(video[:, :, 6], again)
    out = make(tmp_path / "out", results, *STEPS, "--num-samples", 1)
    make(out, results, *STEPS, "--num-samples", 1, "--num-frames", 9, "--reanchor")  # the first 6 are the same: no other settings
    assert len(shown(out / "000000.mp4")) == 9


def test_indices_that_were_not_trained_are_told(results: Path, tmp_path: Path) -> None:
    """V may be larger than the clips of training."""
    export_network(tmp_path / "000-vidm-motion", motion_network(), "motion", data=DATA | {"n_frames": 4})
    line = [tmp_path, "--content", results / "000-vidm-content", *STEPS]
    assert job(*line).n_frames == 4 and not job(*line).notes and not job(*line, "--num-frames", 6, "--reanchor").notes
    assert "frames from number 4 on" in job(*line, "--num-frames", 6).notes[0]
    plain, anchored = (job(*line, "--num-frames", 6, *more).settings() for more in ((), ("--reanchor",)))
    assert plain["segment"] is None and anchored["segment"] == 4
    plain, anchored = (job(*line, "--num-frames", 6, *more).generate([0])[""] for more in ((), ("--reanchor",)))
    assert torch.equal(plain[:, :, :4], anchored[:, :, :4]) and not torch.equal(plain[:, :, 4], anchored[:, :, 4])


def test_videos_begin_at_pictures(results: Path, pictures: Path, tmp_path: Path) -> None:
    export_network(tmp_path / "000-vidm-motion", motion_network(), "motion")  # no content generator is needed
    made = job(tmp_path, *LINE, "--image", pictures)
    videos = made.generate([0, 1, 2])[""]
    for number in range(3):
        assert torch.equal(videos[number, :, 0], read_picture(pictures / f"{number % 2}.png", (8, 12)))
    same = job(tmp_path, *LINE, "--content-dir", pictures / "1.png", pictures / "0.png")
    assert torch.equal(same.generate([0])[""][0, :, 0], videos[1, :, 0])
    assert same.settings()["images_sha256"] == made.settings()["images_sha256"][::-1] and "content" not in made.settings()["sha256"]
    out = make(tmp_path / "out", tmp_path, *LINE, "--image", pictures)
    with pytest.raises(UserError, match="images_sha256 differ"):
        make(out, tmp_path, *LINE, "--image", pictures / "1.png")
    with pytest.raises(UserError, match="no finished content run"):
        job(tmp_path, *LINE)
    (pictures / "bad.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"--image .*bad.txt cannot be read"):
        job(results, *LINE, "--image", pictures / "bad.txt")


def test_pictures_are_made_smaller_as_the_frames_of_training_were(pictures: Path, tmp_path: Path) -> None:
    """The release filters nothing, and so do shards with --preset vidm: a smoother first frame was never trained."""
    for name, told in (("filtered", {}), ("bare", {"antialias": False})):
        export_network(tmp_path / name / "000-vidm-motion", motion_network(), "motion", data=DATA | told)
        found = job(tmp_path / name, *LINE, "--image", pictures / "0.png").picture(0)
        assert torch.equal(found, read_picture(pictures / "0.png", (8, 12), antialias=name == "filtered"))


def test_the_frame_order_of_the_release_on_wish(results: Path, pictures: Path) -> None:
    line = [results, *LINE, "--image", pictures]
    right, released = job(*line), job(*line, "--release-frame-order")
    frames = released.generate([0])[""]
    assert not torch.equal(frames[:, :, 0], right.generate([0])[""][:, :, 0])
    state = released.sample_clip([0], 0, None)
    assert torch.equal(state[:, :, 0], right.picture(0)[None]) and released.order.index(0) == 0
    assert torch.equal(to_uint8(frames[:, :, 0]), released_pixels(state[:, :, 1]))
    assert job(results, *STEPS, "--release-frame-order", "--num-frames", 6).n_frames == 6
    with pytest.raises(UserError, match="has 6 frame indices"):
        job(results, *STEPS, "--release-frame-order", "--num-frames", 7)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_fewer_steps(results: Path, pictures: Path, sampler: str) -> None:
    made = job(results, *LINE, "--sampler", sampler, "--content-steps", 5, "--motion-steps", 3)
    counts = {"content": 0, "motion": 0}
    for stage, module in (("content", made.pipeline.content.module), ("motion", made.pipeline.network.unet)):
        module.register_forward_hook(lambda *_, stage=stage: counts.update({stage: counts[stage] + 1}))
    video = made.generate([0])[""]
    assert counts == {"content": 5, "motion": 3 * 3} and video.isfinite().all() and video.abs().max() <= 1
    spacing = {"ddpm": "ddim5", "ddim": "trailing5", "dpm++": ""}[sampler]
    assert made.samplings["content"] == Sampling(steps=5, sampler=sampler, clip=True, respacing=spacing)
    assert made.samplings["motion"].respacing == {"ddpm": "", "ddim": "trailing3", "dpm++": ""}[sampler]


def test_steps_are_the_releases_where_none_are_given(results: Path, tmp_path: Path) -> None:
    assert {sampling.steps for sampling in job(results).samplings.values()} == {40}  # trained with no more
    config = dataclasses.replace(MOTION, diffusion_timesteps=1000)
    family(tmp_path, DiffusionConfig(), config)
    released = Sampling(steps=100, sampler="ddpm", clip=True, respacing="ddim100")
    assert job(tmp_path).samplings == {"motion": released, "content": released}


# Official checkpoints.


def official_files(root: Path, config: MotionUNetConfig, caches: bool = True) -> tuple[Path, Path]:
    """As the release saves them: averages and last weights, in the motion generator's the tables of coordinates too."""
    motion, content = motion_network(config), content_network(dataclasses.replace(CONTENT, model_channels=64, num_head_channels=64))
    state = official.export_motion(motion.state_dict(), config)
    if caches:
        for name in [name for name in state if name.endswith("emb_layers.linear_0.weight")]:
            place = name.removesuffix("linear_0.weight")
            state |= {f"{place}new_coords": torch.zeros(1000, 6, 1, 1, 2), f"{place}coords": torch.zeros(1, *config.image_size, 2)}
    paths = root / "motion.pth", root / "content.pth"
    last = {name: value * 2 for name, value in state.items()}
    torch.save({"iters": 1, "state_dict": last, "ema_state_dict": state, "optimizer": {}}, paths[0])
    torch.save({"ema_state_dict": official.export_content(content.state_dict())}, paths[1])
    return paths


def test_official_checkpoints_make_videos(tmp_path: Path) -> None:
    """Their tables alone say which frame indices they were trained with; the release moved them at twice their speed."""
    config = dataclasses.replace(MOTION, diffusion_timesteps=1000, model_channels=64, num_head_channels=64, flow_input="minus_one_one")
    motion, content = official_files(tmp_path, config)
    made = job("--motion", motion, "--content", content, *LINE)
    assert made.pipeline.motion.config == config and made.pipeline.n_frames == 6 and made.fps == 10
    assert made.generate([0])[""].shape == (1, 3, 4, 8, 12)
    scale = [job("--motion", motion, "--content", content, *LINE, "--weights", which).pipeline.network for which in ("ema", "model")]
    assert torch.equal(scale[0].unet.out.conv.weight * 2, scale[1].unet.out.conv.weight)
    with pytest.raises(UserError, match="video_timesteps 3: the checkpoint was trained with 6"):
        job("--motion", motion, "--content", content, *LINE, "--video-timesteps", 3)
    bare = official_files(tmp_path, config, caches=False)[0]
    with pytest.raises(UserError, match="no table that tells its frame indices: give"):
        job("--motion", bare, "--content", content, *LINE)
    assert job("--motion", bare, "--content", content, *LINE, "--video-timesteps", 64).pipeline.n_frames == 64


# The command line.


def test_the_system_is_told_by_the_networks(results: Path, tmp_path: Path) -> None:
    motion = results / "001-vidm-motion"
    assert isinstance(load_sampling(["--motion", str(motion), "--image", "x.png"], "sample.py", ""), VIDMSampleConfig)
    assert isinstance(load_sampling(["--content", str(results / "000-vidm-content")], "sample.py", ""), VIDMSampleConfig)
    assert isinstance(load_sampling(["--run", str(results)], "sample.py", ""), VIDMSampleConfig)
    paths = cmd_family(tmp_path)
    found = load_sampling(["--motion", str(paths["motion"]), "--content", str(paths["content"])], "sample.py", "")
    assert found.system == "cmd"
    # One that is not there tells nothing, the other does.
    found = load_sampling(["--motion", "nowhere", "--content", str(results / "000-vidm-content"), "--num-frames", "3"], "sample.py", "")
    assert isinstance(found, VIDMSampleConfig)


def test_results_that_are_not_there_are_told_whatever_the_flags(tmp_path: Path) -> None:
    """With --num-frames, which several systems know, it spoke of the clips of one of them."""
    for place, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no finished run in it")):
        with pytest.raises(UserError, match=f"^--run {place}: {said}"):
            config(place, "--num-frames", "3")


def test_a_file_is_no_folder_to_write_to(results: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "samples"):
        with pytest.raises(UserError, match=f"^--out {out}: {tmp_path / 'file'} is a file, a folder is wanted$"):
            make(out, results, *LINE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--mode", "short", "--num-frames", "7"], "--num-frames 7: videos of training have 6"),
        (["--sampler", "euler"], "sampler euler: the model's process is ddpm"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--steps", "41"], "41 sampling steps: the model was trained with 40"),
        (["--eta", "2"], "--eta 2.0: between 0 and 1"),
        (["--eta", "0.5"], "eta 0.5: only ddim"),
        (["--classes", "1"], "VIDM knows no classes"),
        (["--reanchor", "--release-frame-order"], "give one"),
        (["--content", "x", "--image", "y"], "give one of them"),
        (["--image", "y", "--content-steps", "3"], "no first frame is generated with --image"),
        (["--image", "/nowhere.png"], "--image /nowhere.png cannot be read"),
        (["--video-timesteps", "3"], "was trained with 6 frame indices"),
    ],
)
def test_settings_that_cannot_work_are_told_in_one_line(results: Path, given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        job(results, *given)


def test_networks_must_be_named(results: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --run FOLDER .* or --motion, and --content or --image"):
        job("--motion", results / "001-vidm-motion")


def test_the_report_shows_the_videos_and_both_stages(whole: Path, tmp_path: Path) -> None:
    for stage in ("content", "motion"):
        run = tmp_path / f"000-vidm-{stage}"
        (run / "samples").mkdir(parents=True)
        for preview in {"content": ("samples",), "motion": ("next", "video")}[stage]:
            Image.new("RGB", (8, 8)).save(run / "samples" / f"step_0000002_{preview}.png")
        (run / "config.yaml").write_text(f"system: vidm\nstage: {stage}\n")
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    page = report.build(tmp_path, [whole], None)
    assert "<h2>Generated videos: 4 frames, one after the other</h2>" in page
    shown = re.findall(r'<img [^>]*alt="([^"]+)"', page)
    assert len(shown) == 4 and not {"samples", "next", "video"} & set(shown), "each picture says what it shows"
    assert "<h2>Content generator</h2>" in page and "<h2>Motion generator</h2>" in page and page.count("<video") == 3
