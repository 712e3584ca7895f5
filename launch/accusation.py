"""Whom a run waits for, in words, from the answers of its ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_NAMED = 4
"""Ranks that a line names, at most."""
_TROUBLE = {
    "gone": "gone: killed, or crashed",
    "silent": "there, but {does} not answer: stopped, or stuck",
    "unreachable": "out of reach: the host, or the link to it, is down",
}


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    rank: int
    host: str
    process: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


@dataclass(frozen=True)
class Answer:
    """What a rank said of itself: `step`, `at` and `waits` (for others); or why it said nothing, a key of _TROUBLE."""

    place: Place
    trouble: str = ""
    state: dict[str, Any] = field(default_factory=dict)


def accusation(answers: Sequence[Answer]) -> str:
    """The ranks that do not answer; where all do, those that are behind the others."""
    parts = []
    for trouble, words in _TROUBLE.items():
        found = [answer.place for answer in answers if answer.trouble == trouble]
        if found:
            one = len(found) == 1
            parts.append(f"{_names(found)} {'is' if one else 'are'} {words.format(does='does' if one else 'do')}")
    if parts:
        return "; ".join(parts)
    late = _behind(answers)
    if late:
        first = late[0].state
        step = "" if first["step"] is None else f" in step {first['step'] + 1}"
        return f"all wait for {_names([answer.place for answer in late])}, which is{step} at {first['at']}"
    return f"all ranks answer, and wait for each other at {answers[0].state['at']}: a link between them, or a GPU, is stuck"


def _behind(answers: Sequence[Answer]) -> list[Answer]:
    """Ranks in an earlier step than others; else those that do not wait while others do."""
    steps = [-1 if answer.state["step"] is None else answer.state["step"] for answer in answers]
    late = [answer for answer, step in zip(answers, steps, strict=True) if step < max(steps)]
    late = late or [answer for answer in answers if not answer.state["waits"]]
    return late if len(late) < len(answers) else []


def _names(places: Sequence[Place]) -> str:
    listed = ", ".join(map(str, places[:_NAMED]))
    return listed + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
