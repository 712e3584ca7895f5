"""The options of preprocess.py shards: every rule has one, they arrive where they should, and mistakes are one line."""

import argparse
from dataclasses import fields

import pytest

from datasets.commands import options
from datasets.commands.options import add_shards_arguments, clip_rules
from datasets.commands.parser import Parser
from datasets.prepare.filters import FilterRules
from datasets.prepare.windows import ClipRules
from datasets.sources import SOURCES, SourceOptions
from datasets.transforms import RELEASES
from tests.preprocessing import call
from utils.errors import ConfigError, UserError

OTHER_NAMES = {"size": "image_size", "rule": "clip_rule", "max_clips": "max_clips_per_video"}
NOT_OPTIONS = {"filters", "exclude"}
"""A group of rules, and what follows from --out."""


def parse(*flags: object) -> argparse.Namespace:
    parser = Parser(prog="preprocess.py shards")
    add_shards_arguments(parser)
    return parser.parse_args(["videos", "--out", "shards", *map(str, flags)])


def rules(*flags: object) -> ClipRules:
    return clip_rules(parse(*flags))


def test_every_rule_has_an_option_with_help() -> None:
    parser = Parser()
    add_shards_arguments(parser)
    helped = {action.dest: action.help for action in parser._actions}
    for settings in (ClipRules, FilterRules, SourceOptions):
        for name in {field.name for field in fields(settings)} - NOT_OPTIONS:
            assert helped.get(OTHER_NAMES.get(name, name)), f"{settings.__name__}.{name} has no option, or one without help"
    assert all(helped.values())


def test_the_defaults_are_those_of_the_rules() -> None:
    assert rules() == ClipRules()


def test_the_ffmpeg_program_is_an_option_and_no_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"there": "/usr/bin/ffmpeg", "missing": None}
    for program in programs.values():
        monkeypatch.setattr(options, "ffmpeg_program", lambda program=program: program)
        assert rules("--decoder", "auto").decoder == rules("--decoder", "pyav").decoder == "pyav"
    with pytest.raises(UserError, match="there is no ffmpeg program"):
        rules("--decoder", "ffmpeg")
    monkeypatch.setattr(options, "ffmpeg_program", lambda: programs["there"])
    assert rules("--decoder", "ffmpeg").decoder == "ffmpeg"


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--fps", 12.5), "fps", 12.5),
        (("--clip-rule", "linspace"), "rule", "linspace"),
        (("--scenes", "split"), "scenes", "split"),
        (("--clip-length", 8), "clip_stride", 8),
        (("--clip-length", "video"), "clip_length", 0),
        (("--clip-stride", 3), "clip_stride", 3),
        (("--max_clips_per_video", 2), "max_clips", 2),
        (("--image-size", 128, 96), "codec", "mp4"),
        (("--no-antialias",), "antialias", False),
        (("--preset", "latte-sky"), "centre", "round"),
        (("--preset", "cmd", "--resize", "crop"), "resize", "crop"),
    ],
)
def test_an_option_arrives(flags: tuple[object, ...], name: str, value: object) -> None:
    assert getattr(rules(*flags), name) == value


def test_filters_arrive() -> None:
    flags = {"min-fps": 5, "max-fps": 60, "min-size": 64, "max-pixels": 99, "min-seconds": 1, "max-seconds": 9, "min-motion": 0.1}
    given = [text for name, value in flags.items() for text in (f"--{name}", value)]
    assert rules(*given, "--max-motion", 0.9, "--drop-black").filters == FilterRules(5, 60, 64, 99, 1, 9, 0.1, 0.9, True)


@pytest.mark.parametrize("name", sorted(RELEASES))
def test_presets_are_what_the_releases_do(name: str) -> None:
    made = rules("--preset", name)
    assert {field: getattr(made, field) for field in RELEASES[name]} == RELEASES[name]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image_sise", 3, 3), "did you mean --image-size?"),
        (("--fps", "fast"), "'fast' is not a number from 0 to 1000"),
        (("--fps", "nan"), "is not a number"),
        (("--fps", "inf"), "is not a number"),
        (("--fps", 1e9), "from 0 to 1000"),
        (("--frames-fps", 0), "from 0.01 to 1000"),
        (("--max-motion", 2), "from 0 to 1"),
        (("--max-rejects", -1), "from 0 to 1"),
        (("--resize", "squash"), "invalid choice: 'squash'"),
        (("--dedupe", "near"), "not a whole number"),
        (("--clip-length",), "expected one argument"),
    ],
)
def test_a_mistake_is_one_line(flags: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_help_names_commands_and_layouts() -> None:
    printed = call("--help")
    assert all(name in printed for name in ("shards", "inspect", "verify", "latents"))
    printed = call("shards", "--help")
    assert all(f"  {name} " in printed and source.summary in printed for name, source in SOURCES.items())
    assert all(f"{group}:\n" in printed for group in ("what", "clips", "filters", "storage and speed", "many machines", "synthetic-digits"))
