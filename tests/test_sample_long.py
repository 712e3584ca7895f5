"""Long videos: each clip from the one before, in pieces and after a stop the same file for file; which systems have them."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.stored_video import count_frames, decode_window, iterate_frames
from diffusion import DiffusionConfig
from launch import report
from launch.env import Env, StopFlag, Stopped
from pipelines.latte_sample import LatteSampleJob
from pipelines.long import ClipFolder, chain, count_clips, fingerprint
from pipelines.pvdm_sample import PVDMSampleConfig, PVDMSampleJob
from pipelines.systems import load_sampling
from tests import latte_exports
from tests.distributed import command, interrupt
from tests.pvdm_exports import DIT, export_denoiser, family, official, without_condition
from tests.sampling import CPU, config, contents, make
from utils.errors import ConfigError, UserError

LONG = ["--mode", "long", "--num-samples", "2", "--steps", "3", "--next-steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    family(root)
    return root


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latte")
    latte_exports.family(root)
    return root


def job(*argv: object) -> PVDMSampleJob:
    found = config(*argv)
    assert isinstance(found, PVDMSampleConfig)
    return PVDMSampleJob(found, CPU)


def latents(folder: Path, name: str = "000000") -> list[Tensor]:
    return [load_file(path)["latent"] for path in sorted((folder / "latents" / name).iterdir())]


@pytest.fixture(scope="module")
def whole(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of 4 frames, of which the last is cut."""
    return make(tmp_path_factory.mktemp("whole") / "out", "--run", results, *LONG, "--num-frames", 14)


def test_a_chain_hands_each_clip_to_the_next() -> None:
    seen: list[tuple[int, float | None]] = []

    def clip(number: int, previous: Tensor | None) -> Tensor:
        seen.append((number, None if previous is None else previous.item()))
        return torch.tensor(10.0 * number)

    assert [latent.item() for latent in chain(clip, stop=3)] == [0, 10, 20] and seen == [(0, None), (1, 0), (2, 10)]
    seen.clear()
    assert [latent.item() for latent in chain(clip, start=torch.tensor(7.0), first=2, stop=3)] == [20] and seen == [(2, 7)]


def test_any_number_of_frames(whole: Path, results: Path) -> None:
    assert count_frames(whole / "000000.mp4") == 14 and len(latents(whole)) == 4
    assert set(contents(whole)) == {
        *(f"latents/00000{i}/0000{k}.safetensors" for i in range(2) for k in range(4)),
        *("000000.mp4", "000001.mp4", "grid.mp4", "grid.png", "film.png", "settings.json", "index.html"),
    }
    made = job("--run", results, *LONG, "--num-frames", 14)
    assert [count_clips(made, frames) for frames in (1, 4, 5, 14, 128)] == [1, 1, 2, 4, 32]
    record = json.loads((whole / "settings.json").read_text())
    assert (record["mode"], record["num_frames"]) == ("long", 14)
    assert (record["sampling"]["respacing"], record["following"]["respacing"]) == ("trailing3", "trailing2")


def test_each_clip_is_made_from_the_one_before(whole: Path, results: Path) -> None:
    """Another latent of clip 1: clip 2 and all after it are others, and clip 1 and all before it are as they were."""
    made = job("--run", results, *LONG, "--num-frames", 14)
    kept = latents(whole)
    first = kept[0][None]

    def clips(changed: Tensor) -> list[Tensor]:
        def clip(number: int, previous: Tensor | None) -> Tensor:
            return changed if number == 1 else made.sample_clip([0], number, previous)

        return list(chain(clip, stop=4))

    same, other = clips(kept[1][None]), clips(-kept[1][None])
    assert [torch.equal(a[0], b) for a, b in zip(same, kept, strict=True)] == [True] * 4
    assert [torch.equal(a[0], b) for a, b in zip(other, kept, strict=True)] == [True, False, False, False]
    assert torch.equal(made.sample_clip([0], 0, None), first), "the first clip knows none before"


def test_a_short_clip_is_the_first_of_the_long_video(whole: Path, results: Path) -> None:
    short = job("--run", results, "--steps", 3, "--seed", 3)
    assert torch.equal(short.generate([0])[""], short.decode_clip(latents(whole)[0][None], 0))
    cut = job("--run", results, "--steps", 3, "--seed", 3, "--num-frames", 3)
    assert torch.equal(cut.generate([0])[""], short.generate([0])[""][:, :, :3])


