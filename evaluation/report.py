"""Figures with all that they depend on: notes, protocol, a row of a table."""

import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from evaluation.extractors import Extractor
from evaluation.features import Side
from evaluation.settings import VideosConfig
from evaluation.versions import versions
from utils.files import atomic_write_text, waiting_turn

COLUMNS = (
    "figure", "value", "95 % interval", "noise floor", "real videos", "generated videos", "frames", "size", "protocol", "network sha256",
    "seed",
)  # fmt: skip


def too_few(least: int, dim: int, unit: str) -> list[str]:
    """What to know of a distance of so few vectors, one of each `unit`."""
    if least > dim:
        return []
    return [f"{least} {unit} and {dim} features: a covariance is singular, the distance is far too large"]


def report(
    config: VideosConfig,
    figures: dict[str, Any],
    notes: list[str],
    described: Mapping[str, Any],
    extractor: Extractor,
    sides: list[Side],
    told: Container[str] = (),
) -> dict[str, Any]:
    """Figures, what to know of them (also printed, but for what was `told` before), and how they were measured."""
    notes = [*filter(None, [config.rules.note]), *(note for side in sides for note in _notes(config, side)), *notes]
    vectors = config.frames if config.unit == "frames" else 1
    if "fd_by_size" in figures and (least := vectors * min(map(int, figures["fd_by_size"]))) <= described["dim"]:
        notes.append(
            f"fd_inf is from sets of {least} {config.unit} on, with {described['dim']} features: the line is not straight there, it is off"
        )
    for note in (note for note in notes if note not in told):
        print(f"note: {note}", file=sys.stderr, flush=True)
    for side in sides:
        role = side.clips.role
        figures |= {f"{role}_videos": len(side.clips), f"{role}_frame_difference": side.change, f"{role}_static_share": side.static}
    if len(sides) == 2:
        figures["frame_difference_ratio"] = sides[1].change / sides[0].change if sides[0].change else None
    measured: dict[str, Any] = {side.clips.role: _described(config, side) for side in sides}
    protocol: dict[str, Any] = {
        "name": config.protocol,
        **described,
        "frames": config.frames,
        "size": list(sides[-1].clips.size),
        "resize": config.rules.resized,
        "seed": config.seed,
        "bootstrap": config.bootstrap,
        **measured,
        "detector": extractor.identity(),
        "versions": versions(),
    }
    return figures | {"notes": notes, "protocol": protocol}


def _described(config: VideosConfig, side: Side) -> dict[str, Any]:
    """Which videos a side is, how many of them, and which frames."""
    stride = side.clips.picks[0][1] - side.clips.picks[0][0] if len(side.clips.picks[0]) > 1 else 1
    counts = {"measured": len(side.clips), "unique": side.unique, "too_short": side.clips.dropped, "content_sha256": side.digest}
    return side.clips.videos.identity() | counts | config.rules.describe(side.clips.role, config.seed, stride)


def _notes(config: VideosConfig, side: Side) -> list[str]:
    """What a reader of the figure has to know of a side."""
    clips, notes = side.clips, []
    short = f", {clips.dropped} shorter than {config.frames} frames left out" if clips.dropped else ""
    if len(clips) < config.count:
        notes.append(f"{len(clips)} {clips.role} videos, --num-videos {config.count} were asked for{short}")
    elif short:
        notes.append(f"{clips.role} videos{short}")
    return notes + copies(side.unique, len(clips), f"{clips.role} clips")


def copies(unique: int, count: int, what: str) -> list[str]:
    """What to know of clips of which some are equal."""
    return [f"{count - unique} of {count} {what} are copies of others: the figure is that of fewer"] if unique < count else []


def digits(value: float) -> str:
    """Four digits behind the point; of numbers below a hundredth the first four."""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.4g}"


def row(figures: Mapping[str, Any]) -> str:
    """The first figure as a row of a markdown table with `COLUMNS`."""
    protocol = figures["protocol"]
    name = next(iter(figures))
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    cells = [
        protocol["id"],
        digits(figures[name]),
        "" if low is None or high is None else f"{digits(low)} .. {digits(high)}",
        _floor(figures),
        str(figures.get("real_videos", "")),
        str(figures["generated_videos"]),
        str(protocol["frames"]),
        " x ".join(map(str, protocol["size"])),
        protocol["name"],
        str(protocol["detector"].get("sha256", ""))[:12],
        str(protocol["seed"]),
    ]
    return _line(cells)


def _floor(figures: Mapping[str, Any]) -> str:
    """The noise floor, at the size of the figure or of halves, where there is one."""
    if "noise_floor" in figures:
        return digits(figures["noise_floor"])
    return f"{digits(figures['noise_floor_of_halves'])} of halves" if "noise_floor_of_halves" in figures else ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def append_row(path: Path, figures: Mapping[str, Any]) -> None:
    """Adds the row to a file, which is whole at any time; a new file gets the heading, one whose last table has other columns a new one.

    Who adds at the same time waits.
    """
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_turn(path):
        before = path.read_text(encoding="utf-8")
        if before and not before.endswith("\n"):
            before += "\n"
        columns = _line(list(COLUMNS))
        heading = f"{columns}\n{_line(['---'] * len(COLUMNS))}\n"
        ours = [line for line in before.splitlines() if line.startswith(f"| {COLUMNS[0]} | {COLUMNS[1]} |")]
        if not before:
            before = heading
        elif ours and ours[-1] != columns:
            before += "\n" + heading
        atomic_write_text(path, f"{before}{row(figures)}\n")
