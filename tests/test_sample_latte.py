"""sample.py, evaluate.py and the report with Latte: files, strips and trajectories, which system is meant, one-line errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from datasets.shards import ShardSet
from datasets.stored_video import decode_window
from launch import report
from launch.env import distributed
from pipelines import video_files
from pipelines.jobs import choose_classes, load_vectors
from pipelines.latte_sample import LatteSampleConfig, LatteSampleJob
from pipelines.systems import load_sampling
from tests import cmd_family
from tests.distributed import command
from tests.latte_exports import LATTE, export_denoiser, export_vae, family, identity, sd_folder
from tests.sampling import CPU, config, contents, make
from tests.shard_sets import write_set
from utils.config import load_config
from utils.errors import ConfigError, UserError
from utils.media import grid, to_uint8
from utils.weights import write_export

SETTINGS = ["--num-samples", "5", "--steps", "4", "--seed", "3", "--guidance-scale", "2"]
WATCHED = ["--denoising-strip", "2", "--strip-samples", "3", "--save-trajectory", "x0", "--trajectory-every", "3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    family(root)
    return root


def job(*argv: object) -> LatteSampleJob:
    found = config(*argv)
    assert isinstance(found, LatteSampleConfig)
    return LatteSampleJob(found, CPU)


@pytest.fixture(scope="module")
def samples(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("samples") / "one", "--run", results, *SETTINGS, *WATCHED)


def test_one_file_a_sample_a_grid_a_strip_and_the_settings(samples: Path) -> None:
    record = json.loads((samples / "settings.json").read_text())
    clips = [f"{i:06d}-class{i % 3:03d}" for i in range(5)]
    pictures = {"grid.mp4", "grid.png", "strip.mp4", "strip.png", "settings.json", "index.html"}
    assert set(contents(samples)) == {f"{name}{end}.mp4" for name in clips for end in ("", "-trajectory")} | pictures
    assert [entry["file"] for entry in record["samples"]] == [f"{name}.mp4" for name in clips]
    assert record["samples"][1]["class_name"] == "two"
    assert (record["system"], record["seed"], record["sampling"]["steps"], record["sampling"]["sampler"]) == ("latte", 3, 4, "ddim")
    assert record["latent"] == {"scale": 0.5, "shift": 0.1} and record["n_frames"] == 4 and record["image_size"] == [8, 12]
    assert set(record["sha256"]) == {"ae", "denoiser"} and record["trajectory"] == "x0"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch"), [(2, 1), (3, 2)])
def test_processes_and_batches_change_no_byte(samples: Path, results: Path, tmp_path: Path, processes: int, batch: int) -> None:
    """5 samples do not divide by the processes. The one process of the fixture took 4 at a time."""
    out = tmp_path / "out"
    done = command(["sample.py", results, "--out", out, "--batch-size", batch, *SETTINGS, *WATCHED], processes)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(samples)


def test_other_batches_change_no_byte_and_missing_files_are_made_again(samples: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    for name in ("000003-class000-trajectory.mp4", "000001-class001.mp4", "strip.png"):
        (out / name).unlink()
    before = (out / "000002-class002.mp4").stat().st_mtime_ns
    make(out, "--run", results, *SETTINGS, *WATCHED, "--batch-size", 1)
    assert contents(out) == contents(samples)
    assert (out / "000002-class002.mp4").stat().st_mtime_ns == before


def test_a_strip_may_be_asked_for_later_a_trajectory_not(samples: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "--run", results, *SETTINGS)
    assert not list(out.glob("strip*"))
    make(out, "--run", results, *SETTINGS, *WATCHED[:4])
    assert (out / "strip.png").read_bytes() == (samples / "strip.png").read_bytes()
    with pytest.raises(UserError, match="trajectory, trajectory_every differ"):
        make(out, "--run", results, *SETTINGS, *WATCHED)


def test_the_strip_shows_estimates_that_end_in_the_clip(samples: Path, results: Path) -> None:
    made = job("--run", results, *SETTINGS, *WATCHED)
    strip = made.strip()
    assert strip is not None and strip.moments == 2 and strip.clips.shape == (6, 3, 4, 8, 12)
    clips = made.generate([0, 1, 2])[""]
    assert torch.equal(strip.clips[1::2], clips) and not torch.allclose(strip.clips[0], clips[0], atol=1e-3)
    picture = np.asarray(Image.open(samples / "strip.png"))
    assert picture.shape == (3 * 8 + 2 * 2, 2 * 12 + 2, 3)
    assert np.array_equal(picture[10:18, 14:], to_uint8(clips[1, :, 0]).permute(1, 2, 0).numpy())
    with pytest.raises(ConfigError, match="--denoising-strip 5: the sampling has 4 steps"):
        job("--run", results, *SETTINGS, "--denoising-strip", 5)


@pytest.mark.parametrize("kind", ["x0", "xt"])
def test_a_trajectory_is_one_video_with_a_picture_of_every_kth_step(results: Path, kind: str) -> None:
    made = job("--run", results, *SETTINGS, "--save-trajectory", kind, "--trajectory-every", 3)
    found = made.generate([4, 2])
    shown = found["-trajectory"]
    assert shown.shape == (2, 3, 2, 18, 26) and shown.abs().max() <= 1, "steps 3 and 4, four frames in a square"
    assert torch.equal(shown, torch.cat([made.generate([index])["-trajectory"] for index in (4, 2)]))
    last = grid(found[""][1].transpose(0, 1))
    assert torch.equal(shown[1, :, -1], last) == (kind == "x0")
    if kind == "xt":
        assert torch.equal(shown[0, :, 0, 0:8:2, 0:12:2], shown[0, :, 0, 1:8:2, 1:12:2]), "latent cells are blocks of pixels"


def test_names_of_the_tutorial(results: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", "--run", results, *SETTINGS, "--num-samples", 2, "--names", "tutorial")
    assert {path.name for path in out.glob("*.mp4")} == {"sample_output_0.mp4", "sample_output_0-000001.mp4", "grid.mp4"}
    assert json.loads((out / "settings.json").read_text())["names"] == "tutorial"


def test_levels_are_rounded(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial truncates, which darkens every clip by half a level."""
    written: list[torch.Tensor] = []
    real = video_files.write_mp4

    def write(path: Path, video: torch.Tensor, fps: float) -> None:
        written.append(video)
        real(path, video, fps)

    monkeypatch.setattr(video_files, "write_mp4", write)
    make(tmp_path / "out", "--run", results, *SETTINGS, "--num-samples", 1)
    clip = job("--run", results, *SETTINGS).generate([0])[""][0]
    levels = (clip + 1) * 127.5
    assert torch.equal(written[0], levels.round().to(torch.uint8)) and not torch.equal(written[0], levels.to(torch.uint8))


