"""Features that are kept: the same figures to the last bit on any number of processes, after a kill, from damaged and stale files."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.clips import other_clips
from evaluation.quality import measure_fvd, measure_vis, sides
from evaluation.settings import FvdConfig, VisConfig
from evaluation.store import FeatureStore, cache_folder
from evaluation.versions import SOURCES, package_versions, source_sha256
from evaluation.videos import FolderVideos, open_videos
from launch.env import Env
from tests import distributed
from tests.scripted_detectors import ToyC3D, ToyI3D, save_script, write_arrays
from tests.shard_sets import write_set
from utils.errors import UserError

ALONE = Env.single()
REAL, FAKE = 100, 70
"""Four blocks and three."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    write_arrays(folder / "real", [5 + number % 7 for number in range(REAL)])
    write_arrays(folder / "fake", [4] * FAKE, first=20)
    save_script(ToyI3D(), folder / "i3d.pt")
    save_script(ToyC3D(), folder / "c3d.pt")
    return folder


def config(place: Path, **how: Any) -> FvdConfig:
    names = {"dir1": str(place / "real"), "dir2": str(place / "fake"), "i3d": str(place / "i3d.pt")}
    return FvdConfig(**{**names, "n_frames": 4, "num_videos": 100, "batch_size": 5, **how})


def blocks_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("features/*/0*.safetensors"))


def test_a_second_run_reads_no_video(place: Path, tmp_path: Path, reads: list[int]) -> None:
    """Neither for the same figure nor for others of the same clips; the figures are equal to the last bit, also without a cache."""
    first = measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    assert len(reads) == REAL + FAKE and len(blocks_of(tmp_path)) == 4 + 3
    again = measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    more = measure_fvd(config(place, cache=str(tmp_path), bootstrap=3, fd_inf=True), ALONE)
    assert len(reads) == REAL + FAKE
    assert again == first and {name: more[name] for name in first if name != "protocol"} == {
        k: v for k, v in first.items() if k != "protocol"
    }
    assert more["fvd_low"] < more["fvd"] < more["fvd_high"] and set(more["fd_by_size"]) == {"18", "26", "35", "52", "70"}
    bare = measure_fvd(config(place, no_cache=True), ALONE)
    assert bare == first and len(reads) == 2 * (REAL + FAKE)
    about = json.loads((blocks_of(tmp_path)[0].parent / "about.json").read_text())
    assert about["network"]["sha256"] == first["protocol"]["detector"]["sha256"]


