"""datasets.prepare.duplicates: the same film is found again, another is not, and no near hash is overlooked."""

import numpy as np
import pytest

from datasets.prepare import duplicates
from datasets.prepare.duplicates import Duplicates, fingerprint
from datasets.transforms import resize_clip
from tests.videos import noise_frames


def distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def film(seed: int, count: int = 16) -> np.ndarray:
    """Smooth random pictures that drift: blobs of all sizes, as in filmed scenes."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (1, 6, 8, 3)).astype(np.float32)
    whole = resize_clip(coarse, (80, 96), "stretch", antialias=False)[0]
    return np.stack([whole[t // 2 : 64 + t // 2, t : 64 + t] for t in range(count)]).astype(np.uint8)


def test_the_same_film_is_near_and_another_is_far() -> None:
    clips = [film(seed) for seed in range(12)]
    prints = [fingerprint(clip) for clip in clips]
    assert all(len(text) == 64 for text in prints)
    rng = np.random.default_rng(0)
    for clip, text in zip(clips, prints, strict=True):
        noisy = np.clip(clip * 0.9 + 10 + rng.normal(0, 3, clip.shape), 0, 255).astype(np.uint8)
        assert distance(fingerprint(resize_clip(noisy, (48, 48), "stretch")), text) <= 16
    assert min(distance(a, b) for i, a in enumerate(prints) for b in prints[:i]) > 48


def test_flat_frames_match_nothing() -> None:
    black = np.zeros((16, 32, 32, 3), np.uint8)
    assert fingerprint(black) == "" == fingerprint(black + 200)
    index = Duplicates(8)
    index.add("", "black")
    assert index.find("") is None and not index.names
    fade = film(0)
    fade[:4] = 0
    assert fingerprint(fade) != ""


def test_a_single_frame_has_a_fingerprint() -> None:
    assert len(fingerprint(noise_frames(1))) == 64


@pytest.mark.parametrize("limit", [0, 7, 15, 16, 40])
def test_every_hash_within_the_distance_is_found(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "TAIL", 50)
    rng = np.random.default_rng(limit)
    bits = rng.integers(0, 2, (600, 256), dtype=np.uint8)
    texts = [np.packbits(row).tobytes().hex() for row in bits]
    index = Duplicates(limit)
    for number, text in enumerate(texts):
        index.add(text, f"clip{number:03d}")
    for number in range(0, 600, 7):
        for flips in {0, limit, limit + 1}:
            near = bits[number].copy()
            near[rng.choice(256, flips, replace=False)] ^= 1
            text = np.packbits(near).tobytes().hex()
            expected = [i for i, other in enumerate(texts) if distance(text, other) <= limit]
            assert index.find(text) == (f"clip{expected[0]:03d}" if expected else None)


def test_the_first_of_several_is_named() -> None:
    index = Duplicates(2)
    for name in ("a", "b"):
        index.add("0f" * 32, name)
    assert index.find("0f" * 32) == "a"
    assert index.find("f0" * 32) is None
