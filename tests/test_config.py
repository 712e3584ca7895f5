"""Configuration: layers, spellings, casts by field type, one-line errors, lossless YAML."""

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import dump_yaml, flag, from_dict, load_config, load_yaml, save_yaml, to_dict
from utils.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    lr: float = flag(1e-4, "lr")
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""


@dataclass(frozen=True)
class Data:
    path: str = flag("", "data-path")
    """Shard set."""
    image_size: tuple[int, int] = flag((0, 0), "image-size")
    """Height and width."""
    flip: bool = flag(False, "flip")
    """Mirror."""
    tags: list[str] = flag([], "tags")
    """Any number of words."""
    cache: Path | None = None
    """Folder."""


@dataclass(frozen=True)
class Model:
    depth: int = 8
    """Layers."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether."""


@dataclass(frozen=True)
class Config:
    """Trains something."""

    system: str = "cmd"
    """System."""
    stage: str = "autoencoder"
    """Stage."""
    resume: str = flag("none", "resume", bare="auto")
    """Go on."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)


def load(*argv: str, **kwargs: str) -> Config:
    return load_config({"cmd": Config}, list(argv), prog="train_ae.py", **kwargs)


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(inspect.cleandoc(text))
    return str(path)


def test_defaults_then_files_in_order_then_flags(tmp_path: Path) -> None:
    first = recipe(tmp_path, "optim: {lr: 1e-3}\nmodel: {depth: 2}\ndata: {flip: on}")
    second = recipe(tmp_path, "model: {depth: 3}", "second.yaml")
    assert load().optim.lr == 1e-5, "the default of the stage, not of the group"
    config = load("--config", first, f"--config={second}", "--model.depth", "4")
    assert (config.optim.lr, config.model.depth, config.data.flip) == (1e-3, 4, True)
    assert load("--config", first, "--config", second).model.depth == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "3e-5", "--image-size", "64", "32", "--flip"],
        ["--lr=3e-5", "--image_size", "64", "32", "--flip", "true"],
        ["--optim.lr", "3e-5", "--data.image-size=64,32", "--data.flip=on"],
        ["optim.lr=3e-5", "data.image_size=[64,32]", "flip=yes"],
        ["lr=3e-5", "image-size=64", "32", "--no-flip", "--flip"],
        ["--optim.lr=.00003", "--data.image_size", "64", "32", "--data.no-flip", "--no-data.flip", "--flip=1"],
    ],
)
def test_spellings_mean_the_same(argv: list[str]) -> None:
    config = load(*argv)
    assert (config.optim.lr, config.data.image_size, config.data.flip) == (3e-5, (64, 32), True)


def test_values_that_look_like_something_else() -> None:
    assert load("--optim.betas", "-1", "1e-3").optim.betas == (-1.0, 1e-3)
    assert load("--data.cache", "none").data.cache is None
    assert load("--data.cache", "~/x").data.cache == Path.home() / "x"
    assert load("--tags", "a", "b", "--lr", "1").data.tags == ["a", "b"]
    assert load("--tags").data.tags == []
    assert load("--model.depth", "1e3").model.depth == 1000
    assert load("--data-path", "a=b").data.path == "a=b"
    assert (load("--resume").resume, load("--resume", "here").resume) == ("auto", "here")
    assert load("--model.compile", "ON").model.compile == "on"


def test_yaml_values_are_cast_by_field_type(tmp_path: Path) -> None:
    """The traps of PyYAML: `1e-5` read as a text, `on` as a boolean, dates and octal numbers."""
    path = recipe(
        tmp_path,
        "optim: {lr: 1e-5, betas: [1, 2e-1]}\nmodel: {compile: on, depth: 8.0}\ndata: {path: on, flip: off, tags: [2024-01-01, 010, no]}",
    )
    config = load("--config", path)
    assert config.optim == Optim(lr=1e-5, betas=(1.0, 0.2))
    assert config.model == Model(8, "on")
    assert config.data == Data(path="on", flip=False, tags=["2024-01-01", "010", "no"])


def test_one_recipe_serves_several_stages(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "system: cmd\nmodel: {depth: 2}\nstages:\n  autoencoder: {model.depth: 3, optim: {lr: 2}}\n  content: {unknown: 1}"
    )
    assert (load("--config", path).model.depth, load("--config", path).optim.lr) == (3, 2.0)
    with pytest.raises(ConfigError, match=r"recipe.yaml: unknown stage 'contnt'; did you mean 'content'\?"):
        load("--config", recipe(tmp_path, "stages: {contnt: {}}"))
    with pytest.raises(ConfigError, match=r"has no stage 'autoencoder', which train_ae.py trains \(its stages: motion\)"):
        load("--config", recipe(tmp_path, "stages: {motion: {}}"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown flag '--lrr'; did you mean '--lr'?"),
        (["--mode.depth", "1"], "unknown flag '--mode.depth'; did you mean '--model.depth'?"),
        (["--depth", "1"], "unknown flag '--depth'; did you mean '--model.depth'?"),
        (["--data_pth=x"], "unknown flag '--data_pth'; did you mean '--data-path'?"),
        (["--qqqq", "1"], "unknown flag '--qqqq'; --help lists all flags"),
        (["lrr=1"], "unknown flag 'lrr'; did you mean '--lr'?"),
        (["--lr", "abc"], "--lr: 'abc' given, a number is wanted"),
        (["--lr"], "--lr: a value is missing"),
        (["--model.depth", "2.5"], "--model.depth: '2.5' given, a whole number is wanted"),
        (["--image-size", "64"], "--image-size: '64' given, 2 values are wanted (2 x whole number)"),
        (["--image-size", "64", "x"], "--image-size: 'x' given, a whole number is wanted"),
        (["--image-size", "1", "2", "3"], "unexpected argument '3' after --image-size: settings are given as --name value or name=value"),
        (["--optim.schedule", "cosin"], "--optim.schedule: 'cosin' given, one of constant, cosine is wanted; did you mean 'cosine'?"),
        (["--flip", "maybe"], "unexpected argument 'maybe' after --flip: settings are given as --name value or name=value"),
        (["--flip=maybe"], "--flip: 'maybe' given, true or false is wanted"),
        (["--no-flip=true"], "--no-flip: takes no value"),
        (["--no-lr"], "unknown flag '--no-lr'; --help lists all flags"),
        (["stray"], "unexpected argument 'stray': settings are given as --name value or name=value"),
        (["--config"], "--config: the path of a YAML file is wanted"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--system", "latte"], "--system: this is a config of the system 'latte'; train_ae.py trains: cmd"),
        (
            ["--stage", "content"],
            "--stage: this is a config of the stage 'content'; train_ae.py trains the stage 'autoencoder': use train_content_diffusion.py",
        ),
    ],
)
def test_a_wrong_command_line_is_one_precise_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr: 1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("depth: 1", "unknown key 'depth'; did you mean 'model.depth'?"),
        ("optim: {lr: fast}", "optim.lr: 'fast' given, a number is wanted"),
        ("optim: {lr: yes}", "optim.lr: 'yes' given, a number is wanted"),
        ("model: {depth: true}", "model.depth: True given, a whole number is wanted"),
        ("data: {image_size: 64}", "data.image_size: 64 given, 2 values are wanted (2 x whole number)"),
        ("data: {path: 1.10}", "data.path: 1.1 given, a text (in quotes) is wanted"),
        ("optim: fast", "'optim' is a group of settings, not a value (its keys: lr, betas, schedule)"),
        ("system: hvdm", "this is a config of the system 'hvdm'; train_ae.py trains: cmd"),
        (
            "stage: motion",
            "this is a config of the stage 'motion'; train_ae.py trains the stage 'autoencoder': use train_motion_diffusion.py",
        ),
        ("- 1", "a mapping of settings is wanted at the top"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load("--config", path)
    assert str(caught.value) == f"{path}: {message}"


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml, line 2: not valid YAML \(the key 'depth' stands twice\)"):
        load("--config", recipe(tmp_path, "model: {depth: 1,\n depth: 2}"))
    with pytest.raises(ConfigError, match=r"recipe.yaml, line 1: not valid YAML"):
        load("--config", recipe(tmp_path, "a: b: c"))
    with pytest.raises(ConfigError, match=r"cannot be read \(IsADirectoryError\)"):
        load_yaml(tmp_path)


def test_help_shows_every_flag_with_meaning_default_and_aliases(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        load("--help", description="Trains something.")
    assert caught.value.code == 0
    text = re.sub("\x1b.*?m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(re.sub(r"[\u2502|]", " ", text).split())
    assert "--lr FLOAT, --optim.lr FLOAT Learning rate. (default: 1e-05)" in words
    assert "--flip, --no-flip, --data.flip, --data.no-flip Mirror. (default: False)" in words
    assert "--image-size INT INT, --data.image-size INT INT Height and width. (default: 0 0)" in words
    assert "--optim.schedule {constant,cosine}" in words


def test_help_is_printed_by_one_rank_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert (caught.value.code, capsys.readouterr().out) == (0, "")


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_yaml(path, {"a": 1})
    save_yaml(path, {"b": [1.0, None, "on"]})
    assert load_yaml(path) == {"b": [1.0, None, "on"]}
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ["1e-5", "on", "null", "~", "0o7", "1_0", ".5", "2024-01-01", "<<", "[", "- a", "a: b", "#"]
)
_number = st.floats(allow_nan=False)
_configs = st.builds(
    Config,
    resume=_text,
    optim=st.builds(Optim, lr=_number, betas=st.tuples(_number, _number), schedule=st.sampled_from(["constant", "cosine"])),
    data=st.builds(
        Data,
        path=_text,
        image_size=st.tuples(st.integers(), st.integers()),
        flip=st.booleans(),
        tags=st.lists(_text, max_size=3),
        cache=st.none() | st.sampled_from([Path("a/b"), Path("1e-5"), Path("/on")]),
    ),
    model=st.builds(Model, depth=st.integers(), compile=st.sampled_from(["auto", "on", "off"])),
)


@given(config=_configs)
@settings(max_examples=200, deadline=None)
def test_any_config_survives_the_file(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    save_yaml(path, to_dict(config))
    assert from_dict(Config, load_yaml(path), "round.yaml") == config
    assert load("--config", str(path)) == config
    assert dump_yaml(load_yaml(path)) == path.read_text()


def test_flag_copies_mutable_defaults() -> None:
    assert Data().tags is not Data().tags
    made = dataclasses.make_dataclass("Made", [("table", dict[str, int], flag(dict, "table"))])
    assert made().table == {}
    assert from_dict(made, {"table": {"a": 1.0}}, "here").table == {"a": 1}


@dataclass(frozen=True)
class Sets:
    """Several shard sets."""

    system: str = "cmd"
    """System."""
    path: tuple[str, ...] = flag((), "data-path")
    """Shard sets."""
    weights: tuple[float, ...] = flag((), "data-weights")
    """Their weights."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data-path", "one"], ("one",)),
        (["--data-path", "pipe:ssh host cat /a, b/{}"], ("pipe:ssh host cat /a, b/{}",)),
        (["--data-path", "one", "some where", "--data-weights", "3", "1"], ("one", "some where")),
        (["--data-path=[x] y"], ("[x] y",)),
        (["--data-path", ""], ()),
    ],
)
def test_one_text_is_one_item_of_a_row_of_texts(argv: list[str], expected: tuple[str, ...]) -> None:
    found = load_config({"cmd": Sets}, argv, prog="x")
    assert found.path == expected
    assert found.weights == ((3.0, 1.0) if "3" in argv else ())
    assert from_dict(Sets, to_dict(found), "again") == found


def test_a_recipe_names_one_path_or_several(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, expected in (("path: some where", ("some where",)), ("path: [a, 'b c']", ("a", "b c")), ("path: []", ())):
        recipe.write_text(f"{text}\nweights: 1, 2\n")
        found = load_config({"cmd": Sets}, ["--config", str(recipe)], prog="x")
        assert (found.path, found.weights) == (expected, (1.0, 2.0))
