"""Configuration: dataclasses are the schema, YAML files the recipes, the command line overrides any field.

A recipe may serve the stages of one system: what stands under `stages: {<stage>: {...}}` counts for that stage only.

    system: cmd
    data: {num_workers: 2}            # every stage
    stages:
      autoencoder: {optim: {lr: 1e-5}, model: {depth: 8}}
      content: {optim: {lr: 1e-4}}
"""

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from utils.errors import ConfigError
from utils.schema import BOOLEAN_WORDS, Leaf, build, fields_of, flatten, leaves, names, plain, suggest
from utils.yamlfile import dump_yaml, load_yaml, save_yaml

__all__ = ["dump_yaml", "flag", "from_dict", "load_config", "load_yaml", "save_yaml", "to_dict"]

T = TypeVar("T")
Values = dict[str, tuple[Any, str]]
"""Dotted path -> (value, where it was written)."""

_HOW_TO_SET = """Settings: the defaults, then each --config FILE (YAML) in order, then the flags below.
Dashes and underscores are the same; --group.name=value and group.name=value work too."""

STAGE_SCRIPTS = {
    "autoencoder": "train_ae.py",
    "content": "train_content_diffusion.py",
    "motion": "train_motion_diffusion.py",
    "denoiser": "train_dit.py",
}


def flag(default: Any, *aliases: str, bare: Any = None) -> Any:
    """A dataclass field with short flags beside its dotted name: `lr: float = flag(1e-4, "lr")`.

    A callable default is a factory, a list or dict is copied. `bare` is the value of the flag given without one (`--resume`).
    """
    metadata = {"aliases": aliases, "bare": bare}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(schemas: Mapping[str, type[T]], argv: Sequence[str] | None = None, *, prog: str, description: str = "") -> T:
    """The config of a script: dataclass defaults < each `--config FILE` in order < the other flags.

    `schemas` maps the name of each system that the script knows to its dataclass; the first is the default. A script to which systems
    are all the same gives one schema, named "". `--help` prints every flag and exits.
    Raises ConfigError with one line for anything that is not understood.
    """
    tokens, files, wants_help = _split_argv(sys.argv[1:] if argv is None else argv)
    recipes = [(load_yaml(path), path) for path in files]
    schema = schemas[_choose_system(schemas, recipes, tokens, prog)]
    known = leaves(schema)
    values: Values = {}
    for recipe, path in recipes:
        for part in _parts(recipe, schema, path, prog):
            values |= {key: (value, f"{path}: {key}") for key, value in flatten(part, known, path).items()}
    if wants_help:
        _print_help(schema, build(schema, values), prog, description)
    flags = _parse_flags(tokens, known)
    if "stage" in flags:
        _check_stage(flags["stage"][0], _stage_of(schema), "--stage: ", prog)
    return build(schema, values | flags)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass: what `from_dict` and a YAML file take back."""
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Dataclass from plain nested values, cast by field type; `where` names their origin in errors."""
    flat = flatten(mapping, leaves(cls), where)
    return build(cls, {key: (value, f"{where}: {key}") for key, value in flat.items()})


