"""What all official checkpoints have in common: a state dict inside a training checkpoint, prefixes, and names that must all be known."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Tensor]


class NamesError(ValueError):
    """Names that only one side has: `missing` from a state dict, and `unknown` in it, both as the release has them."""

    def __init__(self, missing: Iterable[str], unknown: Iterable[str]) -> None:
        self.missing, self.unknown = sorted(missing), sorted(unknown)
        problems = [f"missing {_some(self.missing)}"] * bool(self.missing) + [f"unknown {_some(self.unknown)}"] * bool(self.unknown)
        super().__init__(f"the state dict does not fit: {'; '.join(problems)}")


def unwrap(checkpoint: Mapping[str, Any], *entries: str) -> State:
    """The tensors of a state dict, taken from the first of `entries` that a training checkpoint has; DDP's "module." prefix is cut off.

    Raises ValueError when it holds no state dict at all.
    """
    state = next((checkpoint[entry] for entry in entries if isinstance(checkpoint.get(entry), Mapping)), checkpoint)
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"no state dict in the checkpoint: it has {_some(checkpoint)}, expected one of {', '.join(entries)} or bare tensors"
        )
    return tensors


def check_names(found: Iterable[str], required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises NamesError, a ValueError that names missing and unknown names."""
    found, required = set(found), set(required)
    missing, unknown = required - found, found - required - set(optional)
    if missing or unknown:
        raise NamesError(missing, unknown)


def depth_of(names: Iterable[str], prefix: str) -> int:
    """Number of layers: one more than the largest number that follows `prefix`. Raises ValueError when there is none."""
    following = [name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)]
    numbers = [int(text) for text in following if text.isdecimal()]
    if not numbers:
        raise ValueError(f"the state dict does not fit: nothing is called {prefix}0.*")
    return max(numbers) + 1


def _some(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
