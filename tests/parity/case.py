"""A parity case: one safetensors file of recorded inputs, weights and outputs, and the adapters that check our code against it.

A case remembers every tensor and every config field that was asked for, so that the runner can refuse a check that looked away.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Adapter = Callable[["Case"], None]
ADAPTERS: dict[tuple[str, str], Adapter] = {}
REQUIRED = object()


def adapter(system: str, module: str) -> Callable[[Adapter], Adapter]:
    """Registers a function that checks the cases of (system, module). It lives in adapters_<system>.py beside this file."""

    def register(function: Adapter) -> Adapter:
        assert (system, module) not in ADAPTERS, f"two adapters for {system}/{module}"
        ADAPTERS[system, module] = function
        return function

    return register


class Fields(Mapping[str, Any]):
    """The config of a case as a mapping that remembers which leaves were read; nested mappings are Fields too, lists are leaves.

    `Config(**fields)` reads all of them, which is fair: a dataclass refuses what it does not know.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._prefix = prefix
        self._values = {k: Fields(v, f"{prefix}{k}.") if isinstance(v, Mapping) else v for k, v in values.items()}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """Dotted names of the leaves that nobody asked for."""
        names = []
        for key, value in self._values.items():
            if isinstance(value, Fields):
                names += value.unread()
            elif key not in self._read:
                names.append(f"{self._prefix}{key}")
        return names


class Case:
    """One file. Tensors are read on demand; names are those of the file: in/, state/, out/, grad/, grad_norm/ ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(str(path), framework="pt")
        metadata = self._file.metadata() or {}
        self.system = metadata.get("system", "")
        self.module = metadata.get("module", "")
        self.case = metadata.get("case", "")
        self.notes = metadata.get("notes", "")
        self.weights = metadata.get("weights", "stored")
        self.loss = metadata.get("loss", "")
        self.fields = Fields(json.loads(metadata.get("config") or "{}"))
        self.agreement: dict[str, float] = {}
        self.errors: list[str] = []
        self._names = sorted(self._file.keys())
        self._used: set[str] = set()

    def config(self, name: str, default: Any = REQUIRED) -> Any:
        """A config field by its dotted name ("ae.dim"); nested groups come back as Fields. KeyError if absent and no default."""
        value: Any = self.fields
        for part in name.split("."):
            if default is not REQUIRED and part not in value:
                return default
            value = value[part]
        return value

    def has(self, name: str) -> bool:
        """Is there a tensor of this full name ("out/vb")?"""
        return name in self._names

    def names(self, prefix: str = "") -> list[str]:
        """Full names of the tensors under a prefix ("out/"), sorted."""
        return [name for name in self._names if name.startswith(prefix)]

    def tensor(self, name: str) -> Tensor:
        """A tensor by its full name; counts as used."""
        if name not in self._names:
            raise KeyError(f"{self.path.name} has no tensor {name}")
        self._used.add(name)
        return self._file.get_tensor(name)

    def input(self, name: str) -> Tensor:
        """The tensor in/<name>."""
        return self.tensor(f"in/{name}")

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under a prefix, which is cut off their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """The release's state dict: all of state/<prefix>, with the prefix ("ae/") cut off."""
        return self.group(f"state/{prefix}")

    def expect(self, name: str, actual: Tensor, rel: float = 1e-5, abs: float = 0.0, each: bool = False) -> None:
        """`actual` must be out/<name> within rel of its largest value (each=True: of each value) plus abs; integers exactly.

        A file need not record everything that an adapter could check: what it lacks is passed over here, and in expect_grad.
        """
        if self.has(f"out/{name}"):
            self.compare(f"out/{name}", actual, rel, abs, each)

    def expect_grad(self, name: str, actual: Tensor | None, rel: float = 1e-5, abs: float = 0.0) -> None:
        """A whole gradient against grad/<name>."""
        if self.has(f"grad/{name}"):
            assert actual is not None, f"{name} has no gradient"
            self.compare(f"grad/{name}", actual, rel, abs)

    def expect_grad_norms(self, grads: Mapping[str, Tensor], group: str = "grad_norm", rel: float = 1e-5, abs: float = 0.0) -> None:
        """Norms of gradients, named as in the release, against everything under <group>/."""
        for name in self.names(f"{group}/"):
            key = name.removeprefix(f"{group}/")
            if key in grads:
                self.compare(name, grads[key].norm().reshape(self.tensor(name).shape), rel, abs)  # () or (1,)
            else:
                self.errors.append(f"{name}: ours has no gradient of that name")
                self._used.add(name)

    def compare(self, name: str, actual: Tensor, rel: float, abs: float = 0.0, each: bool = False) -> None:
        """Records where `actual` differs from the stored tensor of this full name."""
        expected = self.tensor(name)
        actual = actual.detach().cpu()
        if actual.shape != expected.shape:
            self.errors.append(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        elif actual.is_floating_point() != expected.is_floating_point():
            self.errors.append(f"{name}: {actual.dtype}, expected {expected.dtype}")
        elif expected.numel() and not expected.is_floating_point():
            if not torch.equal(actual.long(), expected.long()):
                self.errors.append(f"{name}: integers differ")
        elif expected.numel():
            self._compare_floats(name, actual.double(), expected.double(), rel, abs, each)

    def _compare_floats(self, name: str, actual: Tensor, expected: Tensor, rel: float, abs: float, each: bool) -> None:
        finite = expected.isfinite()
        if not torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0)):
            self.errors.append(f"{name}: other infinities or NaNs than expected")
            return
        actual, expected = actual[finite], expected[finite]
        if not expected.numel():
            return
        difference = (actual - expected).abs()
        scale = expected.abs() if each else expected.abs().max()
        self.agreement[name] = float((difference / scale.clamp(min=1e-300)).max())
        excess = difference - (rel * scale + abs)
        if not bool((excess <= 0).all()):
            worst = float(difference.max())
            relative = self.agreement[name]
            self.errors.append(f"{name}: off by {worst:.3e} absolute, {relative:.3e} relative; allowed {rel:g} relative, {abs:g} absolute")

    def finish(self) -> None:
        """Fails on any difference, any tensor that was not looked at and any config field that was not read."""
        problems = list(self.errors)
        problems += [f"{name}: not used by the adapter" for name in self._names if name not in self._used]
        problems += [f"config field {name}: not used by the adapter" for name in self.fields.unread()]
        assert not problems, "\n".join([f"{self.path.name}: {len(problems)} problems", *problems])
