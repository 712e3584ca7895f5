"""Features of frames: FID's Inception from either of its files, EfficientNet-Lite0, and CLIP from a local folder."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metrics import inception
from metrics.frame_features import FrameFeatures, open_inception
from tests.scripted_detectors import Colours, save_script
from tests.tiny_clip import MAX_TOKENS, write_clip
from utils.errors import UserError

VIDEOS = torch.randint(0, 256, (2, 3, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """Knows classes only."""

    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean(dim=(2, 3))


def rows_of(answer: object) -> FrameFeatures:
    return FrameFeatures(lambda frames: answer(frames.float()), {"file": "net.pt"})  # type: ignore[operator]


def test_every_frame_has_a_row_in_the_order_of_the_videos() -> None:
    found = rows_of(lambda frames: frames.mean(dim=(2, 3)))(VIDEOS)
    torch.testing.assert_close(found, torch.stack([video[:, t].float().mean(dim=(1, 2)) for video in VIDEOS for t in range(3)]))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda frames: frames.mean(dim=(2, 3)) * float("nan"), "net.pt gives numbers that are not finite"),
        (lambda frames: frames, r"net.pt gives \[6, 3, 20, 30\] for 6 frames: one row for each"),
        (lambda frames: frames.reshape(7), "net.pt cannot take frames of 20 x 30: shape"),
    ],
)
def test_networks_that_give_no_rows_are_told_in_one_line(answer: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        rows_of(answer)(VIDEOS)
    assert "\n" not in str(error.value)


def test_convolutions_are_exact_and_repeat() -> None:
    """As those of videos: torch's default on a GPU is TF32, and whichever algorithm is fastest."""
    seen = []

    def answer(frames: Tensor) -> Tensor:
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return frames.mean(dim=(2, 3))

    rows_of(answer)(VIDEOS)
    assert seen == [(True, False)]


# ---- Inception


def test_inception_is_weights_or_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = save_script(Colours(), tmp_path / "inception-2015-12-05.pt")
    found = open_inception(str(script))
    torch.testing.assert_close(found(VIDEOS), VIDEOS.float().mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1))
    assert found.identity()["options"] == {"return_features": True} and found.identity()["kind"] == "torchscript"
    torch.manual_seed(0)
    net = inception.FidInception()
    torch.save({name: value for name, value in net.state_dict().items() if "tracked" not in name}, tmp_path / "own.pth")
    found = open_inception(str(tmp_path / "own.pth"))
    frames = VIDEOS[:1, :, :1]
    with torch.no_grad():
        torch.testing.assert_close(found(frames), net(inception.preprocess(frames[:, :, 0])))
    about = found.identity()
    assert about["sha256"] == hashlib.sha256((tmp_path / "own.pth").read_bytes()).hexdigest() and "299 x 299" in about["resize"]
    with pytest.raises(UserError, match="does not know return_features"):
        open_inception(str(save_script(Classifier(), tmp_path / "other.pt")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"{inception.FILE.name} \(91 MB\) is not there: put it at .* --inception FILE"):
        open_inception()


# ---- CLIP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-optional.txt)")
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_clip_gives_the_vectors_of_its_model(folder: Path) -> None:
    """Those that the whole model compares, of length one; texts beyond its length lose their end, which is counted."""
    from transformers import CLIPImageProcessor, CLIPModel

    from metrics.clip_similarity import Clip

    clip, texts = Clip(folder), ["cat", "dogs and cats that go on and on"]
    assert clip.identity()["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    pictures, (words, cut) = clip.frames(VIDEOS), clip.texts(texts)
    assert pictures.shape == (6, 8) and words.shape == (2, 8) and cut == 1
    torch.testing.assert_close(clip.texts(texts[:1])[0], words[:1])
    frames = CLIPImageProcessor.from_pretrained(folder)(list(VIDEOS.transpose(1, 2).flatten(0, 1)), return_tensors="pt")["pixel_values"]
    assert frames.shape[2:] == (16, 16)
    ids = torch.full((2, MAX_TOKENS), 53)
    ids[0, :5] = torch.tensor([52, 2, 0, 26 + 19, 53])
    ids[1, :-1] = torch.tensor([52, 3, 14, 6, 26 + 18, 0, 13, 26 + 3, 2, 0, 19])
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(folder).eval()(input_ids=ids, pixel_values=frames)
    torch.testing.assert_close(pictures, whole.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(words, whole.text_embeds, rtol=1e-4, atol=1e-5)


def test_another_way_to_see_pictures_is_another_network(folder: Path, tmp_path: Path) -> None:
    """Features that were kept are not taken for those of other settings."""
    from metrics.clip_similarity import Clip

    shutil.copytree(folder, tmp_path / "other")
    place = tmp_path / "other" / "preprocessor_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    one, other = (Clip(path).identity() for path in (folder, tmp_path / "other"))
    assert one["sha256"] == other["sha256"] and one["settings_sha256"] != other["settings_sha256"]


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json vocab.json"])
def test_a_folder_that_lacks_a_part_is_told_in_one_line(folder: Path, tmp_path: Path, gone: str) -> None:
    from metrics.clip_similarity import Clip

    shutil.copytree(folder, tmp_path / "part")
    for name in gone.split():
        (tmp_path / "part" / name).unlink()
    with pytest.raises(UserError, match=gone.split()[0]) as error:
        Clip(tmp_path / "part")
    assert "\n" not in str(error.value)


def test_without_transformers_the_way_out_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metrics.clip_similarity import Clip

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install transformers"):
        Clip(folder)


def test_weights_of_another_network_are_no_clip(folder: Path, tmp_path: Path) -> None:
    """Random numbers would take the place of what is missing."""
    from safetensors.torch import load_file, save_file

    from metrics.clip_similarity import Clip

    shutil.copytree(folder, tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "projection" not in name},
        tmp_path / "part" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="is not a CLIP: its weights lack text_projection"):
        Clip(tmp_path / "part")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from metrics.clip_similarity import Clip

    shutil.copytree(folder, tmp_path / "part")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "part" / "pytorch_model.bin")
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is not in it"):
        Clip(tmp_path / "part")
