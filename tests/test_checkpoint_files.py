"""Which checkpoint folders count, which are found damaged, which are deleted; without processes or tensors."""

from pathlib import Path

import pytest

from engine import manifest
from utils.files import atomic_path


def make(run: Path, step: int) -> Path:
    temporary = run / "checkpoints" / f".{manifest.checkpoint_name(step)}.tmp"
    temporary.mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(bytes(range(256)) * 4)
    (temporary / ".metadata").write_bytes(b"names")
    files = manifest.digest_files(temporary, ["__0_0.distcp", ".metadata"])
    return manifest.commit(temporary, {"step": step, "files": files})


def steps(run: Path) -> list[int]:
    return [manifest.step_of(place) for place in manifest.committed(run)]


def test_flipped_byte_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5)
    assert manifest.find_damage(checkpoint) is None
    data = checkpoint / "__0_0.distcp"
    good = data.read_bytes()
    data.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert f"{data} is damaged" in str(manifest.find_damage(checkpoint))
    data.write_bytes(good[:-1])
    assert f"{data} has 1023 bytes, 1024 were written" in str(manifest.find_damage(checkpoint))
    data.unlink()
    assert f"{data} is missing" in str(manifest.find_damage(checkpoint))
    data.write_bytes(good)
    assert manifest.find_damage(checkpoint) is None
    whole = (checkpoint / "manifest.json").read_text()
    for text in ("", "[]", "{}", '{"files": {"a": 1}}', whole.replace('"step": 5', '"step": 7')):
        (checkpoint / "manifest.json").write_text(text)
        assert "manifest.json is missing or damaged" in str(manifest.find_damage(checkpoint))
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json" in str(manifest.find_damage(checkpoint))


def test_pruning_keeps_the_newest_and_the_one_just_written(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    manifest.prune(tmp_path, 0, tmp_path / "checkpoints/step_0000020")
    assert steps(tmp_path) == [5, 10, 15, 20]
    manifest.prune(tmp_path, 3, tmp_path / "checkpoints/step_0000020")
    assert steps(tmp_path) == [10, 15, 20]
    # A run that was resumed from step 10 by hand writes step 12.
    manifest.prune(tmp_path, 1, make(tmp_path, 12))
    assert steps(tmp_path) == [12]


def test_leftovers_are_removed_and_an_interrupted_replacement_undone(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5)
    places = tmp_path / "checkpoints"
    (places / ".step_0000010.tmp").mkdir()
    checkpoint.rename(places / ".step_0000005.old")
    (places / "notes").mkdir()
    manifest.remove_stale(tmp_path)
    assert sorted(place.name for place in places.iterdir()) == ["notes", "step_0000005"]
    assert manifest.latest(tmp_path) == checkpoint


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5)
    (checkpoint / "__0_0.distcp").write_bytes(b"damaged")
    assert make(tmp_path, 5) == checkpoint
    assert manifest.find_damage(checkpoint) is None
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step_0000005"]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [place.read_text() for place in target.parent.iterdir()] == ["old"]
