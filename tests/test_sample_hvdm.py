"""sample.py with HVDM: long videos from re-encoded clips, videos that begin at pictures, a chosen amount of motion and its measure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import evaluate
from datasets.stored_video import count_frames
from diffusion import DiffusionConfig
from evaluation.motion import measure_motion
from launch import report
from launch.env import Env, StopFlag, Stopped
from launch.run import parse_launch
from models.layers.motion import motion_energy
from pipelines.hvdm_sample import HVDMSampleConfig, HVDMSampleJob
from pipelines.long import first_frame
from pipelines.pictures import find_pictures, read_picture
from pipelines.systems import load_sampling
from tests.distributed import interrupt
from tests.hvdm_exports import DATA, DIT, TOLD, UNET, export_denoiser, family, official, told_family
from tests.sampling import CPU, config, contents, make
from utils.errors import ConfigError, UserError
from utils.media import write_gif, write_mp4

STEPS = ["--steps", "2", "--seed", "3"]
LONG = ["--mode", "long", "--num-samples", "2", *STEPS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    told_family(root)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a denoiser without tables."""
    root = tmp_path_factory.mktemp("plain")
    family(root, UNET, cond_prob=0.3)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of different sizes and formats."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number, (size, suffix) in enumerate((((40, 30), "png"), ((16, 16), "jpg"), ((20, 50), "PNG"))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"{number}.{suffix}")
    (root / "notes.txt").write_text("not a picture")
    return root


def job(*argv: object) -> HVDMSampleJob:
    found = config(*argv)
    assert isinstance(found, HVDMSampleConfig)
    return HVDMSampleJob(found, CPU)


def latents(folder: Path, name: str = "000000") -> list[Tensor]:
    return [load_file(path)["latent"][None] for path in sorted((folder / "latents" / name).iterdir())]


# Long videos.


