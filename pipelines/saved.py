"""Folders that hold all networks of a system, each in an export of its own: autoencoder/, content/, motion/ or denoiser/.

config.json beside them names system and parts, README.md says what they are; where a network was trained behind an image VAE from
elsewhere, that is in vae/ (diffusers' form). Nothing in them names a place outside, so a folder works wherever it is copied.
"""

import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from pipelines.hub import push
from pipelines.image_vae import ImageVae
from pipelines.loading import Loaded, is_official
from utils.config import to_dict
from utils.errors import UserError
from utils.files import atomic_write_text, fsync_path, sha256_file
from utils.modelcard import UNKNOWN, family_card
from utils.weights import CARD, README, dump_card, load_card, read_card, read_export, read_json, write_export

STAGES = ("autoencoder", "content", "motion", "denoiser")
VAE = "vae"
Kept = Literal["both", "used"]


class SavedFamily(NamedTuple):
    """A saved folder."""

    system: str
    parts: dict[str, Path]
    """Stage -> export."""


class Saveable(ABC):
    """A pipeline whose networks can be saved together. They are taken from where they were read, with all weights that are there."""

    system: ClassVar[str]

    @abstractmethod
    def networks(self) -> dict[str, Loaded]:
        """Stage -> network."""

    def image_vae(self) -> ImageVae | None:
        """The image VAE from elsewhere that the networks were trained behind, where there is one."""
        return None

    def save_pretrained(self, folder: str | Path, *, license: str = "", weights: Kept = "both") -> Path:
        """Write a folder that `from_pretrained` and sample.py read; it must not be there yet, or be empty.

        `license`: of all its networks, in place of what their exports say. `weights`: both the averaged and the last ones, where both
        are there, or only those in use. Raises UserError.
        """
        return save(self.system, self.networks(), Path(folder), vae=self.image_vae(), license=license, kept=weights)

    def push_to_hub(self, repo: str, *, private: bool = False, license: str = "", weights: Kept = "both") -> str:
        """The same as a repository of the hub, <owner>/<name>; returns its address. Raises UserError."""
        with tempfile.TemporaryDirectory() as place:
            return push(self.save_pretrained(Path(place) / "saved", license=license, weights=weights), repo, private)


def save(
    system: str, networks: Mapping[str, Loaded], folder: Path, *, vae: ImageVae | None = None, license: str = "", kept: Kept = "both"
) -> Path:
    """Write such a folder; see `Saveable.save_pretrained`. It appears whole or not at all."""
    with _new_folder(folder) as made:
        cards: dict[str, dict[str, Any]] = {}
        tied: dict[str, Any] = {}
        if vae is not None:
            tied = {"path": f"../{VAE}", "sha256": _save_vae(vae, made / VAE)}
        for stage, loaded in networks.items():
            tensors, used = _stored(loaded, kept)
            card = _card(loaded) | {"license": license or loaded.card.get("license", UNKNOWN)}
            if stage == "autoencoder" and vae is not None:
                card["vae"] = {"scale_factor": vae.scale_factor, **tied}
            elif tied:
                kind = {"kind": "sd"} if "autoencoder" not in networks else {}
                card["ae"] = {"weights": "model", **card.get("ae", {}), **kind, **tied}
            write_export(made / stage, tensors, card)
            if stage == "autoencoder":
                tied = {"path": f"../{stage}", "sha256": sha256_file(made / stage / f"{used}.safetensors")}
            cards[stage] = card
        licenses = {str(card["license"]) for card in cards.values()}
        common = licenses.pop() if len(licenses) == 1 else "see each network"
        atomic_write_text(made / README, family_card(system, cards, common))
        atomic_write_text(made / CARD, dump_card({"system": system, "license": common, "parts": list(cards)}))
    return folder


def open_saved(folder: Path) -> SavedFamily | None:
    """The parts of a saved folder; None for a folder that is none. Raises UserError for one that is not whole."""
    place = folder / CARD
    if not place.is_file() or "parts" not in read_json(place):
        return None
    card = load_card(folder)
    system, parts = str(card.get("system", "")), card["parts"]
    if not isinstance(parts, list) or not parts or not set(map(str, parts)) <= set(STAGES):
        raise UserError(f"{place} names parts that no system has ({parts}); known are {', '.join(STAGES)}")
    missing = [stage for stage in parts if not (folder / stage).is_dir()]
    if missing:
        raise UserError(f"{folder} is not whole: it has no {missing[0]}/; copy or download it again")
    for stage in parts:
        found = read_card(folder / stage)
        if (found.get("system"), found.get("stage")) != (system, stage):
            raise UserError(f"{folder / stage} is an export of '{found.get('system')} {found.get('stage')}', not of '{system} {stage}'")
    return SavedFamily(system, {stage: folder / stage for stage in parts})


def _card(loaded: Loaded) -> dict[str, Any]:
    """The card of a network; that of an official checkpoint as `models.official import` writes it."""
    if not is_official(loaded.path):
        return loaded.card
    source = {"file": Path(loaded.path).name, "sha256": loaded.sha256}
    return {**loaded.card, "model": to_dict(loaded.config), "source": source}


def _stored(loaded: Loaded, kept: Kept) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Tensors to save, by the names of their files, and which of them are in use."""
    if is_official(loaded.path):
        return {"model": loaded.module.state_dict()}, "model"
    there = [name.removesuffix(".safetensors") for name in read_card(loaded.path).get("files", {})]
    found = {name: read_export(loaded.path, "ema" if name == "ema" else "model") for name in there if name in ("model", "ema")}
    used = next((name for name, (_, _, digest) in found.items() if digest == loaded.sha256), "")
    if not used:
        raise UserError(f"{loaded.path} has other weights now than when it was read: read it again")
    return {name: tensors for name, (tensors, _, _) in found.items() if kept == "both" or name == used}, used


def _save_vae(vae: ImageVae, folder: Path) -> str:
    """Copy the folder of an image VAE, without what is not needed to read it; returns the SHA-256 of its weights."""
    weights = "diffusion_pytorch_model.safetensors"
    folder.mkdir()
    for name in (CARD, weights):
        if not (Path(vae.path) / name).is_file():
            raise UserError(f"the image VAE {vae.path} has no {name}: only safetensors are saved, convert it")
        shutil.copyfile(Path(vae.path) / name, folder / name)
        fsync_path(folder / name)
    return sha256_file(folder / weights)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block is done. Raises UserError where something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        made.mkdir()
        yield made
        os.replace(made, folder)  # also over an empty folder
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(folder.parent)
