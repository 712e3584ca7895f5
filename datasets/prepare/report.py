"""What preprocessing did: counts, and every file that was left out with the reason."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.sources.base import Listing
from utils.files import atomic_write_bytes

REPORT = "report.json"


@dataclass
class Tally:
    """Counts of one shard or of the whole set."""

    videos: int = 0
    clips: int = 0
    fps: Counter[str] = field(default_factory=Counter)
    """Frame rate -> clips."""
    labels: Counter[str] = field(default_factory=Counter)
    """Label -> clips."""
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    """(video, reason, detail)."""

    def add(self, other: "Tally") -> None:
        """Adds another count to this one."""
        self.videos += other.videos
        self.clips += other.clips
        self.fps.update(other.fps)
        self.labels.update(other.labels)
        self.skipped += other.skipped

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"videos": self.videos, "clips": self.clips, "fps": dict(self.fps), "labels": dict(self.labels)}
        return counts | {"skipped": list(self.skipped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """Takes back what `to_dict` gave, also by way of JSON."""
        skipped = [(name, reason, detail) for name, reason, detail in values["skipped"]]
        return cls(values["videos"], values["clips"], Counter(values["fps"]), Counter(values["labels"]), skipped)

    @property
    def common_fps(self) -> float:
        """The frame rate of most clips; the lowest of several."""
        return min((-count, float(fps)) for fps, count in self.fps.items())[1]


def write_report(folder: Path, tally: Tally, listing: Listing) -> None:
    """report.json: the counts, clips of each class, and the skipped files by reason."""
    reasons = defaultdict(list)
    for name, reason, detail in sorted(tally.skipped):
        reasons[reason].append({"file": name, "detail": detail})
    classes = {name: tally.labels.get(str(label), 0) for label, name in enumerate(listing.classes)}
    found = len(listing.videos) + len(listing.missing)
    report = {"videos": found, "used": tally.videos, "clips": tally.clips, "clips_per_class": classes, "clips_per_fps": tally.fps}
    text = json.dumps(report | {"skipped": reasons, "tally": tally.to_dict()}, indent=1, sort_keys=True)
    atomic_write_bytes(folder / REPORT, text.encode() + b"\n")


def read_report(folder: Path) -> Tally:
    """The counts of a finished set."""
    return Tally.from_dict(json.loads((folder / REPORT).read_bytes())["tally"])


def table(tally: Tally, limit: int = 10) -> str:
    """A table of what was skipped: reason, count, and the first `limit` files of each with their detail."""
    if not tally.skipped:
        return "nothing was skipped"
    reasons = Counter(reason for _, reason, _ in tally.skipped)
    lines = []
    for reason, count in reasons.most_common():
        lines.append(f"skipped {count}: {reason}")
        rows = sorted((name, detail) for name, why, detail in tally.skipped if why == reason)
        width = max(len(name) for name, _ in rows[:limit])
        lines += [f"  {name:<{width}}  {detail}" for name, detail in rows[:limit]]
        lines += [f"  ... and {count - limit} more in {REPORT}"] if count > limit else []
    return "\n".join(lines)
