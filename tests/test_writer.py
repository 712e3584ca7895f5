"""datasets.prepare.writer: shards are the tars that tarfile writes, byte for byte."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datasets.prepare.tars import BLOCK
from datasets.prepare.writer import Sample, ShardWriter, npy_bytes
from datasets.shards import sidecar_name

SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, tarfile.RECORDSIZE - 3 * BLOCK, 100_000)
"""Bytes of a clip: around the edges of blocks and of the record that a tar ends with."""


def write(folder: Path, samples: list[Sample]) -> bytes:
    writer = ShardWriter(folder, "shard-00000.tar")
    for sample in samples:
        writer.add(sample)
    writer.close({})
    return writer.path.read_bytes()


def written_by_tarfile(samples: list[Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, payload in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode = len(payload), 0o644
                tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


@pytest.mark.parametrize("key", ["clip", "f" * 60 + "/" + "k" * 80])
@pytest.mark.parametrize("size", SIZES)
def test_a_shard_is_what_tarfile_writes(tmp_path: Path, key: str, size: int) -> None:
    payload = np.random.default_rng(size).bytes(size)
    samples = [Sample(f"{key}{number}", {"npy": payload[number:], "json": b"{}"}, 1, 0, "") for number in range(3)]
    found = write(tmp_path, samples)
    assert found == written_by_tarfile(samples)
    table = json.loads((tmp_path / sidecar_name("shard-00000.tar")).read_bytes())
    clips = [found[offset : offset + nbytes] for offset, nbytes in zip(table["offset"], table["nbytes"], strict=True)]
    assert clips == [payload, payload[1:], payload[2:]]


def test_an_empty_shard_is_what_tarfile_writes(tmp_path: Path) -> None:
    assert write(tmp_path, []) == written_by_tarfile([])


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (16, 9, 7, 3), (4, 8, 8, 3)])
def test_npy_bytes_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for same in (frames, frames[::-1], frames[:, :, ::-1]):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(same), version=(1, 0))
        assert npy_bytes(same) == buffer.getvalue()
