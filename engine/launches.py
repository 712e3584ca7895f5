"""By which launch a run was taken up: what tells its later starts from the same command that is given once more."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.files import atomic_write_text

FILE = "launch"
"""File of a run folder: Slurm's job, what started the processes (`launch.agent.starter`), and the checkpoint that was gone back to."""


@dataclass(frozen=True)
class Launch:
    """The launch of this start, as all its ranks together know it.

    It is known by whatever started a process of it on any machine. Machines come and go in an elastic launch, and rank 0 moves between
    them: a start is of the launch that began a run when one of its machines was in that launch before.
    """

    starters: frozenset[str]
    job: str = ""
    """The Slurm job that was queued again."""

    @classmethod
    def of(cls, starters: Iterable[str]) -> "Launch":
        """From what each rank says of its starter; nothing where it was started by hand."""
        queued_again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
        return cls(frozenset(filter(None, starters)), os.environ.get("SLURM_JOB_ID", "") if queued_again else "")

    def began(self, folder: Path, back_to: str = "") -> bool:
        """Whether an earlier start of this launch took a run up; `back_to`: by going back to the checkpoint of this name."""
        job, starters, went_back_to = _noted(folder)
        known = not self.starters.isdisjoint(starters) or (self.job != "" and self.job == job)
        return known and back_to in ("", went_back_to)

    def note(self, folder: Path, back_to: str) -> None:
        """Leave in a run folder that this launch has taken it up. Machines that were in it stay noted: they may come back alone."""
        before = _noted(folder)[1] if self.began(folder) else set()
        lines = (os.environ.get("SLURM_JOB_ID", ""), " ".join(sorted(self.starters | before)), back_to)
        atomic_write_text(folder / FILE, "\n".join(lines) + "\n")


def _noted(folder: Path) -> tuple[str, set[str], str]:
    try:
        job, starters, back_to = (folder / FILE).read_text().splitlines()
    except (OSError, ValueError):
        return "", set(), ""
    return job, set(starters.split()), back_to
