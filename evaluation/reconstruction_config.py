"""Settings of evaluate.py reconstruct."""

from dataclasses import dataclass
from typing import Literal

from evaluation.protocols import Size
from evaluation.store import check_cache
from metrics.resampling import LEAST_SETS
from pipelines.loading import SD_SCALE, is_official
from utils.config import flag
from utils.errors import ConfigError

ORIGINALS = "--data-path (--dir1)"
MADE = "--recon (--dir2)"
"""The two folders in messages: either flag may have been typed."""


@dataclass(frozen=True)
class ReconstructConfig:
    """Measures how well an autoencoder gives clips back: of a shard set or a folder of videos, or of two folders, the videos and what was
    made of them elsewhere."""

    system: str = ""
    """Whose official checkpoint it is: cmd, latte, pvdm or hvdm; empty: as the names in it say. An export says it itself."""
    ae: str = ""
    """The autoencoder: an export or run folder, or an official checkpoint (.pt, .pth)."""
    data_path: str = flag("", "dir1")
    """Videos to measure on: a shard set made by preprocess.py, or a folder of mp4, gif and other video files, .npy arrays and folders of
    pictures. Of each its first frames, as many as the autoencoder takes; other sizes become the autoencoder's (centre crop)."""
    recon: str = flag("", "dir2")
    """In place of --ae: folder of reconstructions that are there already, each under the name of its original in --data-path (whatever
    the suffix) and of its length and size."""
    vae: str = ""
    """Latent mode: folder of the image VAE. Without --ae that VAE itself is measured."""
    scale_factor: float = SD_SCALE
    """Latent mode: factor of the image VAE's latents."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights (where there are any), or the last ones."""
    perceptual: Literal["lpips-alex", "lpips-vgg", "lpips-squeeze", "effl0", "none"] = "lpips-alex"
    """Network of the perceptual distance; it is left out, and said so, when its weights are not there."""
    perceptual_weights: str = ""
    """File with the network's weights; empty: the torch hub cache."""
    i3d: str = ""
    """The network of rFVD, the Frechet video distance of clips and reconstructions by PVDM's protocol: i3d_pretrained_400.pt or
    i3d_torchscript.pt; empty: not measured."""
    inception: str = ""
    """The network of rFID, the same of single frames: pt_inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt; empty: not
    measured."""
    psnr_per_clip: bool = False
    """PSNR of the squared error of whole clips (as PVDM reports it) in place of single frames."""
    max_clips: int = flag(0, "num-videos", "ns")
    """Measure on the first clips only; 0: all."""
    n_frames: int | None = flag(None, "n")
    """Of each video, for autoencoders of single frames and two folders (none: all frames of videos that are all of one length, else 16);
    and what an official checkpoint takes, which does not say it (none: 16)."""
    stride: int = 1
    """Distance of two frames of a clip in its video."""
    resolution: int = flag(0, "r")
    """Side of the square that frames become first, for autoencoders of single frames, official checkpoints and two folders; 0: the size
    of the first video."""
    batch_size: int = flag(8, "b")
    """Clips at a time, per process; more than 32 are taken as 32."""
    num_workers: int = 4
    """Threads that read videos, per process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of an autoencoder of clips; those of single frames know fp32 alone."""
    bootstrap: int = 0
    """Resampled sets that the 95 % intervals of the figures come from, such as 200, at least 20; 0: no intervals."""
    cache: str = ""
    """Folder of what was measured before, from where the same command goes on after it was stopped; empty: $KINOFORM_CACHE, or
    ~/.cache/kinoform."""
    no_cache: bool = False
    """Neither read nor keep it: an interrupted run starts over."""
    out: str = ""
    """JSON file to write the figures to."""
    markdown: str = ""
    """File to which rows of a table are appended, one a figure; a new one gets a heading."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work, and on those that would change nothing."""
        if not self.ae and not self.vae and not self.recon:
            raise ConfigError(
                f"which autoencoder? give --ae FOLDER, the run or export folder of train_ae.py, or {MADE} FOLDER, what one made already"
            )
        if not self.data_path:
            raise ConfigError(f"measured on what? give {ORIGINALS} FOLDER, a shard set made by preprocess.py, or a folder of videos")
        for name in ("ae", "vae", "system", "scale_factor", "weights", "precision") if self.recon else ():
            if (value := getattr(self, name)) != getattr(ReconstructConfig, name):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: no autoencoder runs with {MADE}; drop one of the two")
        self._refuse_ignored()
        if self.bootstrap and self.bootstrap < LEAST_SETS:
            raise ConfigError(f"--bootstrap {self.bootstrap}: 0, or at least {LEAST_SETS} resampled sets")
        lowest = {"n_frames": 1, "batch_size": 1, "num_workers": 1, "stride": 1, "max_clips": 0, "resolution": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least}")

    def _refuse_ignored(self) -> None:
        if self.perceptual == "none" and self.perceptual_weights:
            raise ConfigError(f"--perceptual-weights {self.perceptual_weights}: --perceptual none has no network; drop one of the two")
        if self.scale_factor != SD_SCALE and not (self.ae and self.vae):
            raise ConfigError(f"--scale-factor {self.scale_factor}: it is of latents between --ae and --vae, not both given; drop the flag")
        check_cache(self.cache, self.no_cache)
        if self.weights != "ema" and (not self.ae or is_official(self.ae)):
            raise ConfigError(f"--weights {self.weights}: {self.ae or f'--vae {self.vae}'} has one kind of weights; drop the flag")

    @property
    def size(self) -> Size | None:
        """Height and width that were asked for."""
        return (self.resolution, self.resolution) if self.resolution else None
