"""Figures of a trained system, each printed with the protocol that it was measured by.

evaluate.py reconstruct --ae EXPORT --data-path VIDEOS    PSNR, SSIM, LPIPS, rFVD and rFID of an autoencoder
evaluate.py reconstruct --dir1 VIDEOS --dir2 MADE         the same of reconstructions that are there already
evaluate.py motion --samples FOLDER [FOLDER ...]          motion in folders of videos, beside each other
evaluate.py fvd --dir1 REAL --dir2 FAKE --i3d FILE        Frechet video distance of two folders of videos
evaluate.py kvd --dir1 REAL --dir2 FAKE --i3d FILE        kernel video distance, also of few videos
evaluate.py fid --dir1 REAL --dir2 FAKE                   Frechet inception distance of their frames
evaluate.py fd --dir1 REAL --dir2 FAKE                    the same through a network of a pip package: no download, no FID
evaluate.py vis --dir2 FAKE --c3d FILE                    inception score of a folder of videos
evaluate.py clipsim --dir2 FAKE --clip FOLDER             CLIP similarity of videos and their texts
evaluate.py ladder RUNS --data-path SHARDS --i3d FILE     of a system: reconstruction, motion of true content, full generation
evaluate.py fvd RUNS --dir1 REAL --i3d FILE               of videos that are generated for it (also kvd, vis, fid, fd)
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from evaluation.frames import FdConfig, FidConfig, measure_fd, measure_fid
from evaluation.generated import generated_videos
from evaluation.ladder import LadderConfig, measure_ladder
from evaluation.motion import MotionConfig, measure_motion
from evaluation.quality import measure_fvd, measure_kvd, measure_vis
from evaluation.reconstruction import measure_reconstruction, reconstruction_rows
from evaluation.reconstruction_config import ReconstructConfig
from evaluation.report import append_row, digits, row
from evaluation.settings import FvdConfig, KvdConfig, VideosConfig, VisConfig
from evaluation.similarity import ClipsimConfig, measure_clipsim
from evaluation.videos import VideoSet
from launch.env import Env, distributed
from launch.run import Launch, parse_launch, run_main
from pipelines.encoders import ENCODERS
from pipelines.systems import with_run
from utils.config import dump_yaml, load_config, to_dict
from utils.errors import ConfigError, UserError
from utils.files import atomic_write_text


class Settings(Protocol):
    """What the settings of a command have in common."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""


class SharedSettings(Settings, Protocol):
    """And those of a command that any number of processes share."""

    @property
    def out(self) -> str: ...

    @property
    def timeout(self) -> float: ...


Config = TypeVar("Config", bound=Settings)
Shared = TypeVar("Shared", bound=SharedSettings)
Videos = TypeVar("Videos", bound=VideosConfig)


