"""YAML files of plain values: read by YAML 1.2's rules, written so that every value comes back exactly."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from utils.errors import ConfigError
from utils.files import atomic_write_text
from utils.schema import plain


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text of plain values, in their order; floats keep every bit."""
    return yaml.dump(plain(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_yaml(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Write a YAML file whole or not at all."""
    atomic_write_text(Path(path), dump_yaml(mapping))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping ({} when empty). Scalars follow YAML 1.2: `1e-5` is a number, `on`, `no` and dates are texts."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error.__class__.__name__})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or 'cannot be parsed'})") from None
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{path}: a mapping of settings is wanted at the top")
    return loaded or {}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars instead of PyYAML's: `1e-5` is a float, `on` and `yes` stay texts, and a key stands once."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key '{key_node.value}' stands twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what both `_Loader` and plain PyYAML read back alike."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _tag, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"0|-?[1-9][0-9]*"), list("-0123456789")),
    ("float", re.compile(rf"(?!(0|-?[1-9][0-9]*|[-+]?0[0-9]+)$)({_NUMBER.pattern})"), list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
):
    _anchored = re.compile(rf"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
