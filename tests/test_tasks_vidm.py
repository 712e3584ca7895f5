"""VIDM's two stages without a stream: what they learn from, defaults, starts from other weights, cards, previews, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.env import Env
from models.layers.spynet import SpyNet
from models.official.vidm import export_content, export_motion
from tasks import vidm_motion
from tasks.latent import LatentTask
from tests import vidm_exports
from tests.shard_sets import write_set
from tests.vidm_stage import MODULES, SIZE, N, arguments, batch, config, module, task
from utils.config import load_config
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng

STAGES = ("content", "motion")
ROOT = Path(__file__).parent.parent
META = ["--n-frames", str(N)]


class Recorder(nn.Module):
    """Keeps what it is called with and guesses no noise at all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, **told: torch.Tensor) -> torch.Tensor:
        self.calls.append((x, t, told))
        return torch.cat([x * 0, x * 0], dim=1)


def noise_of(made: LatentTask, given: dict[str, torch.Tensor]) -> SampleRng:
    return SampleRng(made.config.train.seed, given["index"])


def test_content_learns_the_first_frame_alone() -> None:
    made, given, net = task("content"), batch("content"), Recorder()
    rng = noise_of(made, given)
    output = made.loss("model", {"model": net}, given, rng)
    x, _, told = net.calls[0]
    noise = rng.normal("noise", (3, *SIZE))
    expected = made.process.q_sample(to_float(given["video"])[:, :, 0], made.process.sample_timesteps(rng), noise)
    assert not told and x.shape == (4, 3, *SIZE) and torch.equal(x, expected)
    assert output.count == 4 and set(output.metrics) == {"mse", "vb"}


