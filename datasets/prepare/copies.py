"""Clips that show what a clip of another video shows, found by their fingerprints as the clips of a set come by in order."""

from collections.abc import Iterable

from datasets.prepare.duplicates import Duplicates


class Copies:
    """Remembers the clips that were kept. Clips of one video are never copies of each other: windows may overlap."""

    def __init__(self, distance: int) -> None:
        self.seen = Duplicates(distance)
        self.video = ""
        self.own: list[tuple[str, str]] = []
        """(fingerprint, key) of the video that is coming by: compared with later videos only."""

    def is_copy(self, key: str, fingerprint: str) -> bool:
        """Whether a clip repeats one of a video before; if not, it is kept and remembered."""
        self._turn_to(key)
        if fingerprint and self.seen.find(fingerprint) is not None:
            return True
        self.own.append((fingerprint, key))
        return False

    def note(self, clips: Iterable[tuple[str, str]]) -> None:
        """Remembers clips, (key, fingerprint), that were kept before, by an earlier run."""
        for key, fingerprint in clips:
            self._turn_to(key)
            self.own.append((fingerprint, key))

    def _turn_to(self, key: str) -> None:
        video = key.partition("_")[0]
        if video != self.video:
            for fingerprint, own in self.own:
                if fingerprint:
                    self.seen.add(fingerprint, own)
            self.video, self.own = video, []
