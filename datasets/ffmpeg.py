"""The ffmpeg program of this machine, and reading what it writes."""

import select
import shutil
import subprocess
from functools import cache
from typing import IO

PATIENCE = 600.0
"""Seconds without a byte after which decoding is given up."""


@cache
def ffmpeg_program() -> str | None:
    """The ffmpeg binary: of the PATH, else the one that the package imageio-ffmpeg brings; None without either."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None


@cache
def passthrough(program: str) -> tuple[str, str]:
    """The option that keeps ffmpeg from repeating or dropping frames: -vsync is gone from new versions, -fps_mode missing in old ones."""
    text = subprocess.run([program, "-hide_banner", "-h", "long"], capture_output=True, text=True, timeout=60, check=False).stdout
    return ("fps_mode", "passthrough") if "fps_mode" in text else ("vsync", "0")


def read_frame(pipe: IO[bytes], size: int) -> bytearray:
    """The next `size` bytes of an unbuffered pipe, fewer at its end. TimeoutError when nothing comes for PATIENCE seconds."""
    data, filled = bytearray(size), 0
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while filled < size:
        if not poll.poll(PATIENCE * 1000):
            raise TimeoutError(f"ffmpeg gave nothing for {PATIENCE:g} seconds")
        read = pipe.readinto(memoryview(data)[filled:])  # type: ignore[attr-defined]
        if not read:
            break
        filled += read
    return data if filled == size else data[:filled]