def test_motion_learns_frame_r_told_what_came_before() -> None:
    made, given, net = task("motion"), batch("motion"), Recorder()
    rng = noise_of(made, given)
    made.loss("model", {"model": net}, given, rng)
    x, t, told = net.calls[0]
    first, previous, current = to_float(given["video"]).unbind(2)
    assert torch.equal(told["first"], first) and torch.equal(told["previous"], previous) and torch.equal(told["frame"], given["frame"])
    assert torch.equal(x, made.process.q_sample(current, t, rng.normal("noise", (3, *SIZE))))
    assert t.dtype == given["frame"].dtype == torch.int64


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_is_the_weighted_one(stage: str) -> None:
    """P2: w = 1 - alpha bar, on the squared error and not on the bound."""
    made, given = task(stage), batch(stage)
    rng = noise_of(made, given)
    output = made.loss("model", {"model": Recorder()}, given, rng)
    t, noise = made.process.sample_timesteps(rng), rng.normal("noise", (3, *SIZE))
    kept = torch.from_numpy(made.process.tables["alphas_cumprod"])[t]
    weighted = ((1 - kept) * noise.double().square().flatten(1).mean(1)).sum()
    assert float(output.total) == pytest.approx(float(weighted) + float(output.metrics["vb"][0]), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_release_s_settings_are_the_defaults(stage: str) -> None:
    schema: Any = type(config(stage))
    found = load_config({"vidm": schema}, ["--system", "vidm"], prog=f"train_{stage}_diffusion.py")
    assert (found.optim.lr, found.optim.betas, found.optim.eps, found.optim.weight_decay) == (2e-5, (0.9, 0.999), 1e-8, 0.01)
    assert (found.optim.clip_norm, found.optim.schedule, found.optim.warmup_steps) == (1.0, "constant", 0)
    assert (found.ema.decay, found.ema.warmup, found.ema.every) == (0.999, False, 1)
    assert found.train.global_batch_size == 48 and found.parallel.precision == "fp32"
    assert (found.diffusion.weighting, found.diffusion.variance, found.diffusion.loss) == ("p2", "learned_range", "mse")


@pytest.mark.parametrize("recipe", ["clevrer", "ucf101", "sky", "taichi"])
@pytest.mark.parametrize("stage", STAGES)
def test_recipes_build_the_official_networks(recipe: str, stage: str) -> None:
    argv = ["--config", str(ROOT / "configs" / "vidm" / f"{recipe}.yaml")]
    found = load_config({"vidm": type(config(stage))}, argv, prog=f"train_{stage}_diffusion.py")
    found.validate()
    known: dict[str, Any] = {"video_timesteps": 128} if stage == "motion" else {}
    with torch.device("meta"):
        size = found.network_size(image_size=(128, 128), **known)
        network = (vidm_motion.MotionUNet if stage == "motion" else vidm_exports.ContentUNet)(size)
    assert sum(p.numel() for p in network.parameters()) == (194_178_226 if stage == "motion" else 131_765_894)
    assert found.data.n_frames == (128 if recipe == "clevrer" else 16) and found.data.flip


def test_release_yaml_is_what_its_checkpoint_was_trained_as() -> None:
    argv = [word for name in ("clevrer", "release") for word in ("--config", str(ROOT / "configs" / "vidm" / f"{name}.yaml"))]
    found = load_config({"vidm": type(config("motion"))}, argv, prog="train_motion_diffusion.py")
    found.validate()
    assert (found.model.video_timesteps, found.model.flow_input) == (128, "minus_one_one")


@pytest.mark.parametrize("stage", STAGES)
def test_a_card_tells_all_that_sampling_needs(stage: str) -> None:
    card = task(stage).card()
    assert (card["system"], card["stage"]) == ("vidm", stage)
    assert card["data"]["n_frames"] == N and card["data"]["fps"] == 10.0 and card["data"]["image_size"] == list(SIZE)
    assert card["model"]["image_size"] == list(SIZE) and card["model"]["learn_sigma"] and card["diffusion"]["weighting"] == "p2"
    if stage == "motion":
        assert card["model"]["video_timesteps"] == N and card["model"]["diffusion_timesteps"] == 1000
        assert task(stage, "--video-timesteps", "9").card()["model"]["video_timesteps"] == 9


def test_a_card_tells_how_frames_were_made_smaller(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "clips", (4,), lengths=(N,), size=SIZE)
    index, setting = json.loads((folder / "index.json").read_text()), config("motion", *arguments(folder, "--n-frames", str(N)))
    for given, told in ((None, True), ({"antialias": False}, False), ({"antialias": True}, True)):
        (folder / "index.json").write_text(json.dumps(index | {"transform": given}))
        made, _, _ = MODULES["motion"].build(setting, Env(0, 1, 0, 1, torch.device("cpu"), "gloo"))
        assert made.card()["data"].get("antialias", True) is told


def test_previews_are_pictures_and_videos() -> None:
    content, motion = task("content"), task("motion", "--preview.frames", "4")
    given = batch("content")
    (pictures,) = content.preview({"model": module(content)}, given, noise_of(content, given)).values()
    assert pictures.shape == (2, 3, *SIZE) and pictures.abs().max() <= 1
    given, net = batch("motion", 1), Recorder()
    found = motion.preview({"model": net}, given, noise_of(motion, given))
    assert found["next"].shape == (2, 3, SIZE[0], 4 * SIZE[1])
    assert torch.equal(found["next"][0, :, :, : 3 * SIZE[1]], torch.cat(list(to_float(given["video"])[0].unbind(1)), dim=2))
    assert found["video"].shape == (2, 3, 4, *SIZE)
    assert torch.equal(found["video"][0, :, 0], to_float(given["video"])[0, :, 0]), "videos begin with the first frame as it is"
    frames = [int(told["frame"][0]) for _, _, told in net.calls]
    assert frames == [1, 1, 1, 1, 2, 2, 3, 3], "two steps each; indices from 1, never 0"
    assert torch.equal(net.calls[-1][2]["previous"][0], found["video"][0, :, 2])
    assert "video" not in task("motion", "--preview.frames", "0").preview({"model": net}, given, noise_of(motion, given))


def test_a_trained_flow_network_is_taken_up(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = SpyNet().state_dict()
    names = {name.replace("levels.", "basic_module.").replace("convs.", "basic_module."): name for name in trained}
    official = {f"{name.rsplit('.', 1)[0]}.conv.{name.rsplit('.', 1)[1]}": trained[ours] for name, ours in names.items()}
    torch.save(official, tmp_path / "spynet.pth")
    network = task("motion", "--spynet", str(tmp_path / "spynet.pth")).networks()["model"].module
    assert all(torch.equal(value, network.get_submodule("spynet").state_dict()[name]) for name, value in trained.items())
    with pytest.raises(ConfigError, match=r"^--spynet \S+missing.pth: no such file"):
        config("motion", "--spynet", str(tmp_path / "missing.pth"))
    with pytest.raises(ConfigError, match="give one of them"):
        config("motion", "--spynet", str(tmp_path / "spynet.pth"), "--init-from", "x")


def saved(path: Path, state: dict[str, torch.Tensor], **tables: torch.Tensor) -> str:
    """An official checkpoint, whose last weights are worth nothing."""
    average = state | tables
    spoilt = {name: value + 1 for name, value in average.items()}
    torch.save({"iters": 1, "state_dict": spoilt, "ema_state_dict": average, "optimizer": {}}, path)
    return str(path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_starts_from_a_trained_generator(stage: str, tmp_path: Path) -> None:
    """Of an export, and of the release's checkpoint, whose heads the tensors do not tell."""
    made = task(stage)
    network = module(made)
    run = vidm_exports.export_network(tmp_path / "run", network, stage)
    flow = ["--spynet-input", "minus_one_one"] if stage == "motion" else []
    like = task(stage, *flow).denoiser.config
    released = export_content(network.state_dict()) if stage == "content" else export_motion(network.state_dict(), like)
    starts = {str(run): [], saved(tmp_path / "official.pt", released): flow}
    for start, argv in starts.items():
        again = task(stage, "--init-from", start, *argv).networks()["model"].module.state_dict()
        assert all(torch.equal(again[name], value) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match=r"its num_res_blocks is 1, that of the run 2$"):
        task(stage, "--init-from", str(run), "--model.num_res_blocks", "2").networks()


def test_the_frame_indices_of_a_start_must_be_those_of_the_run(tmp_path: Path) -> None:
    """Another V changes the speed of all motion without any error: the release generates with half of what it trained with."""
    made = task("motion", "--spynet-input", "minus_one_one")
    network = module(made)
    run = vidm_exports.export_network(tmp_path / "run", network, "motion")
    table = {"module.unet.input_blocks.1.0.emb_layers.new_coords": torch.zeros(1000, N, 1, 1, 2)}
    released = saved(tmp_path / "official.pt", export_motion(network.state_dict(), made.denoiser.config), **table)
    for start in (str(run), released):
        task("motion", "--spynet-input", "minus_one_one", "--init-from", start).networks()
        with pytest.raises(UserError, match=r"video_timesteps|video-timesteps") as error:
            task("motion", "--spynet-input", "minus_one_one", "--init-from", start, "--video-timesteps", "12").networks()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"its flow_input is minus_one_one, that of the run zero_one$"):
        task("motion", "--init-from", released).networks()


def test_content_starts_from_an_image_model(tmp_path: Path) -> None:
    """One of guided-diffusion's layout: it computes the same at first, whatever the constant."""
    made = task("content")
    network = module(made)
    official = {name.removeprefix("module."): value for name, value in export_content(network.state_dict()).items()}
    first = official["input_blocks.0.0.weight"]
    plain = {name.replace("dt_embed", "time_embed"): value for name, value in official.items() if name != "input.input"}
    plain["input_blocks.0.0.weight"] = first[:, :3].clone()
    torch.save(plain, tmp_path / "image.pt")
    started = task("content", "--init-from", str(tmp_path / "image.pt")).networks()["model"].module
    state = started.state_dict()
    blind = {**network.state_dict(), "constant": torch.zeros_like(state["constant"])}
    network.load_state_dict(blind)
    x, t = torch.randn(2, 3, *SIZE), torch.tensor([5, 900])
    assert torch.allclose(started(x, t), network(x, t), atol=1e-5) and state["constant"].std() > 0.5


@pytest.mark.parametrize(
    ("stage", "argv", "message"),
    [
        ("motion", ["--video-timesteps", "3", "--n-frames", "6"], r"--video-timesteps 3: at least --n-frames 6"),
        ("motion", ["--preview.frames", "-1"], r"preview.frames -1"),
        ("motion", ["--preview.frames", "1"], r"preview.frames 1: 2 or more, or 0 for no videos"),
        ("motion", ["--preview.steps", "0"], r"preview.steps 0: between 1 and"),
        ("motion", ["--process", "flow", "--loss-weighting", "none"], r"diffusion.process flow: .*use ddpm$"),
        ("motion", ["--model", "VIDM-content"], r"VIDM-content is of the other stage; this one trains VIDM-motion$"),
        ("content", ["--model", "VIDM-contend"], r"the nearest is 'VIDM-content'"),
        ("content", ["--model.model_channels", "20"], r"^model: .*32"),
        ("content", ["--video-timesteps", "3"], r"unknown flag '--video-timesteps'"),
    ],
)
def test_mistakes_are_one_line(stage: str, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(stage, *argv)
    assert "\n" not in str(error.value)


def test_a_video_cannot_be_longer_than_the_indices() -> None:
    with pytest.raises(ConfigError, match=r"^--video-timesteps 5: clips have 6 frames"):
        task("motion", "--video-timesteps", "5")
    motion, given = task("motion", "--preview.frames", "70"), batch("motion")
    assert motion.preview({"model": Recorder()}, given, noise_of(motion, given))["video"].shape[2] == N
