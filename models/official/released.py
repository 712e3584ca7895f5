"""What is known of the released networks beside their tensors: plain values for the cards of imported ones."""

from typing import Any

from models.official.latte import Release
from models.transformers.latte import LatteConfig

SD_SCALE = 0.18215
"""Factor of Stable Diffusion's latents: about 1 / their standard deviation."""
RELEASED_CLIPS: dict[str, Any] = {
    "diffusion": {"schedule": "quad", "variance": "fixed_small"},
    "latent": {"scale": 1.0, "shift": 0.0},
}
"""Process and latents of PVDM's and HVDM's released denoisers (spec, pvdm.md section 4, hvdm.md section 6)."""
VIDM_DATA: dict[str, Any] = {"data": {"fps": 10.0}}
"""The frame rate of VIDM's released GIFs."""


def latte_process(release: Release, config: LatteConfig) -> dict[str, Any]:
    """Process and latents of Latte's releases (spec, latte.md section 3)."""
    if release == "tutorial":
        return {"diffusion": {"variance": "fixed_small"}, "latent": {"scale": 1.0, "shift": 0.0}}
    variance = "learned_range" if config.learn_sigma else "fixed_large"
    return {"diffusion": {"variance": variance}, "latent": {"scale": SD_SCALE, "shift": 0.0}}
