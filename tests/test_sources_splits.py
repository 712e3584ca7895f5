"""What holds of every listing: splits by share part groups and nothing else, order counts, class numbers keep their meaning."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.sources.base import SourceOptions, Video, class_names, natural_key
from datasets.sources.splits import held_out, select
from tests.source_trees import touch
from utils.errors import UserError

# Splits by share

videos = st.builds(
    lambda name, group: Video(Path(name), name, group=group and f"g{group}"), st.text("abcdef/", min_size=1, max_size=6), st.integers(0, 9)
)
some_videos = st.lists(videos, max_size=30, unique_by=lambda video: video.name)
shares = st.floats(0.01, 0.99)


@given(some_videos, shares, st.sampled_from(["", "train"]))
def test_a_split_by_share_is_a_partition_by_group(found: list[Video], share: float, official: str) -> None:
    found = [Video(v.path, v.name, group=v.group, split=official) for v in found]
    parts = {split: select(found, SourceOptions(split, val_fraction=share), Path("x")) for split in ("train", "val")} if found else {}
    assert sorted(v.name for part in parts.values() for v in part) == sorted(v.name for v in found)
    groups = [{v.split_group for v in part} for part in parts.values()]
    assert not groups or not groups[0] & groups[1]


@given(some_videos, some_videos, shares)
def test_adding_videos_moves_none(old: list[Video], new: list[Video], share: float) -> None:
    def val(found: list[Video]) -> set[str]:
        return {v.name for v in select(found, SourceOptions("val", val_fraction=share), Path("x"))} if found else set()

    both = old + [v for v in new if v.name not in {o.name for o in old}]
    assert val(both) & {v.name for v in old} == val(old)


@given(st.integers(1, 30), shares)
def test_spans_of_one_file_stay_together(count: int, share: float) -> None:
    spans = [Video(Path("a@b.mp4"), f"a@b.mp4@{number}-{number + 1}", span=(number, number + 1)) for number in range(count)]
    assert len({held_out(video, share) for video in [*spans, Video(Path("a@b.mp4"), "a@b.mp4")]}) == 1


@settings(max_examples=25)
@given(st.floats(0.05, 0.95))
def test_the_share_is_about_what_was_asked_for(share: float) -> None:
    held = sum(held_out(Video(Path("x"), f"{number}.mp4"), share) for number in range(2000))
    assert abs(held / 2000 - share) < 0.06


@given(st.lists(st.text("ab1029", max_size=5), max_size=8))
def test_natural_order_is_total_and_counts(texts: list[str]) -> None:
    texts.sort(key=natural_key)
    assert texts == sorted(set(texts), key=natural_key) or len(set(texts)) < len(texts)
    assert all(natural_key(one) != natural_key(two) for one in texts for two in texts if one != two)
    assert sorted(["a10", "a2", "a1b", "a"], key=natural_key) == ["a", "a1b", "a2", "a10"]


def test_class_numbers_keep_their_meaning() -> None:
    assert class_names(["3", "0"]) == ["0", "1", "2", "3"] and class_names(["b10", "b2", "b2"]) == ["b2", "b10"] and class_names([]) == []
    assert class_names(["3", "x"]) == ["3", "x"]
    with pytest.raises(UserError, match="above 65535"):
        class_names(["70000"])


def test_a_source_that_went_away_is_another_source(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", ["a/1.mp4", "b/1.png"])
    there = [Video(root / "a" / "1.mp4", "a/1.mp4"), Video(root / "b", "b", is_frames=True)]
    gone = [Video(root / "c" / "1.mp4", "a/1.mp4"), Video(root / "d", "b", is_frames=True)]
    assert [video.content_id() for video in there] == [[1], [1]] and [video.content_id() for video in gone] == [[], []]
