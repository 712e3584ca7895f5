"""What preprocessing did: counts, histograms, and every file that was left out with the reason. All of it counters of few bins."""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.prepare.clips import Facts
from datasets.sources.base import Listing, printable
from utils.errors import UserError
from utils.files import atomic_write_bytes

REPORT = "report.json"
NAMED = 100
"""Clips left out for one reason that are named; all are counted."""

EDGES: dict[str, tuple[float, ...]] = {
    "seconds of a source": (0, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200),
    "frame rate of a source": (0, 5, 8, 10, 12, 15, 20, 23, 25, 26, 29, 31, 49, 51, 59, 61, 120),
    "shorter side of a source": (0, 64, 128, 240, 360, 480, 720, 1080, 1440, 2160),
    "clips of a video": (0, 1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000),
    "motion of a clip": (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
}
"""Histogram -> lower edges of its bins; the last bin has no end."""


def bin_of(histogram: str, value: float) -> str:
    """The bin that a value falls into, as text: its lower edge."""
    edges = EDGES[histogram]
    return f"{edges[max(0, bisect_right(edges, value) - 1)]:g}"


@dataclass
class Tally:
    """Counts of one shard, of a part or of the whole set. Its size does not grow with the number of clips."""

    videos: int = 0
    """Videos of which a clip was taken."""
    clips: int = 0
    fps: Counter[str] = field(default_factory=Counter)
    """Frame rate -> clips."""
    labels: Counter[str] = field(default_factory=Counter)
    """Label -> clips."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> clips left out of videos that were used otherwise."""
    left_out: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Reason -> (video, detail) of the first NAMED of them."""
    histograms: dict[str, Counter[str]] = field(default_factory=dict)
    """Name in EDGES -> bin -> count."""
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    """(video, reason, detail)."""

    def count_clip(self, label: int, facts: Facts) -> None:
        """A clip that is stored."""
        self.clips += 1
        self.fps[str(facts.fps)] += 1
        self.labels[str(label)] += 1
        self._count("motion of a clip", facts.motion)

    def count_left_out(self, video: str, reason: str, detail: str) -> None:
        """A clip that is not stored, of a video that could be read."""
        self.rejected[reason] += 1
        named = self.left_out.setdefault(reason, [])
        if len(named) < NAMED:
            named.append((video, detail))

    def count_video(self, clips: list[Facts], kept: int) -> None:
        """A video that could be read: all its clips, and how many of them are stored."""
        self.videos += int(kept > 0)
        self._count("clips of a video", kept)
        for facts in clips[:1]:
            self._count("seconds of a source", facts.source_seconds)
            self._count("frame rate of a source", facts.source_fps)
            self._count("shorter side of a source", min(facts.source_size))

    def _count(self, histogram: str, value: float) -> None:
        self.histograms.setdefault(histogram, Counter())[bin_of(histogram, value)] += 1

    def add(self, other: "Tally") -> None:
        """Adds another count to this one."""
        self.videos += other.videos
        self.clips += other.clips
        self.fps.update(other.fps)
        self.labels.update(other.labels)
        self.rejected.update(other.rejected)
        for reason, named in other.left_out.items():
            self.left_out[reason] = (self.left_out.get(reason, []) + named)[:NAMED]
        for name, bins in other.histograms.items():
            self.histograms.setdefault(name, Counter()).update(bins)
        self.skipped += other.skipped

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        counters = {"fps": self.fps, "labels": self.labels, "rejected": self.rejected, "histograms": self.histograms}
        return {"videos": self.videos, "clips": self.clips, "skipped": list(self.skipped), "left_out": self.left_out} | counters

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """Takes back what `to_dict` gave, also by way of JSON."""
        skipped = [(name, reason, detail) for name, reason, detail in values["skipped"]]
        fps, labels, rejected = (Counter(values[name]) for name in ("fps", "labels", "rejected"))
        histograms = {name: Counter(bins) for name, bins in values["histograms"].items()}
        left_out = {reason: [(video, detail) for video, detail in named] for reason, named in values["left_out"].items()}
        return cls(values["videos"], values["clips"], fps, labels, rejected, left_out, histograms, skipped)

    @property
    def common_fps(self) -> float:
        """The frame rate of most clips; the lowest of several."""
        return min((-count, float(fps)) for fps, count in self.fps.items())[1]


def write_report(folder: Path, tally: Tally, listing: Listing, dropped: int = 0) -> None:
    """report.json: counts, clips of each class, histograms, and what was left out by reason. `dropped`: stored clips that are not used."""
    reasons = defaultdict(list)
    for name, reason, detail in sorted(tally.skipped):
        reasons[reason].append(_row(name, detail))
    report = {
        "videos": len(listing.videos) + len(listing.missing) + len(listing.rejected),
        "used": tally.videos,
        "clips": tally.clips - dropped,
        "clips_per_class": {name: tally.labels.get(str(label), 0) for label, name in enumerate(listing.classes)},
        "clips_per_fps": tally.fps,
        "histograms": {name: _in_order(bins) for name, bins in tally.histograms.items()},
        "rejected_clips": tally.rejected,
        "first_rejected_clips": {reason: [_row(*row) for row in named] for reason, named in tally.left_out.items()},
        "skipped": reasons,
    }
    atomic_write_bytes(folder / REPORT, json.dumps(report, indent=1, sort_keys=True).encode() + b"\n")


def _row(name: str, detail: str) -> dict[str, str]:
    return {"file": name, "detail": detail}


def _in_order(bins: Counter[str]) -> list[tuple[float, int]]:
    return sorted((float(edge), count) for edge, count in bins.items())


def read_report(folder: Path) -> dict[str, Any] | None:
    """report.json of a finished set; None where there is none. UserError when it is damaged."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
        summary(report)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / REPORT} is damaged ({error!r}): delete it, the shards do not need it") from None
    assert isinstance(report, dict)
    return report


