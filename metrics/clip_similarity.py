"""CLIP (Radford et al. 2021) from a local folder: how well the frames of a video fit a text (CLIPSIM; Wu et al. 2021).

Published numbers are of ViT-B/32. It takes the optional package `transformers`, reads safetensors only and never asks the network.
"""

import hashlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.frame_features import FrameFeatures
from utils.errors import UserError
from utils.files import sha256_file

CHUNK = 64
"""Texts at a time."""
PARTS = (("config.json",), ("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
"""What must be in a folder beside the weights; without a vocabulary transformers would make an empty one."""


class Clip:
    """Pictures and texts to vectors of length one; the cosine of two is their product."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises UserError, of one line, where `transformers` or a part of the folder is missing, or it holds another network."""
        self.folder, self.device = Path(folder), torch.device(device)
        weights = sorted(self.folder.glob("*.safetensors"))
        there = {path.name for path in self.folder.glob("*")}
        lacking = [names for names in PARTS if there.isdisjoint(names)] if weights else [("model.safetensors",)]
        if lacking:
            raise UserError(
                f"--clip {folder} is no folder of a CLIP: {' or '.join(lacking[0])} is not in it; one as of openai/clip-vit-base-patch32"
            )
        if importlib.util.find_spec("transformers") is None:
            raise UserError("CLIP is read by the package transformers, which is not installed: pip install transformers")
        self.sha256 = _joint_sha256(weights)
        self._settings = _joint_sha256([self.folder / name for names in PARTS[:2] for name in names if name in there])
        self._model, self._pictures, self._tokens = _load(self.folder)
        self._model.to(self.device)
        self.frames = FrameFeatures(self._see, self.identity(), self.device)
        """Videos to rows of their frames."""

    def identity(self) -> dict[str, Any]:
        """Plain values: which network it is."""
        sizes = self._model.config.vision_config
        kind = f"clip of width {sizes.hidden_size}, depth {sizes.num_hidden_layers}, patches of {sizes.patch_size}"
        resize = f"as its preprocessor_config.json says, to {sizes.image_size}"
        versions = {"settings_sha256": self._settings, "transformers": version("transformers")}
        return {"file": self.folder.name, "sha256": self.sha256, "kind": kind, "resize": resize} | versions

    def _see(self, frames: Tensor) -> Tensor:
        pixels = self._pictures(list(frames), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        return F.normalize(_vectors(self._model.get_image_features(pixel_values=pixels.to(self.device))).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> tuple[Tensor, int]:
        """(rows (n, dim), how many texts were longer than the network reads and lost their end)."""
        limit = self._model.config.text_config.max_position_embeddings
        cut = sum(len(ids) > limit for ids in self._tokens(texts)["input_ids"])
        rows = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            tokens = self._tokens(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            rows.append(F.normalize(_vectors(self._model.get_text_features(**given)).float(), dim=1))
        return torch.cat(rows), cut


def _joint_sha256(files: list[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests."""
    digests = [sha256_file(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _vectors(found: Any) -> Tensor:
    """The projected vectors: transformers 4 returns them, 5 something that holds them."""
    vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return vectors


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Model, picture processor, tokenizer."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
        pictures = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its libraries raise their own kinds, also plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be read as a CLIP of transformers: {reason[:300]}") from None
    model, told = loaded
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise UserError(f"{folder} is not a CLIP: its weights lack {lacking[0]} and {len(lacking) - 1} others")
    return model.eval().requires_grad_(False).float(), pictures, tokens
