"""Versions of what figures depend on: packages, and the source of what makes and compares videos."""

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

SOURCES = ("models", "diffusion", "pipelines", "losses", "metrics", "utils/media.py", "utils/rng.py")
"""What computes the pixels that our networks make, and the figures of frames."""
_ROOT = Path(__file__).resolve().parent.parent
_NETWORKS = ("lpips", "timm", "diffusers", "transformers")
"""Packages that networks come from; not all of them have to be there."""


def package_versions() -> dict[str, str]:
    """Of those that read videos and pictures and compute features: features of other versions may differ in their last bits."""
    return {name: version(name) for name in ("torch", "av", "pillow", "numpy", "scipy")}


def network_versions() -> dict[str, str]:
    """Of those that networks come from, where they are installed."""
    found = {}
    for name in _NETWORKS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """Of all that a figure may depend on."""
    return {"python": python_version(), **package_versions(), **network_versions()}


def made_by() -> dict[str, str]:
    """All that what our networks make, and what is measured beside it, depends on but their weights and settings."""
    return {**package_versions(), **network_versions(), "source_sha256": source_sha256()}


@functools.cache
def source_sha256(root: Path = _ROOT) -> str:
    """SHA-256 of the contents of `SOURCES`: another decoder is another key, and no old number is shown for it."""
    places = [root / name for name in SOURCES]
    files = sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))
    contents = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashlib.sha256(repr(contents).encode()).hexdigest()