def reconstruct(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure(launch, _load(launch, "reconstruct", dict.fromkeys(ENCODERS, ReconstructConfig)), measure_reconstruction)


def fvd(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "fvd", FvdConfig, measure_fvd)


def kvd(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "kvd", KvdConfig, measure_kvd)


def fid(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "fid", FidConfig, measure_fid)


def fd(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "fd", FdConfig, measure_fd)


def clipsim(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "clipsim", ClipsimConfig, measure_clipsim)


def vis(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure_videos(launch, "vis", VisConfig, measure_vis)


def ladder(launch: Launch) -> None:
    """The subcommand of that name."""
    _measure(launch, _load_videos(launch, "ladder", LadderConfig), measure_ladder)


def _measure_videos(
    launch: Launch, name: str, schema: type[Videos], measure: Callable[[Videos, Env, VideoSet | None], dict[str, Any]]
) -> None:
    """A figure of sets of videos, whose row also goes to a table."""
    config = _load_videos(launch, name, schema)

    def measured(settings: Videos, env: Env) -> dict[str, Any]:
        """With the videos of --run, where that is given."""
        made = generated_videos(settings.run, settings.sampling, settings.count, env.device) if settings.run else None
        return measure(settings, env, made)

    _measure(launch, config, measured)


def _load_videos(launch: Launch, name: str, schema: type[Videos]) -> Videos:
    """Settings of such a figure, in all ways that they may be written."""
    return _load(dataclasses.replace(launch, argv=double_dashes(with_run(launch.argv))), name, {"": schema})


def double_dashes(argv: list[str]) -> list[str]:
    """-dir1 as --dir1: VIDM's scripts spell their flags so."""
    return [re.sub(r"^-(?=(dir1|dir2|b|r|n|ns|i3d|c3d)(=|$))", "--", token) for token in argv]


def _load(launch: Launch, name: str, schemas: Mapping[str, type[Config]]) -> Config:
    config = load_config(schemas, launch.argv, prog=f"evaluate.py {name}", description=launch.about)
    config.validate()
    return config


def _shown(launch: Launch, config: Any) -> bool:
    """Whether only the settings were asked for; prints them."""
    asked = launch.print_config or launch.dry_run
    if asked:
        print(dump_yaml(to_dict(config)), end="")
    return asked


def check_out(out: str, flag: str = "--out") -> None:
    """Raises UserError where a file of figures cannot be written, before hours of measuring; makes nothing."""
    if not out:
        return
    place = Path(out).absolute()
    there = next(folder for folder in place.parents if folder.exists())
    if place.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{flag} {out} cannot be written: the name of a file is wanted, in a folder of yours")


def _measure(launch: Launch, config: Shared, measure: Callable[[Shared, Env], dict[str, Any]]) -> None:
    """Figures that all processes measure together, printed and written by one."""
    if _shown(launch, config):
        return
    check_out(config.out)
    if isinstance(config, VideosConfig | ReconstructConfig):
        check_out(config.markdown, "--markdown")
    with distributed(config.timeout) as env:
        figures = measure(config, env)
        if not env.is_main:
            return
        print(table(figures), flush=True)
        if config.out:
            atomic_write_text(Path(config.out), json.dumps(figures, indent=2) + "\n")
        if isinstance(config, VideosConfig | ReconstructConfig):
            rows = _rows(config, figures)
            print("\n" + "\n".join(map(row, rows)), flush=True)
            for one in rows if config.markdown else ():
                append_row(Path(config.markdown), one)


def _rows(config: VideosConfig | ReconstructConfig, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of which each has a row of the table."""
    if isinstance(config, ReconstructConfig):
        return reconstruction_rows(figures)
    return list(figures["rungs"].values()) if "rungs" in figures else [figures]


def motion(launch: Launch) -> None:
    """The subcommand of that name."""
    config = _load(launch, "motion", {"": MotionConfig})
    if _shown(launch, config):
        return
    check_out(config.out)
    with distributed(config.timeout) as env:
        _measure_motion(config, env)


def _measure_motion(config: MotionConfig, env: Env) -> None:
    """Prints the figures of folders, and writes them into each."""
    figures: dict[str, Any] = {}
    for folder in config.samples:
        figures[folder] = measure_motion(Path(folder), env, config.clip_frames)
        if not env.is_main:
            continue
        atomic_write_text(Path(folder) / "motion.json", json.dumps(figures[folder], indent=2) + "\n")
        print("{motion:.5f} +- {motion_std:.5f} over {videos} videos: ".format(**figures[folder]) + folder, flush=True)
    if not env.is_main:
        return
    print(table({"protocol": figures[config.samples[-1]]["protocol"]}), flush=True)
    if config.out:
        atomic_write_text(Path(config.out), json.dumps(figures, indent=2) + "\n")


def _lines(protocol: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of a protocol; what is inside a group bears the group's name."""
    for name, value in protocol.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{parent}{name} ")
        else:
            yield parent + name, str(value)


def table(figures: dict[str, Any]) -> str:
    """Figures and protocol as two columns of text."""
    rows = [
        (name, digits(value) if isinstance(value, float) else str(value))
        for name, value in figures.items()
        if name != "notes" and not isinstance(value, dict)
    ]
    rows += [("", ""), *_lines(figures["protocol"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


COMMANDS: dict[str, Callable[[Launch], None]] = {
    "reconstruct": reconstruct,
    "motion": motion,
    "fvd": fvd,
    "kvd": kvd,
    "fid": fid,
    "fd": fd,
    "vis": vis,
    "clipsim": clipsim,
    "ladder": ladder,
}


def main() -> None:
    """Choose the subcommand."""
    launch = parse_launch(__doc__ or "")
    name = launch.argv[0] if launch.argv else ""
    if name in ("-h", "--help"):
        print(
            f"usage: evaluate.py {'|'.join(COMMANDS)} [OPTIONS]\n\n{launch.about}\n`evaluate.py COMMAND --help` lists the settings of each."
        )
        return
    if name not in COMMANDS:
        raise ConfigError(f"evaluate.py {name or '(nothing)'}: a command is wanted first: {', '.join(COMMANDS)}")
    COMMANDS[name](dataclasses.replace(launch, argv=launch.argv[1:]))


if __name__ == "__main__":
    run_main(main)
