"""Dataclasses as the schema of a configuration: their leaves by dotted name, and values cast to a field's declared type.

YAML files and the command line meet here, so that both follow the same rules and both fail with the same one-line errors.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from utils.errors import ConfigError

T = TypeVar("T")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
BOOLEAN_WORDS = _TRUE + _FALSE
_NULL = ("null", "none", "~")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path, declared type and short names."""

    path: str
    type: Any
    aliases: tuple[str, ...] = ()
    bare: Any = None
    """Value of the flag when none follows it; None: one must follow."""

    @property
    def count(self) -> int | None:
        """Values that follow the flag on a command line; None: any number."""
        kind = _strip_optional(self.type)
        if get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis):
            return None
        return len(get_args(kind)) if get_origin(kind) is tuple else 1

    @property
    def is_flag(self) -> bool:
        return _strip_optional(self.type) is bool


def fields_of(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """(field, resolved type) of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls) if f.init]


def leaves(cls: type, prefix: str = "") -> dict[str, Leaf]:
    """Dotted path -> leaf, in the order of declaration; nested dataclasses are groups."""
    found: dict[str, Leaf] = {}
    for item, kind in fields_of(cls):
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(kind):
            found |= leaves(typing.cast(type, kind), f"{path}.")
        else:
            found[path] = Leaf(path, kind, tuple(item.metadata.get("aliases", ())), item.metadata.get("bare"))
    return found


def flatten(mapping: Mapping[str, Any], known: Mapping[str, Leaf], where: str, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted path -> value. An unknown key is a ConfigError that names `where` and the nearest valid key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}".replace("-", "_")
        is_group = any(name.startswith(f"{path}.") for name in known)
        if path in known:
            flat[path] = value
        elif is_group and (value is None or isinstance(value, Mapping)):
            flat |= flatten(value or {}, known, where, f"{path}.")
        elif is_group:
            raise ConfigError(f"{where}: '{path}' is a group of settings, not a value (its keys: {_children(path, known)})")
        else:
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'{suggest(path, names(known))}")
    return flat


def build(cls: type[T], values: Mapping[str, tuple[Any, str]], base: T | None = None, prefix: str = "") -> T:
    """Instance of `cls`: `values` (dotted path -> value and where it came from) over `base`, or over the field defaults."""
    given: dict[str, Any] = {}
    for item, kind in fields_of(cls):
        path = f"{prefix}{item.name}"
        start = _default(item) if base is None else getattr(base, item.name)
        if path in values:
            given[item.name] = cast(kind, *values[path])
        elif dataclasses.is_dataclass(kind):
            given[item.name] = build(typing.cast(type, kind), values, None if start is dataclasses.MISSING else start, f"{path}.")
        elif start is dataclasses.MISSING:
            raise ConfigError(f"'{path}' is missing: it has no default")
        else:
            given[item.name] = start
    try:
        return cls(**given)
    except ValueError as error:  # the dataclass's own check of its values
        raise ConfigError(f"{prefix.rstrip('.') or cls.__name__}: {error}") from None


def cast(kind: Any, value: Any, where: str) -> Any:
    """`value` (from YAML, or a string) as `kind`; ConfigError naming `where`, what was given and what is wanted."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in _NULL):
            return None
        return cast(_strip_optional(kind), value, where)
    if origin is Literal:
        return _cast_choice(args, value, where)
    if origin in (tuple, list):
        return _cast_sequence(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {_show(value)} given, a mapping is wanted")
        return {cast(args[0], k, where): cast(args[1], v, f"{where}.{k}") for k, v in value.items()}
    try:
        return _SCALARS[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{where}: {_show(value)} given, {_WANTED[kind]} is wanted") from None


def plain(value: Any) -> Any:
    """A config value as YAML holds it: mappings, lists, strings, numbers, booleans, None."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def names(known: Mapping[str, Leaf]) -> dict[str, str]:
    """Every way to write a setting (dotted path, alias, last part of the path), with underscores -> the name to suggest."""
    table: dict[str, str] = {path.rsplit(".", 1)[-1]: path for path in reversed(list(known))}
    table |= {alias.replace("-", "_"): leaf.path for leaf in known.values() for alias in leaf.aliases}
    return table | {path: path for path in known}


def suggest(name: str, candidates: Mapping[str, str] | Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing when no candidate is near."""
    table = dict(candidates) if isinstance(candidates, Mapping) else {c: c for c in candidates}
    near = difflib.get_close_matches(name, table, n=1) or difflib.get_close_matches(name.rsplit(".", 1)[-1], table, n=1)
    return f"; did you mean '{table[near[0]]}'?" if near else ""


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _children(path: str, known: Mapping[str, Leaf]) -> str:
    return ", ".join(dict.fromkeys(name[len(path) + 1 :].split(".")[0] for name in known if name.startswith(f"{path}.")))


def _strip_optional(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [a for a in get_args(kind) if a is not type(None)]
        assert len(rest) == 1, f"{kind}: a setting has one type, or one type and None"
        return rest[0]
    return kind


def _cast_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    text = _text(value)
    for choice in choices:
        if text.lower() == _text(choice).lower():
            return choice
    listed = ", ".join(str(choice) for choice in choices if choice != "")
    raise ConfigError(f"{where}: {_show(value)} given, one of {listed} is wanted{suggest(text, map(str, choices))}")


def _cast_sequence(kind: Any, value: Any, where: str) -> Any:
    args = get_args(kind)
    if isinstance(value, str):
        # One text is one item of a sequence of texts: paths and commands hold spaces and commas.
        items: Any = [value] * bool(value) if args[0] is str else [v for v in value.strip("[]() ").replace(",", " ").split() if v]
    else:
        items = value
    if not isinstance(items, list | tuple):
        items = [items]
    fixed = get_origin(kind) is tuple and args[-1] is not Ellipsis
    if fixed and len(items) != len(args):
        raise ConfigError(f"{where}: {_show(value)} given, {len(args)} values are wanted ({len(args)} x {_name(args[0])})")
    kinds = args if fixed else (args[0],) * len(items)
    return get_origin(kind)(cast(k, v, where) for k, v in zip(kinds, items, strict=True))


def _name(kind: Any) -> str:
    return _WANTED[kind].split(" ", 1)[-1] if kind in _WANTED else str(kind)


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _show(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else repr(list(value) if isinstance(value, tuple) else value)


def _to_bool(value: Any) -> bool:
    text = _text(value).lower()
    if text not in BOOLEAN_WORDS:
        raise ValueError
    return text in _TRUE


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    try:
        return int(value) if isinstance(value, int | str) else _whole(value)
    except ValueError:
        return _whole(float(value))


def _whole(number: float) -> int:
    if not float(number).is_integer():
        raise ValueError
    return int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _to_str(value: Any) -> str:
    # A float has lost its spelling (1.10 -> 1.1): such a name needs quotes in the file.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


_SCALARS: dict[Any, Any] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: lambda v: Path(_to_str(v)).expanduser()}
_WANTED: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text (in quotes)", Path: "a path"}
