"""VIDM's pipeline: nothing computed twice changes nothing, videos do not depend on their company, and which frame has which index."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from diffusion.samplers import ddpm_sample
from models.layers.spynet import SpyNet
from models.unets.positional import PosGN
from models.unets.vidm_motion import FrameEncoder
from pipelines.runs import find_family, systems_in
from pipelines.sampling import Sampling, respaced
from pipelines.vidm import Drawing, FrameOrder, VIDMPipeline, as_released, released_pixels
from pipelines.vidm_frame import FrameDenoiser
from tests.vidm_exports import CONTENT, DATA, MOTION, PROCESS, content_network, export_network, family, motion_network
from utils.errors import UserError
from utils.media import to_uint8
from utils.rng import SampleRng

STEPS = Sampling(steps=4, sampler="ddpm", clip=True, respacing="ddim4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def pipeline(runs: dict[str, Path]) -> VIDMPipeline:
    return VIDMPipeline.from_exports(runs["motion"], runs["content"])


def drawing(order: FrameOrder | None = None, **how: object) -> Drawing:
    return dataclasses.replace(Drawing(order or FrameOrder(), STEPS, STEPS, seed=3), **how)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *MOTION.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_video(pipeline: VIDMPipeline, number: int, n_frames: int, first: Tensor, release: bool = False) -> Tensor:
    """A video 3 t h w by the whole forward pass at every step, written down from the formulas of the spec (section 9)."""
    process, rng = respaced(PROCESS, "ddim4"), SampleRng(3, torch.tensor([number]))
    shape, last = (3, *MOTION.image_size), first[None]
    frames = [] if release else [last]
    for position in range(0 if release else 1, n_frames):
        previous, index = last, torch.tensor([position])

        def model(x: Tensor, t: Tensor, previous: Tensor = previous, index: Tensor = index) -> Tensor:
            return pipeline.network(x, t, index, previous, first[None])

        def noise(k: int, position: int = position) -> Tensor:
            return rng.normal(f"motion/frame-{position}/step-{k}", shape)

        last = ddpm_sample(process, model, rng.normal(f"motion/frame-{position}/start", shape), noise=noise, clip_denoised=True)
        frames.append(last)
    return torch.stack(frames, dim=2)[0]


@pytest.mark.parametrize("exact", [True, False])
def test_frames_are_those_of_the_whole_forward_pass(pipeline: VIDMPipeline, exact: bool) -> None:
    first = pictures(3)
    made = pipeline.generate([0, 1, 5], 4, drawing=drawing(exact=exact), first=first)
    plain = torch.stack([plain_video(pipeline, number, 4, first[row]) for row, number in enumerate([0, 1, 5])])
    assert made.shape == (3, 3, 4, *MOTION.image_size) and made.std() > 0.1
    if exact:
        assert torch.equal(made, plain)  # to the last bit
    else:
        assert (made - plain).abs().max() < 5e-4  # rounding, grown over the frames


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_what_frames_share_is_computed_once(pipeline: VIDMPipeline, exact: bool, alike: bool) -> None:
    """Flow: once a frame. Maps: once a step and frame for all videos. First-frame features: once where the picture is the same."""
    first = pictures(1).repeat(3, 1, 1, 1) if alike else pictures(3)
    calls = {SpyNet: 0, PosGN: 0, FrameEncoder: 0}
    with _counted(calls):
        made = pipeline.generate([0, 1, 2], 3, drawing=drawing(exact=exact), first=first)
    videos, frames, steps = 3 if exact else 1, 2, 4
    modules = sum(isinstance(module, PosGN) for module in pipeline.network.modules())
    assert modules == 13 and calls[PosGN] == modules * frames * steps
    assert calls[SpyNet] == videos * frames and calls[FrameEncoder] == frames * steps * (1 if alike else videos)
    alone = pipeline.generate([2], 3, drawing=drawing(), first=first[2:])
    assert torch.equal(made[2:], alone) if exact else torch.allclose(made[2:], alone, atol=5e-4)


@contextmanager
def _counted(calls: dict[type[nn.Module], int]) -> Iterator[None]:
    """How often the parts of the network work: PosGN by its MLP."""

    def counting(kind: type[nn.Module], plain: Callable[..., object]) -> Callable[..., object]:
        def call(module: nn.Module, *given: object) -> object:
            calls[kind] += 1
            return plain(module, *given)

        return call

    with ExitStack() as stack:
        for kind in calls:
            name = "maps" if kind is PosGN else "forward"
            stack.enter_context(mock.patch.object(kind, name, counting(kind, getattr(kind, name))))
        yield


def test_features_of_the_first_frame_differ_between_steps_and_frames(pipeline: VIDMPipeline) -> None:
    """Why they are not kept for the next step or frame."""
    net, first = pipeline.network, pictures(1)

    def last(t: int, frame: int) -> Tensor:
        return net.encode(first, net.maps(torch.tensor([t]), torch.tensor([frame]), MOTION.image_size))[-1]

    assert not torch.allclose(last(3, 1), last(4, 1), atol=1e-3) and not torch.allclose(last(3, 1), last(3, 2), atol=1e-3)


def test_the_denoiser_of_a_frame_is_the_forward_pass(pipeline: VIDMPipeline) -> None:
    x, first, previous = (pictures(2, seed) for seed in range(3))
    denoiser = FrameDenoiser(pipeline.network, 4, first, previous)
    for t in (19, 7, 0):
        steps = torch.full((2,), t)
        plain = pipeline.network(x, steps, torch.full((2,), 4), previous, first)
        assert (denoiser(x, steps) - plain).abs().max() < 1e-5 * plain.abs().max()


def test_a_video_does_not_depend_on_its_company(pipeline: VIDMPipeline) -> None:
    how = drawing()
    together = pipeline.generate([4, 0, 7], 4, drawing=how)
    assert torch.equal(together[2:], pipeline.generate([7], 4, drawing=how))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, pipeline.generate([4, 0, 7], 4, drawing=drawing(seed=4)))


def test_frame_0_is_the_content_and_the_last_index_is_used(pipeline: VIDMPipeline) -> None:
    """The released script draws a frame 0, which no training saw, and leaves the content out."""
    first, how = pictures(1), drawing()
    asked: list[int] = []
    maps = pipeline.network.maps
    with mock.patch.object(pipeline.network, "maps", lambda t, frame, size: (asked.append(int(frame)), maps(t, frame, size))[1]):
        video = pipeline.generate([0], drawing=how, first=first)
    assert torch.equal(video[:, :, 0], first) and video.shape[2] == 6
    assert asked == [index for index in range(1, 6) for _ in range(4)]
    released = drawing(FrameOrder(release=True))
    video = pipeline.generate([0], 3, drawing=released, first=first)
    assert torch.equal(video[0], plain_video(pipeline, 0, 3, first[0], release=True)) and not torch.equal(video[:, :, 0], first)


def test_indices_and_first_frames_of_long_videos() -> None:
    order = FrameOrder(4)
    assert [order.index(position) for position in range(1, 9)] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [position for position in range(1, 9) if order.begins(position)] == [4, 7]
    assert [FrameOrder().index(position) for position in (1, 900)] == [1, 900] and not FrameOrder().begins(900)
    order = FrameOrder(4, release=True)
    assert [order.index(position) for position in range(4)] == [0, 1, 2, 3] and not any(map(order.begins, range(4)))


def test_a_long_video_goes_on_from_its_last_frame_as_from_the_first(pipeline: VIDMPipeline) -> None:
    first, how = pictures(1), drawing(FrameOrder(6))
    video = pipeline.generate([0], 8, drawing=how, first=first)
    again = pipeline.next_frames([0], video[:, :, 5], video[:, :, 5], 6, how)  # index 1
    then = pipeline.next_frames([0], video[:, :, 5], again, 7, how)
    assert torch.equal(video[:, :, 6], again) and torch.equal(video[:, :, 7], then)
    assert torch.equal(video[:, :, :6], pipeline.generate([0], 6, drawing=how, first=first))


def test_frames_come_one_by_one(pipeline: VIDMPipeline) -> None:
    made: Iterator[Tensor] = pipeline.frames([0], 10**9, drawing(), pictures(1))
    assert next(made).shape == next(made).shape == (1, 3, *MOTION.image_size)


def test_pixels_of_the_release_are_cut_off() -> None:
    frames = torch.linspace(-1, 1, 1001)
    pixels = released_pixels(frames)
    assert torch.equal(pixels, (255 * (frames / 2 + 0.5)).to(torch.uint8)) and not torch.equal(pixels, to_uint8(frames))
    assert torch.equal(to_uint8(as_released(frames)), pixels)


def test_bf16_is_near_fp32(pipeline: VIDMPipeline, runs: dict[str, Path]) -> None:
    half = VIDMPipeline.from_exports(runs["motion"], runs["content"], precision="bf16")
    made, plain = (part.generate([0], 2, drawing=drawing()) for part in (half, pipeline))
    assert 0 < (made - plain).abs().mean() < 0.05


def test_networks_are_found_in_results(runs: dict[str, Path], tmp_path: Path) -> None:
    results = runs["motion"].parent
    assert systems_in(results) == ["vidm"] and find_family(results, "vidm") == runs
    alone = export_network(tmp_path / "000-vidm-motion", motion_network(), "motion")
    assert find_family(tmp_path, "vidm", without=["content"]) == {"motion": alone}
    with pytest.raises(UserError, match=r"no finished content run in it .* give --motion, --content"):
        find_family(tmp_path, "vidm")


def test_generators_of_different_sizes_do_not_go_together(runs: dict[str, Path], tmp_path: Path) -> None:
    other = export_network(tmp_path / "c", content_network(dataclasses.replace(CONTENT, image_size=(8, 8))), "content")
    with pytest.raises(UserError, match="make frames of 8x8 and 8x12"):
        VIDMPipeline.from_exports(runs["motion"], other)
    with pytest.raises(UserError, match="an export of 'vidm content', a 'vidm motion' is wanted"):
        VIDMPipeline.from_exports(runs["content"], runs["content"])
    told = export_network(tmp_path / "t", content_network(dataclasses.replace(CONTENT, num_classes=2)), "content")
    with pytest.raises(UserError, match="knows 2 classes, and nothing tells it which"):
        VIDMPipeline.from_exports(runs["motion"], told)
    alone = VIDMPipeline.from_exports(runs["motion"])
    with pytest.raises(UserError, match="first frames need a content generator"):
        alone.generate([0], 2, drawing=drawing())


def test_frame_indices_are_those_of_training(runs: dict[str, Path], tmp_path: Path) -> None:
    """The released generator was built with V = 64 for weights of V = 128, and moved at twice the speed without any error."""
    with pytest.raises(UserError, match=r"--video-timesteps 3: .* was trained with 6 frame indices"):
        VIDMPipeline.from_exports(runs["motion"], video_timesteps=3)
    pipeline = VIDMPipeline.from_exports(runs["motion"], video_timesteps=6)
    assert pipeline.video_timesteps == 6 and pipeline.fps == 10
    with pytest.raises(UserError, match=r"frame index 6: .* has 6 of them"):
        pipeline.next_frames([0], pictures(1), pictures(1), 6, drawing())
    short = export_network(tmp_path / "m", motion_network(), "motion", data=DATA | {"n_frames": 4, "frame_interval": 2})
    pipeline = VIDMPipeline.from_exports(short)
    assert pipeline.n_frames == 4 and pipeline.fps == 5  # indices 4 and 5 were never trained
