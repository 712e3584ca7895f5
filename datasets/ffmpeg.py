"""The ffmpeg program of this machine."""

import shutil
import subprocess
from functools import cache


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