def test_more_frames_in_the_same_folder_are_those_of_one_call(whole: Path, results: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", "--run", results, *LONG, "--num-frames", 6)
    before = contents(out)
    assert len(latents(out)) == 2
    made = contents(make(out, "--run", results, *LONG, "--num-frames", 14))
    assert made == contents(whole)
    assert all(made[name] == value for name, value in before.items() if name.startswith("latents/"))
    with pytest.raises(UserError, match="holds videos of 14 frames, --num-frames 6 are fewer"):
        make(out, "--run", results, *LONG, "--num-frames", 6)


def test_a_video_goes_on_in_another_folder(whole: Path, results: Path, tmp_path: Path) -> None:
    first = make(tmp_path / "first", "--run", results, *LONG, "--num-frames", 6, "--num-samples", 1)
    before = contents(first)
    out = make(tmp_path / "out", "--run", results, *LONG, "--num-frames", 14, "--continue-from", first)
    assert contents(out) == contents(whole) and contents(first) == before
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match=r"no latents of these samples are in .*; it is the --out of a long video made with --keep-latents"):
        make(tmp_path / "b", "--run", results, *LONG, "--num-frames", 14, "--continue-from", empty)
    with pytest.raises(UserError, match="was made with other settings: give the settings"):
        make(tmp_path / "c", "--run", results, *LONG, "--num-frames", 14, "--continue-from", first, "--seed", 4)