def test_other_lengths_and_sizes_are_made_with_a_warning(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--num-samples", 1, "--n-frames", 6, "--image-size", 16, 16]
    out = make(tmp_path / "out", "--run", results, *SETTINGS, *changed)
    noted = capsys.readouterr().err
    assert "clips of 6 frames, the denoiser was trained on 4" in noted and "latents of 8x8, the denoiser was trained on 4x6" in noted
    assert decode_window((out / "000000-class000.mp4").read_bytes(), 0, 6).shape == (6, 16, 16, 3)
    assert job("--run", results, *SETTINGS).notes == []


def test_guidance_without_a_condition_is_told(tmp_path: Path) -> None:
    family(tmp_path, config=dataclasses.replace(LATTE, num_classes=0))
    told = "warning: --guidance-scale 2 does nothing: the denoiser has no condition"
    assert job("--run", tmp_path, "--guidance-scale", 2).notes == [told]
    assert job("--run", tmp_path).notes == []


def test_the_usual_steps_and_what_respacing_replaces(results: Path) -> None:
    assert job("--run", results).steps == 100, "the process has fewer than 250"
    assert job("--run", results, "--respacing", "ddim25").steps == 25
    assert job("--run", results, "--respacing", "3,4").settings()["sampling"]["respacing"] == "3,4"
    assert job("--run", results, "--sampler", "ddpm", "--steps", 7).sampling.sampler == "ddpm"


def test_condition_vectors_come_from_files(results: Path, tmp_path: Path) -> None:
    ae = results / "000-latte-autoencoder"
    model = dataclasses.replace(LATTE, num_classes=0, cond_dim=6)
    run = export_denoiser(tmp_path / "text", identity(ae), model)
    for name, value in (("a", 0.0), ("b", 1.0)):
        np.save(tmp_path / f"{name}.npy", np.full((2, 3), value, dtype=np.float16))
    given = ["--denoiser", run, "--steps", 2, "--cond", tmp_path / "a.npy", tmp_path / "b.npy"]
    made = job(*given)
    clips = made.generate([0, 1, 2])[""]
    again = made.pipeline.generate([1], cond=torch.ones(1, 6), sampling=made.sampling)
    assert torch.equal(clips[1:2], again) and made.labels == [] and made.name(1) == "000001"
    assert made.settings()["cond_sha256"] != job(*given[:-1]).settings()["cond_sha256"]
    with pytest.raises(UserError, match=r"give --cond FILE.npy"):
        job("--denoiser", run)
    with pytest.raises(UserError, match="holds 6 numbers, m takes 7"):
        load_vectors([str(tmp_path / "a.npy")], 7, "m")
    with pytest.raises(UserError, match="takes no condition vectors"):
        job("--run", results, "--cond", tmp_path / "a.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as an array"):
        load_vectors([str(tmp_path / "objects.npy")], 6, "m")


def test_classes_by_number_or_name() -> None:
    assert choose_classes(("two", "0"), 3, ["one", "two", "three"]) == [1, 0]
    assert choose_classes(("all",), 3, []) == choose_classes((), 3, []) == [0, 1, 2]
    with pytest.raises(UserError, match="no such class; 0 to 2, or one, two, three"):
        choose_classes(("four",), 3, ["one", "two", "three"])


# Which system.


def test_the_runs_the_flags_or_a_recipe_say_which_system(results: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(results, both)
    assert load_sampling(["--run", str(both)], "sample.py", "").system == "latte"
    cmd_family.export(cmd_family.autoencoder_task(), both / "002-cmd-autoencoder")
    assert load_sampling([f"--run={both}"], "sample.py", "").system == "latte", "an autoencoder alone generates nothing"
    cmd = tmp_path / "cmd"
    cmd_family.family(cmd)
    assert load_sampling(["--results-dir", str(cmd)], "sample.py", "").system == "cmd"
    shutil.copytree(cmd / "001-cmd-content", both / "003-cmd-content")
    with pytest.raises(UserError, match="holds runs of cmd and latte: say with --system"):
        load_sampling(["--run", str(both)], "sample.py", "")
    assert load_sampling(["--run", str(both), "--system", "cmd"], "sample.py", "").system == "cmd"
    assert load_sampling(["--denoiser", "x.pt", "--no-exact", "--vae", "y"], "sample.py", "").system == "latte"
    assert load_sampling(["--ae", "x", "--content", "y", "--motion", "z"], "sample.py", "").system == "cmd"
    (tmp_path / "recipe.yaml").write_text(f"run: {results}\nsteps: 3\n")
    assert getattr(load_sampling(["--config", str(tmp_path / "recipe.yaml")], "sample.py", ""), "steps", None) == 3


def test_help_explains_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_sampling(["--help"], "sample.py", "About.")
    shown = capsys.readouterr().out
    assert "--motion-steps" in shown and "--denoising-strip" in shown and shown.count("About.") == 1
    with pytest.raises(SystemExit):
        load_sampling(["--system", "latte", "--help"], "sample.py", "About.")
    assert "--motion-steps" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--denoiser", "x.pt", "--ae", "a", "--vae", "b"], "--ae and --vae"),
        (["--denoiser", "x.pt", "--steps", "0"], "--steps 0: at least 1"),
        (["--denoiser", "x.pt", "--n-frames", "-1"], "--n-frames -1: at least 0"),
        (["--denoiser", "x.pt", "--image-size", "0", "8"], "--image-size 0 8"),
        (["--denoiser", "x.pt", "--eta", "2"], "--eta 2.0: between 0 and 1"),
        (["--denoiser", "x.pt", "--steps", "3", "--respacing", "4"], "give one of them"),
        (["--system", "latte"], "what to sample from.* --denoiser"),
        (["--num-samples", "1"], "what to sample from.* --system cmd, latte, pvdm, hvdm or vidm"),
        (["--denoiser", "x.pt", "--trajectory-every", "0"], "--trajectory-every 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*argv)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--run", "{results}", "--classes", "nine"], 1, "no such class"),
        (["--run", "{results}", "--sampler", "heun"], 2, "which has ddim, ddpm, dpm++"),
        (["--run", "{results}", "--sampler", "ddpm", "--eta", "1"], 2, "eta 1.0: only ddim"),
        (["--run", "{results}", "--smapler", "ddim"], 2, "--sampler"),
        (["--denoiser", "{results}/nothing.pt", "--ae", "{results}/000-latte-autoencoder"], 1, "does not exist"),
    ],
)
def test_mistakes_are_one_line(results: Path, tmp_path: Path, argv: list[str], status: int, words: str) -> None:
    done = command(["sample.py", *(part.format(results=results) for part in argv), "--out", tmp_path / "out"])
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert (done.returncode, len(lines)) == (status, 1), lines
    assert words in lines[0]