def _split_argv(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """(tokens that set values, paths given to --config, whether help is wanted)."""
    tokens: list[str] = []
    files: list[str] = []
    pending = iter(argv)
    for token in pending:
        if token == "--config":
            path = next(pending, "")
            if not path or path.startswith("--"):
                raise ConfigError("--config: the path of a YAML file is wanted")
            files.append(path)
        elif token.startswith("--config="):
            files.append(token.removeprefix("--config="))
        elif token not in ("-h", "--help"):
            tokens.append(token)
    return tokens, files, "-h" in argv or "--help" in argv


def _choose_system(schemas: Mapping[str, type], recipes: list[tuple[dict[str, Any], str]], tokens: list[str], prog: str) -> str:
    chosen, where = next(iter(schemas)), ""
    if not chosen:
        return chosen
    for recipe, path in recipes:
        if "system" in recipe:
            chosen, where = recipe["system"], f"{path}: "
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        name, _, value = token.removeprefix("--").partition("=")
        if name == "system":
            chosen, where = value or following, "--system: "
    if chosen not in schemas:
        known = ", ".join(schemas)
        raise ConfigError(f"{where}this is a config of the system '{chosen}'; {prog} trains: {known}{suggest(str(chosen), list(schemas))}")
    return chosen


def _parts(recipe: dict[str, Any], schema: type, path: str, prog: str) -> list[dict[str, Any]]:
    """The parts of a recipe that count for this schema's stage, weakest first."""
    stage = _stage_of(schema)
    common = {key: value for key, value in recipe.items() if key != "stages"}
    if "stage" in common:
        _check_stage(common["stage"], stage, f"{path}: ", prog)
    if "stages" not in recipe:
        return [common]
    stages = recipe["stages"]
    if not isinstance(stages, dict) or not all(isinstance(part, dict) for part in stages.values()):
        raise ConfigError(f"{path}: 'stages' maps the name of a stage to its settings")
    for name in stages:
        if name not in STAGE_SCRIPTS:
            raise ConfigError(f"{path}: unknown stage '{name}'{suggest(str(name), list(STAGE_SCRIPTS))}")
    if stage is not None and stage not in stages:
        raise ConfigError(f"{path}: has no stage '{stage}', which {prog} trains (its stages: {', '.join(map(str, stages))})")
    return [common, stages[stage]] if stage is not None else [common]


def _stage_of(schema: type) -> str | None:
    return next((str(f.default) for f in dataclasses.fields(schema) if f.name == "stage"), None)


def _check_stage(given: Any, stage: Any, where: str, prog: str) -> None:
    if given != stage:
        remedy = f": use {STAGE_SCRIPTS[given]}" if given in STAGE_SCRIPTS else suggest(str(given), list(STAGE_SCRIPTS))
        raise ConfigError(f"{where}this is a config of the stage '{given}'; {prog} trains the stage '{stage}'{remedy}")


def _parse_flags(tokens: list[str], known: Mapping[str, Leaf]) -> Values:
    """`--a.b 1`, `--a.b=1`, `a.b=1`, `--alias 1`, `--switch`, `--no-switch`, `--pair 1 2`; dashes and underscores alike."""
    table = {path: leaf for leaf in known.values() for path in (leaf.path, *(alias.replace("-", "_") for alias in leaf.aliases))}
    values: Values = {}
    position, last = 0, ""
    while position < len(tokens):
        name, has_value, value = tokens[position].removeprefix("--").partition("=")
        if not tokens[position].startswith("--") and not has_value:
            after = f" after {last}" if last else ""
            raise ConfigError(f"unexpected argument '{name}'{after}: settings are given as --name value or name=value")
        leaf, negated = _find(name, table)
        if leaf is None:
            raise ConfigError(f"unknown flag '{tokens[position].partition('=')[0]}'{_suggest_flag(name, known)}")
        given, position, last = [value] if has_value else [], position + 1, f"--{name}"
        while not negated and position < len(tokens) and _takes(leaf, given, tokens[position], table):
            given.append(tokens[position])
            position += 1
        values[leaf.path] = (_value(leaf, given, negated, last), last)
    return values


def _value(leaf: Leaf, given: list[str], negated: bool, name: str) -> Any:
    """What a flag was given, still uncast: one string, several, or what the flag alone means."""
    if negated and given:
        raise ConfigError(f"{name}: takes no value")
    if given or leaf.count is None:
        return given[0] if len(given) == 1 else given
    if leaf.is_flag:
        return not negated
    if leaf.bare is None:
        raise ConfigError(f"{name}: a value is missing")
    return leaf.bare


def _find(name: str, table: Mapping[str, Leaf]) -> tuple[Leaf | None, bool]:
    """(leaf, whether it is negated) for a flag's name; `--no-flip`, `--no-data.flip` and `--data.no-flip` switch off."""
    name = name.replace("-", "_")
    if name in table:
        return table[name], False
    positive = name.removeprefix("no_") if name.startswith("no_") else name.replace(".no_", ".", 1)
    leaf = table.get(positive)
    return (leaf, True) if leaf is not None and leaf.is_flag else (None, False)


def _takes(leaf: Leaf, given: list[str], token: str, table: Mapping[str, Leaf]) -> bool:
    """Whether the flag that is being read takes `token` as its next value."""
    if token.startswith("--") or ("=" in token and _find(token.partition("=")[0], table)[0] is not None):
        return False
    if leaf.is_flag:
        return not given and token.lower() in BOOLEAN_WORDS
    return leaf.count is None or len(given) < leaf.count


def _suggest_flag(name: str, known: Mapping[str, Leaf]) -> str:
    table = {}
    for key, path in names(known).items():
        short = key if key in (alias.replace("-", "_") for alias in known[path].aliases) else path
        table[key] = f"--{short.replace('_', '-')}"
    return suggest(name.replace("-", "_"), table) or "; --help lists all flags"


def _print_help(schema: type[T], defaults: T, prog: str, description: str) -> None:
    """Every flag with its meaning, default and aliases, on rank 0; then exit."""
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(0)
    import tyro  # needed for help only

    lines = [*description.splitlines(), "", *_HOW_TO_SET.splitlines()]
    # tyro keeps the line breaks before lines that do not begin with a letter, and doubles those of empty ones.
    about = "\n".join(f"  {line}" for line in lines)
    shown = _with_aliases(schema, defaults, tyro.conf.arg)
    try:
        tyro.cli(shown, prog=prog, description=about, args=["--help"])
    except BrokenPipeError:  # `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _with_aliases(cls: type, defaults: Any, arg: Callable[..., Any], prefix: str = "") -> type:
    """Subclass of a config dataclass whose fields carry their aliases and the given defaults, as tyro reads them."""
    fields: list[tuple[str, Any, Any]] = []
    for item, kind in fields_of(cls):
        value = getattr(defaults, item.name)
        if dataclasses.is_dataclass(kind):
            group = _with_aliases(kind, value, arg, f"{prefix}{item.name}.")  # type: ignore[arg-type]
            fields.append((item.name, group, dataclasses.field(default_factory=group)))
        else:
            name = f"{prefix}{item.name}".replace("_", "-")
            marked: Any = Annotated[kind, arg(aliases=[f"--{alias}" for alias in item.metadata.get("aliases", ()) if alias != name])]
            fields.append((item.name, marked, dataclasses.field(default_factory=functools.partial(copy.copy, value))))
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)