@pytest.fixture(scope="module")
def whole(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 4 frames, of which the last is cut."""
    return make(tmp_path_factory.mktemp("whole") / "out", "--run", results, *LONG, "--num-frames", 10)


def test_each_clip_is_made_from_the_decoded_one_before(whole: Path, results: Path) -> None:
    """The condition is the latent of the decoded, clamped frames as floats; on wish the latent that was sampled."""
    kept = latents(whole)
    assert len(kept) == 3 and count_frames(whole / "000000.mp4") == 10
    made = job("--run", results, *LONG, "--num-frames", 10)
    pipeline = made.pipeline
    seen = pipeline.encode(pipeline.decode(kept[0]))
    assert not torch.allclose(seen, kept[0], atol=1e-3)
    expected = pipeline.generate_latents([0], seed=3, sampling=made.following, clip=1, previous=seen)
    assert torch.equal(expected, kept[1]) and torch.equal(made.sample_clip([0], 1, kept[0]), kept[1])
    assert torch.equal(made.sample_clip([0], 2, kept[1]), kept[2]) and torch.equal(made.sample_clip([0], 0, None), kept[0])
    assert not torch.equal(made.sample_clip([0], 2, -kept[1]), kept[2])
    latent = job("--run", results, *LONG, "--num-frames", 10, "--condition", "latent").sample_clip([0], 1, kept[0])
    assert torch.equal(latent, pipeline.generate_latents([0], seed=3, sampling=made.following, clip=1, previous=kept[0]))
    assert not torch.equal(latent, kept[1])


def test_a_short_clip_is_the_first_of_the_long_video(whole: Path, results: Path) -> None:
    short = job("--run", results, *STEPS)
    assert torch.equal(short.generate([0])[""], short.decode_clip(latents(whole)[0], 0))
    cut = job("--run", results, *STEPS, "--num-frames", 3)
    assert torch.equal(cut.generate([0])[""], short.generate([0])[""][:, :, :3])


def test_in_pieces_and_after_a_stop_it_is_the_same(whole: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--run", results, *LONG]
    first = make(tmp_path / "first", *line, "--num-frames", 6, "--num-samples", 1)
    assert contents(make(tmp_path / "on", *line, "--num-frames", 10, "--continue-from", first)) == contents(whole)
    assert contents(make(first, *line, "--num-frames", 10)) == contents(whole)
    stop, made = StopFlag(), []
    sample_clip = HVDMSampleJob.sample_clip

    def counted(self: HVDMSampleJob, indices: list[int], clip: int, previous: Tensor | None) -> Tensor:
        made.append(clip)
        if len(made) == 2:
            stop.set()
        return sample_clip(self, indices, clip, previous)

    monkeypatch.setattr(HVDMSampleJob, "sample_clip", counted)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        make(out, *line, "--num-frames", 10, env=Env(0, 1, 0, 1, CPU, "gloo", stop))
    made.clear()
    assert contents(make(out, *line, "--num-frames", 10)) == contents(whole) and made == [2, 0, 1, 2]


@pytest.mark.slow
def test_a_killed_video_goes_on(results: Path, pictures: Path, tmp_path: Path) -> None:
    line = ["--run", results, "--mode", "i2v", "--image", pictures / "0.png", "--num-samples", 1, *STEPS, "--num-frames", 80]
    out = tmp_path / "out"
    kept = out / "latents" / "000000"
    interrupt(["sample.py", *line, "--out", out], lambda: (kept / "00003.safetensors").is_file())
    assert 4 <= len(list(kept.glob("*.safetensors"))) < 20
    make(out, *line)
    found = {name: value for name, value in contents(out).items() if not name.endswith(".tmp")}
    assert found == contents(make(tmp_path / "one", *line))


# From pictures.


@pytest.fixture(scope="module")
def begun(results: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    line = ["--run", results, "--mode", "i2v", "--image", pictures, "--num-samples", 4, *STEPS]
    return make(tmp_path_factory.mktemp("begun") / "out", *line)


def test_videos_begin_at_pictures(begun: Path, results: Path, pictures: Path) -> None:
    """Sample i is told of picture i modulo 3, as a still clip."""
    assert [count_frames(begun / f"00000{i}.mp4") for i in range(4)] == [4] * 4
    made = job("--run", results, "--mode", "i2v", "--image", pictures, *STEPS)
    assert [path.name for path in made.pictures] == ["0.png", "1.jpg", "2.PNG"]
    for index in (1, 3):
        still = made.pipeline.encode_still(read_picture(pictures / ("1.jpg" if index == 1 else "0.png"), (16, 16))[None])
        expected = made.pipeline.generate_latents([index], seed=3, sampling=made.first, previous=still, image=True)
        assert torch.equal(expected, latents(begun, f"00000{index}")[0])
    assert not torch.equal(latents(begun, "000000")[0], latents(begun, "000003")[0]), "another sample of the same picture"


def test_the_first_frame_is_held_unless_it_is_left_free(begun: Path, results: Path, pictures: Path, tmp_path: Path) -> None:
    line = ["--run", results, "--mode", "i2v", "--image", pictures / "0.png", "--num-samples", 1, *STEPS]
    pipeline = job(*line).pipeline
    still = pipeline.encode_still(read_picture(pictures / "0.png", (16, 16))[None])
    assert torch.equal(latents(begun)[0][:, :, :1], still[:, :, :1])
    free = latents(make(tmp_path / "free", *line, "--no-anchor"))[0]
    assert torch.equal(free, pipeline.generate_latents([0], seed=3, sampling=job(*line).first, previous=still, image=True, anchor=False))
    assert not torch.equal(free[:, :, :1], still[:, :, :1])
    with pytest.raises(UserError, match="anchor differ"):
        make(begun, *line, "--no-anchor", "--num-samples", 4, "--image", pictures)


def test_how_close_videos_begin_is_measured(begun: Path, results: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((begun / "settings.json").read_text())
    assert (record["mode"], record["num_frames"], len(record["images_sha256"])) == ("image", 4, 3)
    line = ["--run", results, "--mode", "i2v", "--image", pictures, "--num-samples", 4, *STEPS]
    made = job(*line)
    for index in (0, 2):
        picture, first = made.picture(index), first_frame(made, index, begun, CPU)
        own = made.pipeline.reconstruct(picture[None, :, None].expand(-1, -1, 4, -1, -1))[0, :, 0]
        for name, other in (("first_frame_psnr", first), ("autoencoder_psnr", own)):
            expected = -10 * float(((((picture - other) / 2) ** 2).mean()).log10())
            assert record["samples"][index][name] == pytest.approx(expected, abs=0.1)
    for name, mean in record["figures"].items():
        assert mean == pytest.approx(sum(row[name] for row in record["samples"]) / 4)
    before = contents(begun)
    make(begun, *line)
    said = "PSNR of first frames against their pictures {first_frame_psnr:.2f} dB, of the autoencoder {autoencoder_psnr:.2f} dB"
    assert said.format(**record["figures"]) in capsys.readouterr().out and contents(begun) == before
    height, width = np.asarray(Image.open(begun / "pictures.png")).shape[:2]
    assert (height, width) == (3 * 18 - 2, 4 * 18 - 2), "a column a sample"


def test_they_go_on_as_long_videos(begun: Path, results: Path, pictures: Path, tmp_path: Path) -> None:
    line = ["--run", results, "--mode", "i2v", "--image", pictures / "0.png", "--num-samples", 1, *STEPS]
    out = make(tmp_path / "out", *line, "--num-frames", 6)
    kept = latents(out)
    assert torch.equal(kept[0], latents(begun)[0]) and len(kept) == 2 and count_frames(out / "000000.mp4") == 6
    made = job(*line, "--num-frames", 6)
    seen = made.pipeline.encode(made.pipeline.decode(kept[0]))
    after = made.pipeline.generate_latents([0], seed=3, sampling=made.following, clip=1, previous=seen)
    assert torch.equal(kept[1], after), "a clip before, no picture any more"
    first = make(tmp_path / "pieces", *line)
    assert len(latents(first)) == 1
    assert contents(make(first, *line, "--num-frames", 6)) == contents(out)
    with pytest.raises(UserError, match="images_sha256 differ"):
        make(first, *line, "--num-frames", 6, "--image", pictures / "1.jpg")


def test_pictures_are_cut_and_resized_as_clips_are(pictures: Path, tmp_path: Path) -> None:
    ramp = np.zeros((10, 30, 3), np.uint8)
    ramp[:, 10:20] = np.arange(10)[None, :, None] * 20
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert torch.equal(read_picture(tmp_path / "ramp.png", (10, 10)) * 127.5 + 127.5, torch.from_numpy(ramp[:, 10:20]).permute(2, 0, 1))
    assert read_picture(pictures / "2.PNG", (16, 8)).shape == (3, 16, 8)
    small, rough = (read_picture(pictures / "0.png", (8, 8), antialias=smooth) for smooth in (True, False))
    assert small.std() < rough.std(), "the release does not smooth"
    Image.new("LA", (12, 12)).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", (16, 16)).shape == (3, 16, 16)
    assert [path.name for path in find_pictures([str(pictures / "2.PNG"), str(pictures)])] == ["2.PNG", "0.png", "1.jpg", "2.PNG"]


def test_pictures_are_made_smaller_as_the_clips_of_training_were(results: Path, pictures: Path) -> None:
    made = job("--run", results, "--mode", "i2v", "--image", pictures / "0.png", "--num-samples", 1)
    ae = made.pipeline.ae
    for told in (True, False):
        ae.card.setdefault("data", {})["antialias"] = told
        assert torch.equal(made.picture(0), read_picture(pictures / "0.png", (16, 16), antialias=told))


def test_an_official_checkpoint_begins_at_a_picture_untrained(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = official(tmp_path)
    line = ["--denoiser", paths["denoiser"], "--ae", paths["ae"], "--mode", "i2v", "--image", pictures / "0.png", "--num-samples", 1]
    out = make(tmp_path / "out", *line, "--steps", 2)
    made = job(*line, "--steps", 2)
    assert "was not trained to begin at a picture" in capsys.readouterr().err and len(made.notes) == 1
    still = made.pipeline.encode_still(read_picture(pictures / "0.png", (16, 16), antialias=False)[None])
    assert torch.equal(latents(out)[0], made.pipeline.generate_latents([0], sampling=made.first, previous=still, image=True))
    assert load_sampling(["--denoiser", str(paths["denoiser"])], "sample.py", "").system == "hvdm"


# Motion.


def test_motion_is_asked_for_by_class_or_place(results: Path) -> None:
    assert job("--run", results, *STEPS).told == {}
    made = job("--run", results, *STEPS, "--dynamics", 2, "--dynamics-guidance", 2)
    pipeline = made.pipeline
    expected = pipeline.generate_latents([0], seed=3, sampling=made.first, dynamics=2, dynamics_guidance=2.0)
    assert torch.equal(made.sample_clip([0], 0, None), expected)
    record = made.settings()
    assert (record["dynamics"], record["dynamics_guidance"]) == (2, 2.0)
    assert made.notes == ["note: class 2 of motion are training clips of above 0.2"]
    assert job("--run", results, "--dynamics", 1).notes == ["note: class 1 of motion are training clips of above 0.1 and up to 0.2"]
    places = [(0, 0), (33, 0), (34, 1), (66, 1), (67, 2), (100, 2)]
    assert [job("--run", results, "--dynamics-percentile", percent).told["dynamics"] for percent, _ in places] == [b for _, b in places]


def test_frame_strides_are_asked_for_by_their_frames(results: Path) -> None:
    made = job("--run", results, *STEPS, "--frame-stride", 4)
    assert (made.told, made.fps, made.settings()["frame_stride"]) == ({"stride": 1}, 2.0, 4)
    assert torch.equal(made.sample_clip([0], 0, None), made.pipeline.generate_latents([0], seed=3, sampling=made.first, stride=1))


def test_videos_of_every_other_frame_play_at_half_the_rate(tmp_path: Path) -> None:
    family(tmp_path, data=DATA | {"frame_interval": 2})
    assert job("--run", tmp_path, *STEPS).fps == 4.0
    assert job("--run", tmp_path, *STEPS, "--fps", 25).fps == 25.0


def clips(folder: Path, amounts: list[float], frames: int = 8) -> Path:
    """Videos of flicker, so much of it."""
    folder.mkdir()
    for number, amount in enumerate(amounts):
        video = torch.full((3, frames, 16, 16), 100.0)
        video[:, 1::2] += amount
        write_mp4(folder / f"{number:06d}.mp4", video.to(torch.uint8), 8.0)
    return folder


def test_motion_of_videos_is_measured(tmp_path: Path) -> None:
    still, slow, fast = (clips(tmp_path / name, amounts) for name, amounts in (("a", [0, 0]), ("b", [20, 20]), ("c", [20, 100])))
    found = [measure_motion(folder, Env.single(), 4) for folder in (still, slow, fast)]
    assert found[0]["motion"] == 0 and 0 < found[1]["motion"] < found[2]["motion"] and found[1]["motion_std"] < found[2]["motion_std"]
    assert found[0]["protocol"]["clips"] == 4 and found[0]["videos"] == 2
    video = torch.full((1, 3, 8, 16, 16), 100.0)
    video[:, :, 1::2] += 20
    assert found[1]["motion"] == pytest.approx(float(motion_energy(video / 127.5 - 1)), rel=0.1)
    (fast / "settings.json").write_text(json.dumps({"model": {"latent_frames": 4}, "samples": [{"file": "000000.mp4"}]}))
    write_mp4(fast / "grid.mp4", torch.zeros(3, 8, 16, 16, dtype=torch.uint8), 8.0)
    told = measure_motion(fast, Env.single())
    assert told["motion"] == pytest.approx(found[1]["motion"]) and told["protocol"]["clip_frames"] == 4
    assert measure_motion(still, Env.single(), 8)["protocol"]["clips"] == 2
    with pytest.raises(UserError, match="has fewer than 16 frames: give --clip-frames"):
        measure_motion(still, Env.single())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        measure_motion(tmp_path / "none", Env.single())
    (still / "000002.mp4").write_bytes(b"?")
    with pytest.raises(UserError, match=r"000002.mp4 cannot be read"):
        measure_motion(still, Env.single(), 4)


def test_the_command_leaves_its_figures_for_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = clips(tmp_path / "b", [20]), clips(tmp_path / "c", [100])
    line = ["--samples", str(slow), str(fast), "--clip-frames", "4", "--out", str(tmp_path / "motion.json")]
    evaluate.motion(parse_launch("", line))
    said = capsys.readouterr().out
    both = json.loads((tmp_path / "motion.json").read_text())
    assert list(both) == [str(slow), str(fast)] and both[str(fast)] == json.loads((fast / "motion.json").read_text())
    assert f"{both[str(slow)]['motion']:.5f} +- 0.00000 over 1 videos: {slow}" in said and "clip_frames" in said
    for argv, message in (([], "motion of what"), (["--samples", "x"], "no such folder"), ([*line, "--clip-frames", "3"], "even number")):
        with pytest.raises(ConfigError, match=message):
            evaluate.motion(parse_launch("", argv))


def test_the_report_shows_pictures_and_motion_with_their_figures(begun: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "000-hvdm-denoiser").mkdir(parents=True)
    (runs / "000-hvdm-denoiser" / "config.yaml").write_text("system: hvdm\nstage: denoiser\n")
    (runs / "000-hvdm-denoiser" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    lively = tmp_path / "lively"
    lively.mkdir()
    write_gif(lively / "000000.gif", torch.zeros(3, 2, 8, 8, dtype=torch.uint8), 8.0)
    (lively / "settings.json").write_text(json.dumps({"system": "hvdm", "mode": "short", "dynamics": 2}))
    (lively / "motion.json").write_text(json.dumps({"motion": 0.1234, "videos": 1}))
    page = report.build(runs, [begun, lively], None)
    figures = json.loads((begun / "settings.json").read_text())["figures"]
    assert "<h2>Videos that begin at a picture: 4 frames</h2>" in page and report.PICTURES in page
    assert all(f"<td>{value:.4g}</td>" in page for value in figures.values())
    assert "<h2>Generated clips, class 2 of motion</h2>" in page and "<td>0.1234</td>" in page and "<h2>Denoiser</h2>" in page


# Flags.


def test_steps_are_the_releases_or_those_of_a_flow(results: Path, tmp_path: Path) -> None:
    assert HVDMSampleConfig.usual_steps == {"ddpm": 100, "flow": 50}
    own = job("--run", results, "--mode", "long", "--num-frames", 8)
    assert [(s.sampler, s.eta, s.respacing, s.clip, s.keep_eps, s.guidance) for s in (own.first, own.following)] == [
        ("ddim", 1.0, "trailing100", True, True, 1.0)
    ] * 2
    family(tmp_path / "flow", DIT, DiffusionConfig(process="flow"))
    flow = job("--run", tmp_path / "flow", "--mode", "long", "--num-frames", 6, "--next-steps", 7)
    assert (flow.first.sampler, flow.first.steps, flow.following.steps) == ("euler", 50, 7)


def test_flags_say_which_system(results: Path) -> None:
    assert load_sampling(["--run", str(results)], "sample.py", "").system == "hvdm"
    assert load_sampling(["--denoiser", "x.pth", "--ae", "y", "--image", "z"], "sample.py", "").system == "hvdm"
    assert load_sampling(["--second-model", "x.pth", "--first-model", "y"], "sample.py", "").system == "pvdm", "who had them first"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "i2v"], "--mode image: which picture"),
        (["--image", "x.png"], "--image goes with --mode image"),
        (["--no-anchor"], "--no-anchor goes with --mode image"),
        (["--mode", "i2v", "--image", "x.png"], "--image x.png cannot be read: no such file"),
        (["--mode", "i2v", "--image", __file__], "cannot be read: cannot identify image"),
        (["--mode", "i2v", "--image", "."], "--image .: no picture in it"),
        (["--dynamics", "3"], r"--dynamics 3: the denoiser knows 0 \(the stillest\) to 2"),
        (["--dynamics", "-1"], "--dynamics -1: "),
        (["--dynamics", "1", "--dynamics-percentile", "50"], "give one of them"),
        (["--dynamics-percentile", "101"], "--dynamics-percentile 101: from 0"),
        (["--dynamics-percentile", "nan"], "--dynamics-percentile nan"),
        (["--dynamics-guidance", "2"], "towards which motion"),
        (["--dynamics", "1", "--dynamics-guidance", "nan"], "--dynamics-guidance nan: a number"),
        (["--frame-stride", "2"], r"--frame-stride 2: the denoiser knows 1, 4 \(--frame-strides\)"),
        (["--condition", "pixels"], "--condition"),
        (["--condition", "latent"], "--condition latent: only --mode long"),
        (["--mode", "long"], "how long"),
        (["--preset", "100/20"], "--preset"),
    ],
)
def test_settings_that_cannot_be_are_refused(results: Path, argv: list[str], message: str) -> None:
    with pytest.raises((ConfigError, UserError), match=message) as caught:
        job("--system", "hvdm", "--run", results, *argv)
    assert "\n" not in str(caught.value)


def test_what_a_denoiser_was_not_trained_for_is_refused(plain: Path, pictures: Path, tmp_path: Path) -> None:
    image = ["--mode", "i2v", "--image", pictures / "0.png"]
    for flag in ("--dynamics", "--dynamics-percentile"):
        with pytest.raises(UserError, match=rf"{flag}: the denoiser .* was trained without classes of motion \(--dynamics-bins\)"):
            job("--run", plain, flag, 1)
    with pytest.raises(UserError, match=r"--frame-stride 1: the denoiser was trained with one only"):
        job("--run", plain, "--frame-stride", 1)
    ae = plain / "000-hvdm-autoencoder"
    alone = export_denoiser(tmp_path / "alone", ae, UNET, cond_prob=0.0)
    with pytest.raises(UserError, match="trained without pictures and without clips before"):
        job("--denoiser", alone, *image)
    with pytest.raises(UserError, match=r"was trained on single clips \(--cond-prob 0\), and cannot go on"):
        job("--denoiser", alone, "--mode", "long", "--num-frames", 8)
    begins = export_denoiser(tmp_path / "begins", ae, TOLD, cond_prob=0.0, img_prob=0.5)
    assert job("--denoiser", begins, *image).notes == []
    with pytest.raises(UserError, match=r"--num-frames 5: .* so that videos have 4"):
        job("--denoiser", begins, *image, "--num-frames", 5)
    with pytest.raises(ConfigError, match="--mode image: pvdm makes short and long videos only"):
        config("--system", "pvdm", "--run", plain, *image[:2])