# Figures and the page.


def test_reconstruction_figures_of_frame_vaes(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "shards", [3, 2], lengths=(5,), size=(8, 12))
    shards = ShardSet.open(tmp_path / "shards")

    def figures(*argv: object) -> dict[str, object]:
        schemas = dict.fromkeys(evaluate.ENCODERS, evaluate.ReconstructConfig)
        words = ["--data-path", str(tmp_path / "shards"), "--perceptual", "none", *map(str, argv)]
        found = load_config(schemas, words, prog="evaluate.py")
        found.validate()
        with distributed(60) as env:
            return evaluate.measure_reconstruction(found, env)

    own = figures("--ae", results / "000-latte-autoencoder")
    assert own["clips"] == 5 and isinstance(own["protocol"], dict)
    assert (own["protocol"]["frames"], own["protocol"]["size"], own["protocol"]["dataset_digest"]) == (5, [8, 12], shards.digest)
    assert own["protocol"]["autoencoder_sha256"] == identity(results / "000-latte-autoencoder")["sha256"]
    short = figures("--vae", sd_folder(tmp_path / "vae", monkeypatch), "--n-frames", 2)
    assert isinstance(short["protocol"], dict) and short["protocol"]["frames"] == 2 and short["psnr"] != own["psnr"]
    other = tmp_path / "other"
    write_export(other, {"model": {"w": torch.zeros(1)}}, {"system": "toy", "stage": "autoencoder"})
    with pytest.raises(ConfigError, match="autoencoders of cmd, latte, pvdm, hvdm are measured, not of 'toy'"):
        figures("--ae", other)


