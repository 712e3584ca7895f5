"""Settings of the commands that measure sets of videos by what a network sees in them."""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.protocols import PRESETS, PROTOCOLS, Preset, Protocol, Size, figure_name
from evaluation.store import check_cache
from metrics.inception_score import SPLITS
from metrics.resampling import LEAST_SETS
from utils.config import flag
from utils.errors import ConfigError
from utils.schema import suggest


@dataclass(frozen=True)
class VideosConfig:
    """What figures of videos have in common."""

    dir2: str = ""
    """Generated videos: the --out of sample.py, any folder of mp4, gif and other video files, .npy arrays and folders of pictures, or a
    shard set made by preprocess.py."""
    run: str = flag("", "results-dir")
    """In place of --dir2: the --results-dir of training, or what else sample.py takes. Its samples are generated while they are measured,
    and never written. The same as a bare first argument, which is what works under torchrun too (it may take --run for one of its own
    flags)."""
    sampling: str = ""
    """With --run: settings of sample.py in one text, such as --sampling="--steps 50 --guidance-scale 2 --seed 1"."""
    preset: str = ""
    """Number of videos, frames and stride by the name of a published figure: fvd2048_16f, fvd2048_128f, fvd2048_128f_subsample8f,
    fvd10000_16f, or fvd256_16f for machines without a GPU."""
    num_videos: int = flag(0, "ns")
    """Of each side; a side of fewer is measured whole, and said so. 0: as the preset says, 2048."""
    n_frames: int = flag(0, "n")
    """Of each video; 0: as the preset or else the protocol says, 16, or 128 (release)."""
    stride: int = 0
    """Distance of two frames of a clip in its video; 0: as the preset says, 1."""
    resolution: int = flag(0, "r")
    """Side of the square that frames become before the network sees them; 0: the size of the generated videos (release: 256)."""
    protocol: str = "stylegan-v"
    """stylegan-v: the network resizes, covariances over n. pvdm: PVDM, HVDM and CMD, centre crop, covariances over n - 1. videomae:
    content-debiased FVD, of another network. release: VIDM's scripts with their errors, whose numbers compare with no others. All but
    the last take frames in a row, of real videos from a random offset on."""
    batch_size: int = flag(32, "b")
    """Videos at a time, per process; more than 32 are taken as 32."""
    num_workers: int = 4
    """Threads that read videos, per process."""
    seed: int = 0
    """Of all that is drawn: real videos, offsets, halves, subsets, resampling."""
    bootstrap: int = 0
    """Resampled sets that the 95 % interval of the figure comes from, such as 200, at least 20; 0: no interval."""
    cache: str = ""
    """Folder of features that were computed before; empty: $KINOFORM_CACHE, or ~/.cache/kinoform."""
    no_cache: bool = False
    """Neither read nor keep features: an interrupted run starts over."""
    out: str = ""
    """JSON file to write the figures and the protocol to."""
    markdown: str = ""
    """File to which the row of a table is appended; a new one gets a heading."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    @property
    def known(self) -> Mapping[str, Protocol]:
        """Protocols by name; the figures of the first bear no name of one."""
        return PROTOCOLS

    @property
    def rules(self) -> Protocol:
        """The protocol that is named."""
        return self.known[self.protocol]

    @property
    def unit(self) -> str:
        """What has one vector of features."""
        return "videos"

    @property
    def _preset(self) -> Preset:
        return PRESETS[self.preset] if self.preset else Preset(2048, self.rules.frames)

    @property
    def count(self) -> int:
        """Videos of each side."""
        return self.num_videos or self._preset.videos

    @property
    def frames(self) -> int:
        """Of each video."""
        return self.n_frames or self._preset.frames

    @property
    def step(self) -> int:
        """Distance of two frames."""
        return self.stride or self._preset.stride

    @property
    def size(self) -> Size | None:
        """Height and width that frames become; None: the size of the generated ones."""
        side = self.resolution or self.rules.side
        return (side, side) if side else None

    def name(self, figure: str, videos: int) -> str:
        """As `figure_name` says; another protocol's bears its name."""
        named = figure_name(figure, videos, self.frames, self.step)
        return named if self.protocol == next(iter(self.known)) else f"{named}_{self.protocol}"

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if bool(self.dir2) == bool(self.run):
            raise ConfigError("which videos? give --dir2 FOLDER, the generated ones, or --run RUNS, of which they are generated")
        if self.sampling and not self.run:
            raise ConfigError(f"--sampling {self.sampling!r} goes with --run: other videos are there already")
        for name, known in (("protocol", self.known), ("preset", {"": None} | PRESETS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"--{name} {value}: known are {', '.join(filter(None, known))}{suggest(value, list(known))}")
        if self.preset:
            for name, wanted in (("num_videos", self._preset.videos), ("n_frames", self._preset.frames), ("stride", self._preset.stride)):
                if getattr(self, name) not in (0, wanted):
                    told = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise ConfigError(f"{told} is not --preset {self.preset}, which says {wanted}: drop one of the two")
        check_cache(self.cache, self.no_cache)
        if self.rules.spread and self.step != 1:
            raise ConfigError(f"--stride {self.step}: --protocol {self.protocol} spreads frames over the whole video; drop the flag")
        if self.num_videos == 1:
            raise ConfigError("--num-videos 1: at least 2")
        if self.bootstrap and self.bootstrap < LEAST_SETS:
            raise ConfigError(f"--bootstrap {self.bootstrap}: 0, or at least {LEAST_SETS} resampled sets")
        for name in ("num_videos", "n_frames", "stride", "resolution", "batch_size", "num_workers"):
            lowest = int(name in ("batch_size", "num_workers"))
            if getattr(self, name) < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {lowest}")


@dataclass(frozen=True)
class PairConfig(VideosConfig):
    """What figures of real and generated videos have in common."""

    dir1: str = ""
    """Real videos: of any of these kinds."""
    real_stride: int = 0
    """Of real videos where theirs is another one, as of videos that were generated with a stride; 0: the same."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.dir1:
            raise ConfigError("compared with which videos? give --dir1 FOLDER, the real ones")
        if self.real_stride < 0 or (self.real_stride and self.rules.spread):
            raise ConfigError(f"--real-stride {self.real_stride}: at least 0, and of no protocol that spreads frames over the whole video")


@dataclass(frozen=True)
class FrechetConfig(PairConfig):
    """What Frechet distances have in common."""

    noise_floor: bool = True
    """Also the distance of the real videos from as many others of their set as there are generated ones, which are measured too; where
    there are not so many, of one half of them from the other, and that of as many generated ones from a half."""
    fd_inf: bool = False
    """Also what the distance comes to with ever more videos: a line in 1/n through subsets."""


@dataclass(frozen=True)
class DistanceConfig(PairConfig):
    """What distances between videos have in common."""

    i3d: str = flag("", "network")
    """The network: StyleGAN-V's TorchScript I3D (i3d_torchscript.pt), the I3D weights of PVDM, HVDM and CMD (i3d_pretrained_400.pt), or
    that of the protocol."""
    i3d_sha256: str = flag("", "network-sha256")
    """What the file's sha256 must be, or begin with: another file is refused."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.i3d:
            raise ConfigError("seen by which network? give --i3d FILE, StyleGAN-V's TorchScript I3D (i3d_torchscript.pt)")


@dataclass(frozen=True)
class FvdConfig(FrechetConfig, DistanceConfig):
    """Frechet video distance between real and generated videos."""


@dataclass(frozen=True)
class KvdConfig(DistanceConfig):
    """Kernel video distance between real and generated videos: unbiased, so also of few."""

    subsets: int = 100
    """Of which the mean is given, and the deviation."""
    subset_size: int = 1000
    """Videos of each side in a subset; the smaller side where it has fewer."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        for name, lowest in (("subsets", 1), ("subset_size", 2)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {lowest}")


@dataclass(frozen=True)
class VisConfig(VideosConfig):
    """Inception score of generated videos, with its standard deviation over splits of them."""

    c3d: str = ""
    """The network: a TorchScript C3D that classifies UCF-101 (c3d_ucf101.pt)."""
    c3d_sha256: str = ""
    """What the file's sha256 must be, or begin with: another file is refused."""
    splits: int = SPLITS
    """Parts of the set, of whose scores the mean and the standard deviation are given."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.c3d:
            raise ConfigError("seen by which network? give --c3d FILE, the TorchScript C3D of UCF-101 (c3d_ucf101.pt)")
        if not 1 <= self.splits <= self.count:
            raise ConfigError(f"--splits {self.splits}: from 1 up to --num-videos {self.count}")
        if not self.rules.scores:
            raise ConfigError(f"--protocol {self.protocol} is one of distances; the score has stylegan-v and release")
