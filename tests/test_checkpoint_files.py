"""Which checkpoint folders count, which are found damaged, which are deleted; without processes or tensors."""

from pathlib import Path

import pytest

from engine import manifest
from engine.config import CheckpointConfig, RunConfig
from utils.errors import ConfigError
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


def test_checkpoints_of_some_steps_are_never_pruned(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        manifest.prune(tmp_path, 2, make(tmp_path, step), keep_every=15)
    assert steps(tmp_path) == [15, 30, 35, 40]
    with pytest.raises(ConfigError, match=r"--keep-every 15: checkpoints are written every 10 steps"):
        RunConfig(checkpoint=CheckpointConfig(every=10, keep_every=15)).validate()
    for every, kept in ((10, 100), (100, 10), (0, 7), (10, 0)):
        RunConfig(checkpoint=CheckpointConfig(every=every, keep_every=kept)).validate()


def test_what_was_set_aside_goes_with_the_checkpoints_of_its_age(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    manifest.set_aside(tmp_path / "checkpoints/step_0000005", "damaged")
    manifest.abandon_newer(tmp_path, 10)
    manifest.prune(tmp_path, 2, make(tmp_path, 12))
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == [
        "step_0000010", "step_0000012", "step_0000015.abandoned", "step_0000020.abandoned",
    ]  # fmt: skip
    make(tmp_path, 18)
    manifest.prune(tmp_path, 2, make(tmp_path, 22))
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir())[:2] == ["step_0000018", "step_0000020.abandoned"]


def test_half_written_files_of_a_killed_run_are_deleted_and_no_others(tmp_path: Path) -> None:
    kept = ["config.yaml", "export/model.safetensors", "samples/.hidden", ".step.tmp", "checkpoints/.a.00000000.tmp"]
    stale = [".config.yaml.0123abcd.tmp", "export/.model.safetensors.00000000.tmp", "samples/.a.gif.ffffffff.tmp"]
    for name in kept + stale:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    manifest.remove_leftovers(tmp_path)
    assert [name for name in kept + stale if (tmp_path / name).exists()] == kept


def test_leftovers_are_removed_and_an_interrupted_replacement_undone(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5)
    places = tmp_path / "checkpoints"
    (places / ".step_0000010.tmp").mkdir()
    checkpoint.rename(places / ".step_0000005.old")
    (places / "notes").mkdir()
    manifest.remove_leftovers(tmp_path)
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
