"""Weights that leave a run and enter another: exports (safetensors and a card), and files from elsewhere, never unpickled into code."""

import json
import pickle
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.config import load_yaml
from utils.errors import UserError
from utils.files import atomic_path, fsync_path, sha256_file
from utils.modelcard import LIBRARY, export_card
from utils.schema import plain

CARD = "config.json"
OLD_CARD = "config.yaml"
"""The card of exports of older versions, which are still read."""
README = "README.md"
FORMAT = 1
"""Version of a card's form; a reader refuses those that are newer."""
_DAMAGED = (EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What torch's reader raises of files that are none, as the pieces that it takes for instructions lead it."""


def write_export(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], card: Mapping[str, Any]) -> None:
    """Write an export: <name>.safetensors for each of `tensors` ("model", and "ema" where there is one), README.md, then config.json.

    All files are written before the first is replaced, so one that cannot be written (OSError) leaves the export before it; the card
    is replaced last and names the digests, so a mixture of two exports is noticed. The bytes are a function of the arguments. Call it
    on one rank, with full tensors.
    """
    folder = Path(folder)
    digests: dict[str, str] = {}
    with ExitStack() as files:
        last = files.enter_context(atomic_path(folder / CARD))  # a stack is left in reverse order
        readme = files.enter_context(atomic_path(folder / README))
        for name, values in tensors.items():
            own = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(values.items())}
            temporary = files.enter_context(atomic_path(folder / f"{name}.safetensors"))
            try:
                save_file(own, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            fsync_path(temporary)
            digests[f"{name}.safetensors"] = sha256_file(temporary)
        readme.write_text(export_card(card, list(digests)), encoding="utf-8")
        fsync_path(readme)
        last.write_text(dump_card({**card, "files": digests}), encoding="utf-8")
        fsync_path(last)
    for stale in {*folder.glob("*.safetensors"), folder / OLD_CARD} - {folder / name for name in digests}:
        stale.unlink(missing_ok=True)


def read_export(path: str | Path, which: Literal["ema", "model"] = "ema") -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, card and SHA-256 of the weights file of an export.

    `path`: an export folder, the run folder that holds it, or one of its .safetensors files (then `which` does not matter).
    `which`: "ema": the averaged weights, or the plain ones where there is no average. Raises UserError.
    """
    folder, file = _locate(Path(path), which)
    card = load_card(folder)
    digests = card.pop("files", {})
    digest = sha256_file(file)
    if digests.get(file.name, digest) != digest:
        raise UserError(f"{file} is not the file that {find_card(folder)} names (its sha256 differs): damaged or replaced; export again")
    return load_tensors(file), card, digest


def read_card(path: str | Path) -> dict[str, Any]:
    """Card of an export, without its weights; `path` as of `read_export`. Raises UserError."""
    return load_card(_locate(Path(path), "ema")[0])


def find_card(folder: Path) -> Path | None:
    """The card of an export folder; None where it has none."""
    return next((folder / name for name in (CARD, OLD_CARD) if (folder / name).is_file()), None)


def load_card(folder: Path) -> dict[str, Any]:
    """The card in an export folder, with the digests of its `files`. A place that it names from itself on (`../autoencoder`) is given
    whole. Raises UserError for one that is missing, damaged, of something else or of a newer version."""
    place = find_card(folder)
    if place is None:
        raise UserError(f"{folder} is not an export: it has no {CARD}")
    if place.name == OLD_CARD:
        return load_yaml(place)
    card = read_json(place)
    if card.pop("library_name", None) != LIBRARY:
        raise UserError(f"{place} is not a card of Kinoform's: give an export of it, or a folder that pipelines.pretrained saved")
    version = card.pop("format", None)
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(f"{place} has format {version}, this version reads up to {FORMAT}: update Kinoform")
    for name in ("ae", "vae"):
        told = card.get(name)
        if isinstance(told, dict) and str(told.get("path", "")).startswith("../"):
            told["path"] = str(folder.absolute().parent / Path(told["path"]).name)
    return card


def dump_card(card: Mapping[str, Any]) -> str:
    """JSON text of a card, which says whose it is."""
    return json.dumps({"library_name": LIBRARY, "format": FORMAT, **plain(card)}, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Raises UserError."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({(str(error).splitlines() or [''])[0]}): damaged; copy or export it again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a card")
    return loaded


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Content of a .safetensors file, or of a torch file (tensors, numbers and texts in dicts and lists only), on the CPU.

    Raises UserError for a missing or damaged file and for one that would run code when loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder, not a weights file' if path.is_dir() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged or holds more than tensors; it is refused because loading it could run code: convert it to safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, *_DAMAGED) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as weights: {reason}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _locate(path: Path, which: str) -> tuple[Path, Path]:
    """Export folder and weights file."""
    if path.suffix == ".safetensors" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        if find_card(path.parent) is None:
            raise UserError(f"{path} has no {CARD} beside it: it is not part of an export of Kinoform")
        return path.parent, path
    if not path.is_dir():
        raise UserError(f"{path} {'is not an export folder' if path.exists() else 'does not exist'}: give a run folder, or its export/")
    folder = path / "export" if (path / "export").is_dir() or (path / "checkpoints").is_dir() or (path / "identity").is_file() else path
    if find_card(folder) is None:
        if folder != path:
            raise UserError(f"{path} is a run that has no export yet: training writes it at its end; start its command again to finish it")
        raise UserError(f"{path} is not an export: it has no {CARD}; give a run folder, or its export/")
    names = ["ema", "model"] if which == "ema" else ["model"]
    for name in names:
        if (folder / f"{name}.safetensors").is_file():
            return folder, folder / f"{name}.safetensors"
    if "parts" in load_card(folder):
        raise UserError(f"{folder} holds the networks of a whole system, one is wanted here: give one of the folders in it")
    raise UserError(f"{folder} has no {names[-1]}.safetensors: the export is not complete; export again")
