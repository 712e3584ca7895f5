"""Versions of the packages that figures depend on."""

from importlib.metadata import version
from platform import python_version


def package_versions() -> dict[str, str]:
    """Of those that read videos and pictures and compute features: features of other versions may differ in their last bits."""
    return {name: version(name) for name in ("torch", "av", "pillow")}


def versions() -> dict[str, str]:
    """Of all that a figure may depend on."""
    return {"python": python_version(), **package_versions(), "numpy": version("numpy")}