def summary(report: dict[str, Any], limit: int = 10) -> str:
    """The report as text: histograms as bars, and of what was left out each reason, its count and the first `limit` files."""
    lines = [line for name, bins in sorted(report["histograms"].items()) for line in _bars(name, bins)]
    classes = Counter(report["clips_per_class"]).most_common()
    if classes:
        lines += _bars("clips of a class", classes[:limit])
        if len(classes) > limit:
            lines.append(f"  ... and {len(classes) - limit} more classes, the smallest {classes[-1][0]} with {classes[-1][1]}")
    for reason, count in Counter(report["rejected_clips"]).most_common():
        lines.append(f"left out {count} clips: {reason}")
        lines += _rows(report.get("first_rejected_clips", {}).get(reason, []), count, limit)
    for reason, rows in sorted(report["skipped"].items(), key=lambda item: (-len(item[1]), item[0])):
        lines += [f"skipped {len(rows)}: {reason}", *_rows(rows, len(rows), limit)]
    return "\n".join(lines + ([] if report["skipped"] else ["nothing was skipped"]))


def _rows(rows: list[dict[str, str]], count: int, limit: int) -> list[str]:
    """The first of `count` files, or clips of files, that were left out. A name may hold anything: it must not break the terminal."""
    shown = [(printable(row["file"]), printable(row["detail"])) for row in rows[:limit]]
    width = max((len(name) for name, _ in shown), default=0)
    more = [f"  ... and {count - len(shown)} more in {REPORT}"] if shown and count > len(shown) else []
    return [f"  {name:<{width}}  {detail}" for name, detail in shown] + more


def _bars(name: str, bins: Iterable[tuple[float | str, int]]) -> list[str]:
    rows = [(f"{edge:g}" if isinstance(edge, float) else str(edge), count) for edge, count in bins]
    if not rows:
        return []
    width, most = max(len(edge) for edge, _ in rows), max(1, *(count for _, count in rows))
    return [name, *(f"  {edge:>{width}} {count:>9} {'#' * -(-30 * count // most)}" for edge, count in rows)]