def test_a_stop_loses_one_clip_at_most(whole: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the third clip: its latents are kept, no video is; the same command goes on with the fourth."""
    out, stop = tmp_path / "out", StopFlag()
    made: list[int] = []
    sample_clip = PVDMSampleJob.sample_clip

    def counted(self: PVDMSampleJob, indices: list[int], clip: int, previous: Tensor | None) -> Tensor:
        made.append(clip)
        if len(made) == 3:
            stop.set()
        return sample_clip(self, indices, clip, previous)

    monkeypatch.setattr(PVDMSampleJob, "sample_clip", counted)
    with pytest.raises(Stopped):
        make(out, "--run", results, *LONG, "--num-frames", 14, env=Env(0, 1, 0, 1, CPU, "gloo", stop))
    assert set(contents(out)) == {"settings.json", *(f"latents/000000/0000{k}.safetensors" for k in range(3))}
    made.clear()
    assert contents(make(out, "--run", results, *LONG, "--num-frames", 14)) == contents(whole)
    assert made == [3, 0, 1, 2, 3]


@pytest.mark.slow
def test_a_killed_video_goes_on(results: Path, tmp_path: Path) -> None:
    line = [*LONG, "--num-frames", "120", "--num-samples", "1", "--run", str(results)]
    out = tmp_path / "out"
    kept = out / "latents" / "000000"
    interrupt(["sample.py", *line, "--out", out], lambda: (kept / "00004.safetensors").is_file())
    there = {path.name: path.stat().st_mtime_ns for path in kept.iterdir() if path.suffix == ".safetensors"}
    assert 5 <= len(there) < 30 and not (out / "000000.mp4").exists()
    make(out, *line)
    assert {name: (kept / name).stat().st_mtime_ns for name in there} == there, "what was there is not made again"
    found = {name: value for name, value in contents(out).items() if not name.endswith(".tmp")}
    assert found == contents(make(tmp_path / "one", *line))


@pytest.mark.slow
def test_processes_change_no_byte(whole: Path, results: Path, tmp_path: Path) -> None:
    done = command(["sample.py", results, "--out", tmp_path / "out", *LONG, "--num-frames", "14"], 2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(whole)


def test_samples_that_go_together_may_have_got_to_different_clips(whole: Path, results: Path, tmp_path: Path) -> None:
    """Without --exact: one sample has two clips, the other none; what is kept is not made again."""
    line = ["--run", results, *LONG, "--no-exact"]
    out = make(tmp_path / "out", *line, "--num-frames", 6, "--num-samples", 1)
    before = contents(out / "latents")
    made = contents(make(out, *line, "--num-frames", 14) / "latents")
    assert before.items() <= made.items() and len(made) == 8
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(latents(out, "000001"), latents(whole, "000001"), strict=True))


def test_latents_of_other_settings_or_damaged_ones_are_refused(whole: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    line = ["--run", results, *LONG, "--num-frames", 18]
    with pytest.raises(UserError, match=r"samples of other settings \(seed differ"):
        make(out, *line, "--seed", 9)
    with pytest.raises(UserError, match=r"samples of other settings .*mode"):
        make(out, "--run", results, "--steps", 3, "--seed", 3, "--num-samples", 2)
    assert contents(make(out, *line, "--num-frames", 14, "--fps", 8)) == contents(whole)
    place = out / "latents" / "000000" / "00003.safetensors"
    good = place.read_bytes()
    place.write_bytes(b"?" * 50)
    with pytest.raises(UserError, match=r"00003.safetensors cannot be read .*: delete it"):
        make(out, *line)
    save_file({"latent": torch.zeros(4, 48)}, place, metadata={"settings": "another"})
    with pytest.raises(UserError, match=r"00003.safetensors was made with other settings"):
        make(out, *line)
    place.unlink()
    make(out, *line)
    assert place.read_bytes() == good and count_frames(out / "000000.mp4") == 18
    digest = fingerprint({"seed": 1, "fps": 8.0})
    assert digest == fingerprint({"seed": 1, "fps": 9.0}) != fingerprint({"seed": 2, "fps": 8.0})
    assert ClipFolder(tmp_path / "nothing", digest).count(5) == 0


def test_gifs_and_frames(results: Path, tmp_path: Path) -> None:
    line = ["--run", results, *LONG, "--num-samples", 1]
    out = make(tmp_path / "out", *line, "--num-frames", 6, "--gif")
    frames = list(iterate_frames(out / "000000.mp4"))
    assert len(frames) == 6 and (out / "000000.gif").is_file()
    assert (decode_window((out / "000000.mp4").read_bytes(), 0, 6) == frames).all()
    assert count_frames(out / "000000.gif") == 0
    make(out, *line, "--num-frames", 7)
    assert not (out / "000000.gif").exists(), "it is of the shorter video"


# Presets and flags.


@pytest.mark.parametrize(
    ("preset", "steps"), [("100/20", (100, 20)), ("200/200", (200, 200)), ("400/400", (400, 400)), ("400/20", (400, 20))]
)
def test_presets_are_the_papers(tmp_path: Path, preset: str, steps: tuple[int, int]) -> None:
    paths = official(tmp_path)
    made = job("--denoiser", paths["denoiser"], "--ae", paths["ae"], *LONG[:2], "--num-frames", 8, "--preset", preset)
    for sampling, number in zip((made.first, made.following), preset.split("/"), strict=True):
        assert (sampling.sampler, sampling.eta, sampling.clip, sampling.keep_eps) == ("ddim", 1.0, True, True)
        assert (sampling.respacing, sampling.guidance) == (f"trailing{number}", 1.0)


def test_steps_samplers_and_flows(results: Path, tmp_path: Path) -> None:
    plain = job("--run", results)
    assert plain.first.respacing == "trailing100", "the process has fewer than 400"
    own = job("--run", results, "--mode", "long", "--num-frames", 8, "--preset", "100/20", "--next-steps", 7, "--eta", 0)
    assert (own.first.respacing, own.following.respacing, own.first.eta) == ("trailing100", "trailing7", 0.0)
    alike = job("--run", results, "--mode", "long", "--num-frames", 8, "--steps", 9)
    assert (alike.first.respacing, alike.following.respacing) == ("trailing9", "trailing9")
    other = job("--run", results, "--sampler", "dpm++", "--steps", 5).first
    assert (other.sampler, other.steps, other.respacing, other.keep_eps) == ("dpm++", 5, "", False)
    family(tmp_path / "flow", DIT, DiffusionConfig(process="flow"))
    flow = job("--run", tmp_path / "flow", "--mode", "long", "--num-frames", 6)
    assert (flow.first.sampler, flow.first.steps, flow.following.steps, flow.first.keep_eps) == ("euler", 50, 50, False)
    with pytest.raises(ConfigError, match=r"--preset 100/20: .* a flow"):
        job("--run", tmp_path / "flow", "--preset", "100/20")
    scaled = export_denoiser(tmp_path / "scaled", results / "000-pvdm-autoencoder", latent={"scale": 2.0, "shift": 0.0})
    assert not job("--denoiser", scaled).first.clip, "scaled latents do not lie in [-1, 1]"


def test_the_denoiser_says_which_system(results: Path, latte: Path, tmp_path: Path) -> None:
    paths = official(tmp_path)
    for denoiser, system in ((results / "001-pvdm-denoiser", "pvdm"), (paths["denoiser"], "pvdm"), (latte / "001-latte-denoiser", "latte")):
        assert load_sampling(["--denoiser", str(denoiser), "--ae", "x"], "sample.py", "").system == system
    assert load_sampling(["--second-model", str(paths["denoiser"])], "sample.py", "").system == "pvdm"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "long"], "--mode long: how long"),
        (["--continue-from", "x"], "--continue-from goes with --mode long"),
        (["--next-steps", "3"], "--next-steps 3: only --mode long"),
        (["--num-frames", "-1"], "--num-frames -1: at least 0"),
        (["--num-frames", "5"], "--num-frames 5: a clip has 4; for longer videos add --mode long"),
        (["--eta", "2"], "--eta 2.0: between 0 and 1"),
        (["--eta", "0.5", "--sampler", "ddpm"], "only ddim"),
        (["--steps", "101"], "trailing101"),
        (["--fps", "nan"], "--fps nan: "),
        (["--guidance-scale", "nan"], "--guidance-scale nan: a number"),
        (["--overlap", "2"], "--overlap"),
        (["--preset", "300/20"], "--preset: '300/20' given, one of 100/20, 200/200"),
    ],
)
def test_settings_that_cannot_be_are_refused(results: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job("--run", results, *argv)


def test_which_systems_have_long_videos(results: Path, tmp_path: Path) -> None:
    alone = export_denoiser(tmp_path / "alone", results / "000-pvdm-autoencoder", without_condition())
    with pytest.raises(UserError, match="was trained without a clip before"):
        job("--denoiser", alone, "--mode", "long", "--num-frames", 8)
    single = export_denoiser(tmp_path / "single", results / "000-pvdm-autoencoder", cond_prob=0.0)
    with pytest.raises(UserError, match=r"was trained on single clips \(--cond-prob 0\)"):
        job("--denoiser", single, "--mode", "long", "--num-frames", 8)
    with pytest.raises(ConfigError, match=r"--mode long is not for CMD: .* mix all frames of a clip"):
        config("--system", "cmd", "--run", "x", "--mode", "long", "--num-frames", "8")


# Latte: the frames that two clips share are held fixed.


@pytest.mark.parametrize("process", [None, DiffusionConfig(process="flow")], ids=["ddpm", "flow"])
def test_latte_goes_on_from_the_frames_it_shares(tmp_path: Path, process: DiffusionConfig | None) -> None:
    latte_exports.family(tmp_path / "runs", process)
    line = ["--run", tmp_path / "runs", "--mode", "long", "--num-samples", 1, "--steps", 4, "--guidance-scale", 2, "--overlap", 1]
    out = make(tmp_path / "out", *line, "--num-frames", 9)
    name = "000000-class000"
    kept = latents(out, name)
    assert count_frames(out / f"{name}.mp4") == 9 and len(kept) == 3, "4 frames, then 3 new ones each"
    for before, after in itertools.pairwise(kept):
        assert torch.equal(after[:, :1], before[:, -1:]) and after.shape == before.shape
    found = config(*line, "--num-frames", 9)
    made = LatteSampleJob(found, CPU)  # type: ignore[arg-type]
    assert torch.equal(made.sample_clip([0], 1, kept[0][None])[0], kept[1])
    assert not torch.equal(made.sample_clip([0], 1, -kept[0][None])[0, :, 1:], kept[1][:, 1:])
    short = LatteSampleJob(config(*line[:2], "--steps", 4, "--guidance-scale", 2), CPU)  # type: ignore[arg-type]
    assert torch.equal(short.generate([0])[""], made.decode_clip(kept[0][None], 0))
    first = make(tmp_path / "first", *line, "--num-frames", 5)
    assert contents(make(tmp_path / "more", *line, "--num-frames", 9, "--continue-from", first)) == contents(out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "long", "--num-frames", "9", "--overlap", "4"], "--overlap 4: a clip has 4 frames"),
        (["--mode", "long", "--num-frames", "9", "--denoising-strip", "2"], "a long video has many"),
        (["--overlap", "1"], "--overlap 1 goes with --mode long"),
        (["--n-frames", "2", "--num-frames", "3"], "give one of them"),
    ],
)
def test_lattes_own_mistakes(latte: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatteSampleJob(config("--run", latte, *argv), CPU)  # type: ignore[arg-type]


def test_num_frames_of_a_short_clip_of_latte_are_its_own(latte: Path) -> None:
    made = LatteSampleJob(config("--run", latte, "--num-frames", 6), CPU)  # type: ignore[arg-type]
    assert made.n_frames == 6 and made.settings()["n_frames"] == 6


def test_the_report_shows_long_videos_and_both_runs_of_the_autoencoder(whole: Path, results: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    started = {"000-pvdm-autoencoder": "", "001-pvdm-adversarial": f"model: {{init_from: {runs}/000-pvdm-autoencoder/export}}\n"}
    for name, more in {**started, "002-pvdm-denoiser": ""}.items():
        (runs / name / "samples").mkdir(parents=True)
        stage = "denoiser" if "denoiser" in name else "autoencoder"
        (runs / name / "config.yaml").write_text(f"system: pvdm\nstage: {stage}\n{more}")
        (runs / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    short = make(tmp_path / "short", "--run", results, "--steps", 2, "--num-samples", 1, "--gif")
    page = report.build(runs, [short, whole], None)
    assert "Long videos: 14 frames" in page and page.count("data:video/mp4;base64") == 2 and report.FILM in page
    assert page.count("data:image/gif") == 1 and "<h2>Generated clips</h2>" in page
    titles = [
        "<h2>Triplane autoencoder</h2>",
        "<h2>Triplane autoencoder: 001-pvdm-adversarial, which went on from",
        "<h2>Denoiser</h2>",
    ]
    places = [page.index(title) for title in titles]
    assert places == sorted(places)