def test_a_block_is_read_once_up_to_the_first_that_is_missing(
    place: Path, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = FeatureStore.read
    monkeypatch.setattr(FeatureStore, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    kept = config(place, cache=str(tmp_path), bootstrap=2)
    first = measure_fvd(kept, ALONE)
    del read[:], reads[:]
    assert measure_fvd(kept, ALONE) == first and not reads
    assert read == [f"{number:05d}" for blocks in (4, 3) for number in range(blocks)]
    for block in blocks_of(tmp_path):
        if block.name in ("00002.safetensors", "00003.safetensors"):
            block.unlink()
    del read[:]
    assert measure_fvd(kept, ALONE) == first
    assert sorted(read) == sorted(f"{number:05d}" for blocks in (4, 3) for number in range(blocks)), "as an interruption leaves them"


def test_the_cache_is_found_by_name_or_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KINOFORM_CACHE", str(tmp_path / "a"))
    assert cache_folder("b") == Path("b") and cache_folder() == tmp_path / "a"
    monkeypatch.delenv("KINOFORM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kinoform"


def test_a_file_that_changes_is_measured_again(place: Path, tmp_path: Path, reads: list[int]) -> None:
    """Under its old name, size and time. A copy of the folder elsewhere is not."""
    shutil.copytree(place / "fake", tmp_path / "fake")
    cache = str(tmp_path / "cache")
    first = measure_fvd(config(place, dir2=str(tmp_path / "fake"), cache=cache), ALONE)
    shutil.copytree(tmp_path / "fake", tmp_path / "copy")
    del reads[:]
    assert measure_fvd(config(place, dir2=str(tmp_path / "copy"), cache=cache), ALONE)["fvd"] == first["fvd"] and not reads
    changed = tmp_path / "fake" / "007.npy"
    stamp = changed.stat()
    np.save(changed, 255 - np.load(changed))
    os.utime(changed, (stamp.st_atime, stamp.st_mtime))
    assert changed.stat().st_size == stamp.st_size
    found = measure_fvd(config(place, dir2=str(tmp_path / "fake"), cache=cache), ALONE)
    assert found["fvd"] != first["fvd"] and len(reads) == FAKE
    assert found["fvd"] == measure_fvd(config(place, dir2=str(tmp_path / "fake"), no_cache=True), ALONE)["fvd"]


def test_another_network_or_protocol_is_measured_again(place: Path, tmp_path: Path, reads: list[int]) -> None:
    measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    save_script(ToyC3D(), tmp_path / "i3d.pt")
    for how in ({"i3d": str(tmp_path / "i3d.pt")}, {"resolution": 6}, {"n_frames": 3}, {"seed": 1}):
        del reads[:]
        measure_fvd(config(place, cache=str(tmp_path), **how), ALONE)
        assert len(reads) == (REAL if "seed" in how else REAL + FAKE), how


def test_features_of_other_versions_are_measured_again(
    place: Path, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another decoder or resize may give other pixels of the same files."""
    how = config(place, cache=str(tmp_path), num_videos=8, noise_floor=False)
    measure_fvd(how, ALONE)
    assert len(reads) == 16
    monkeypatch.setattr("evaluation.features.package_versions", lambda: package_versions() | {"av": "0.0"})
    measure_fvd(how, ALONE)
    assert len(reads) == 32
    about = [json.loads(path.read_text())["versions"] for path in tmp_path.glob("features/*/about.json")]
    assert len(about) == 4 and all(set(one) == {"torch", "av", "pillow", "numpy", "scipy"} for one in about)


def test_another_source_is_another_key(tmp_path: Path) -> None:
    """By contents and place of each file."""
    for number, name in enumerate(SOURCES):
        path = tmp_path / name if name.endswith(".py") else tmp_path / name / "deep" / "a.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    found = [source_sha256(tmp_path)]
    for change in (lambda: (tmp_path / "models/deep/a.py").write_text("mended"), lambda: (tmp_path / "utils/rng.py").write_text("1")):
        source_sha256.cache_clear()
        change()
        found.append(source_sha256(tmp_path))
    (tmp_path / "losses/deep/a.py").rename(tmp_path / "losses/a.py")
    source_sha256.cache_clear()
    found.append(source_sha256(tmp_path))
    assert len(set(found)) == 4 and source_sha256() != found[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_computed_again(
    place: Path, tmp_path: Path, reads: list[int], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    for path in tmp_path.glob("features/*/moments-*"):
        path.unlink()
    block, other = blocks_of(tmp_path)[:2]
    data = block.read_bytes()
    middle = len(data) - 40
    damaged = {"cut": data[:-30], "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "empty": b""}
    block.write_bytes(damaged.get(damage, b"x" * 9))
    del reads[:]
    capsys.readouterr()
    assert measure_fvd(config(place, cache=str(tmp_path)), ALONE) == first and len(reads) in (32, 6)
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1 and str(block) in lines[0] and "computed again" in lines[0]
    assert block.read_bytes() == data and other.is_file()


def test_damaged_moments_are_summed_up_again(place: Path, tmp_path: Path, reads: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    first = measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    for path in tmp_path.glob("features/*/moments-*"):
        path.write_bytes(path.read_bytes()[:-1])
    del reads[:]
    assert measure_fvd(config(place, cache=str(tmp_path)), ALONE) == first and not reads
    assert capsys.readouterr().err.count("is damaged") == 2


def test_a_block_of_another_key_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [FeatureStore(tmp_path, {"clips": name}) for name in ("a", "b")]
    stores[0].write("00000", {"rows": torch.ones(2)})
    stores[1].write("00001", {"rows": torch.ones(2)})
    shutil.copy(stores[0].folder / "00000.safetensors", stores[1].folder)
    assert stores[0].read("00000") is not None and stores[1].read("00000") is None and "damaged" in capsys.readouterr().err
    assert stores[0].read("00001") is None


def test_a_cache_that_cannot_be_written_is_said_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    found = measure_fvd(config(place, cache=str(tmp_path / "file")), ALONE)
    assert capsys.readouterr().err.count("features are not kept") == 2  # of each side
    assert found == measure_fvd(config(place, no_cache=True), ALONE)


def test_a_block_that_is_removed_meanwhile_is_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One behind a gap: those before are read once."""
    measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    for block in blocks_of(tmp_path):
        if block.name == "00001.safetensors":
            block.unlink()
    plain, seen = FeatureStore.read, []

    def read(self: FeatureStore, name: str) -> Any:
        seen.append(name)
        return None if name.startswith("moments") or seen.count(name) > 1 else plain(self, name)

    monkeypatch.setattr(FeatureStore, "read", read)
    with pytest.raises(UserError, match="block 2 was removed while it was used; start the same command again"):
        measure_fvd(config(place, cache=str(tmp_path)), ALONE)


def killed_on_a_rank(env: Env, place: str, cache: str) -> None:
    """Is killed as soon as it has written three blocks."""
    plain, written = FeatureStore.write, []

    def write(self: FeatureStore, name: str, *rest: Any) -> None:
        plain(self, name, *rest)
        written.append(name)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    FeatureStore.write = write  # type: ignore[method-assign]
    measure_fvd(config(Path(place), cache=cache), env)


def test_a_killed_run_goes_on_where_it_was(place: Path, tmp_path: Path, reads: list[int]) -> None:
    """The real side comes first: three of its four blocks are there. On another number of processes."""
    with pytest.raises(AssertionError, match="-9"):
        distributed.run(killed_on_a_rank, place=str(place), cache=str(tmp_path))
    assert len(blocks_of(tmp_path)) == 3 and not list(tmp_path.rglob("*.tmp"))
    found = measure_fvd(config(place, cache=str(tmp_path)), ALONE)
    assert len(reads) == REAL - 3 * 32 + FAKE
    assert found == measure_fvd(config(place, no_cache=True), ALONE)


def on_a_rank(env: Env, place: str, cache: str) -> list[Any]:
    scores = VisConfig(dir2=f"{place}/fake", c3d=f"{place}/c3d.pt", n_frames=4, batch_size=5, cache=cache, bootstrap=2)
    few = measure_fvd(config(Path(place), cache=cache, num_videos=40), env)
    assert few["floor_videos"] == [40, 40] and few["noise_floor"] > 0
    return [few, measure_fvd(config(Path(place), cache=cache, bootstrap=2), env), measure_vis(scores, env)]


def test_any_number_of_processes_finds_the_same_bits(place: Path, tmp_path: Path) -> None:
    """Also where some of the blocks are there, which only rank 0 sees."""
    alone = json.loads(json.dumps(on_a_rank(ALONE, str(place), str(tmp_path / "a"))))
    for processes in (2, 3):
        cache = tmp_path / str(processes)
        for found in distributed.run(on_a_rank, processes=processes, place=str(place), cache=str(cache)):
            assert found == alone
        one, other = ([path.read_bytes() for path in blocks_of(folder)] for folder in (tmp_path / "a", cache))
        assert one == other
        for path in blocks_of(cache)[1::2]:
            path.unlink()
        if processes == 2:
            assert distributed.run(on_a_rank, place=str(place), cache=str(cache))[1] == alone


def beside_a_damaged_video(env: Env, place: str, real: str) -> Any:
    return measure_fvd(config(Path(place), dir1=real, num_videos=20, no_cache=True), env)


@pytest.mark.parametrize("damage", ["its header", "its pixels"])
def test_a_damaged_video_among_the_other_real_ones_costs_the_floor_alone(place: Path, tmp_path: Path, damage: str) -> None:
    """Whether it is found when they are chosen or when they are read, by whichever rank."""
    shutil.copytree(place / "real", tmp_path / "real")
    how = config(place, num_videos=20)
    real, fake = sides(how, ALONE, None)
    other = other_clips(real, ALONE, count=len(fake), frames=4, seed=0)
    assert other is not None
    bad = tmp_path / "real" / f"{other.numbers[7]:03d}.npy"
    bad.write_bytes(b"nothing")
    if damage == "its pixels":
        np.save(bad, np.full((8, 3, 8, 8), np.nan))
    whole = json.loads(json.dumps(measure_fvd(config(place, num_videos=20, no_cache=True), ALONE)))
    for processes in (1, 2):
        for found in distributed.run(beside_a_damaged_video, processes=processes, place=str(place), real=str(tmp_path / "real")):
            assert found["fvd"] == whole["fvd"] and "noise_floor" not in found and found["noise_floor_of_halves"] > 0
            notes = [note for note in found["notes"] if str(bad) in note]
            assert len(notes) == 1 and notes[0].startswith("no noise floor of other real videos: --dir1") and notes[0] not in whole["notes"]


def made_on_a_rank(env: Env, place: str, cache: str) -> Any:
    """The figure of videos that are made, and the numbers of those that this rank made."""
    numbers: list[int] = []

    class Made(FolderVideos):
        made = True

        def read(self, number: int, picks: Any) -> np.ndarray:
            if len(picks) > 1:  # one frame is read for the size
                numbers.append(number)
            return super().read(number, picks)

    found = measure_fvd(config(Path(place), dir2="", cache=cache), env, Made(Path(place) / "fake", "--run"))
    return [found, numbers]


def test_ranks_make_videos_together(place: Path, tmp_path: Path) -> None:
    """None waits for a block that others make, which takes hours: not in the last round, of fewer blocks than ranks, nor in full ones."""
    alone = json.loads(json.dumps(made_on_a_rank(ALONE, str(place), str(tmp_path / "a"))))
    assert alone[1] == list(range(FAKE))
    for processes in (2, 4):
        cache = tmp_path / str(processes)
        ranks = distributed.run(made_on_a_rank, processes=processes, place=str(place), cache=str(cache))
        assert [found for found, _ in ranks] == [alone[0]] * processes
        assert sorted(number for _, numbers in ranks for number in numbers) == alone[1]
        assert all(max(np.diff(numbers)) <= processes for _, numbers in ranks)
        assert max(len(numbers) for _, numbers in ranks) - min(len(numbers) for _, numbers in ranks) <= 1
        assert [path.read_bytes() for path in blocks_of(cache)] == [path.read_bytes() for path in blocks_of(tmp_path / "a")]


def test_the_batch_size_changes_rounding_alone(place: Path) -> None:
    found = [measure_fvd(config(place, no_cache=True, batch_size=size), ALONE)["fvd"] for size in (1, 7, 32, 64)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_videos_of_no_file_are_measured_and_not_kept(place: Path, tmp_path: Path) -> None:
    """In place of --dir2: what has no digest cannot be found again."""

    class Made(FolderVideos):
        def digest(self, number: int) -> None:  # type: ignore[override]
            return None

    made = Made(place / "fake", "--run")
    found = measure_fvd(config(place, dir2="", cache=str(tmp_path)), ALONE, made)
    assert found["fvd"] == measure_fvd(config(place, no_cache=True), ALONE)["fvd"] and len(blocks_of(tmp_path)) == 4
    assert found["protocol"]["generated"]["content_sha256"] is None and found["protocol"]["real"]["content_sha256"]


def test_digests_name_contents(place: Path, tmp_path: Path) -> None:
    """Of files their bytes, of shard sets the index and the sample."""
    shutil.copy(place / "fake" / "003.npy", tmp_path / "a.npy")
    one, other = open_videos(tmp_path, "--dir1"), open_videos(place / "fake", "--dir2")
    assert one.digest(0) == other.digest(3) != other.digest(4)
    write_set(tmp_path / "set", [3, 2])
    shards = open_videos(tmp_path / "set", "--dir1")
    assert len({shards.digest(number) for number in range(5)}) == 5
    assert str(shards.digest(0)).startswith(shards.identity()["dataset_digest"])