def logged(run: Path, system: str, stage: str) -> None:
    """What training leaves for the report."""
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(f"system: {system}\nstage: {stage}\n")
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_shows_a_latte_family(results: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", "--run", results, *SETTINGS, "--num-samples", 1, "--gif", "--denoising-strip", 2)
    runs = tmp_path / "runs"
    logged(runs / "001-latte-denoiser", "latte", "denoiser")
    logged(runs / "002-cmd-content", "cmd", "content")
    page = report.build(runs, [out], None)
    assert "Denoiser" in page and "Frame VAE" not in page and "Content model" not in page and report.STRIP in page
    logged(runs / "000-latte-autoencoder", "latte", "autoencoder")
    assert "Frame VAE" in report.build(runs, [out], None)
    shutil.rmtree(runs / "001-latte-denoiser")
    with pytest.raises(UserError, match="no run of the denoiser stage"):
        report.build(runs, [out], None)


def test_a_family_found_by_its_denoiser(tmp_path: Path) -> None:
    """The autoencoder that it was trained on is taken, wherever it lies."""
    ae = export_vae(tmp_path / "elsewhere" / "000-latte-autoencoder")
    run = export_denoiser(tmp_path / "runs" / "000-latte-denoiser", identity(ae))
    for given in (("--denoiser", run), ("--run", tmp_path / "runs")):
        assert job(*given, "--steps", 2).sources() == {"ae": str(ae), "denoiser": str(run)}
    export_vae(tmp_path / "runs" / "001-latte-autoencoder", seed=7)
    assert job("--run", tmp_path / "runs", "--steps", 2).sources()["ae"] == str(ae)
    shutil.rmtree(ae)
    with pytest.raises(UserError, match="was trained on another autoencoder"):
        job("--run", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "001-latte-autoencoder")
    with pytest.raises(UserError, match="no finished autoencoder run"):
        job("--run", tmp_path / "runs")
