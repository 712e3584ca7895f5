"""Configuration: dataclasses are the schema, YAML files the recipes, the command line overrides any field."""

import dataclasses
from typing import Any


def flag(default: Any, *aliases: str) -> Any:
    """A dataclass field with short flags beside its dotted name: `lr: float = flag(1e-4, "lr")`."""
    return dataclasses.field(default=default, metadata={"aliases": aliases})
