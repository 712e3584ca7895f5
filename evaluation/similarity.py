"""How well videos fit the texts that they were made from: CLIP similarity (CLIPSIM; Wu et al. 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.captions import captions_of
from evaluation.features import Side
from evaluation.protocols import Protocol
from evaluation.quality import Figures, agreed, clips_of, measured, rows_of
from evaluation.report import report
from evaluation.settings import VideosConfig
from evaluation.videos import VideoSet, open_videos
from launch.env import Env
from metrics.clip_similarity import Clip
from metrics.resampling import interval, resampled_counts
from utils.errors import ConfigError


@dataclass(frozen=True)
class ClipsimConfig(VideosConfig):
    """CLIP similarity of generated videos and the texts that they were made from."""

    clip: str = ""
    """The network: local folder of a CLIP as transformers writes it (config.json, preprocessor_config.json, tokenizer, safetensors).
    Published numbers are of openai/clip-vit-base-patch32."""
    prompts: str = ""
    """Texts by file name: .json, .jsonl, .csv, .parquet, or .txt with NAME TEXT in a line; empty: prompts.json (or with one of these
    endings) in --dir2, else <name>.txt beside each video. A shard set holds its own."""

    protocol: str = "frames"
    """frames: frames in a row from the first on, each of which counts."""

    @property
    def known(self) -> Mapping[str, Protocol]:
        return {"frames": Protocol("frames", drawn=False, scores=False)}

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if self.run:
            raise ConfigError(f"--run {self.run}: its videos are generated without texts; give --dir2 FOLDER, videos with theirs")
        super().validate()
        if not self.clip:
            raise ConfigError("seen by which network? give --clip FOLDER, a local copy of openai/clip-vit-base-patch32")


def measure_clipsim(config: ClipsimConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    network = Clip(config.clip, env.device)
    clips = clips_of(config, generated or open_videos(config.dir2, "--dir2"), "generated", env, config.size, config.step)
    texts = captions_of(clips.videos, clips.numbers, config.prompts)
    side = measured(config, clips, network.frames, env, keep_rows=True)
    return agreed(None if side is None else _figures(config, network, side, texts), env)


def _figures(config: ClipsimConfig, network: Clip, side: Side, texts: list[str]) -> Figures:
    wanted, cut = network.texts(texts)
    pictures = rows_of(side).double()
    each = (pictures @ wanted.double().cpu()[:, :, None]).mean(dim=(1, 2))
    figures: Figures = {"clipsim": float(each.mean()), "clipsim_std": float(each.std(correction=0))}
    if config.bootstrap:
        counts = resampled_counts(config.bootstrap, len(each), config.seed, "similarity")
        low, high = interval(figures["clipsim"], (counts @ each.numpy() / len(each)).tolist())
        figures |= {"clipsim_low": low, "clipsim_high": high}
    if len(set(texts)) > 1:
        figures["clipsim_of_other_texts"] = _of_others(pictures, wanted.double().cpu(), texts)
    notes = [f"{cut} texts are longer than CLIP reads: their ends were cut"] if cut else []
    described: dict[str, Any] = {
        "id": config.name("clipsim", len(side.clips)),
        "similarity": "cosine, mean over frames, then over videos",
        "texts": {"different": len(set(texts)), "cut": cut},
    }
    return report(config, figures, notes, described, network.frames, [side])


def _of_others(pictures: Tensor, wanted: Tensor, texts: list[str]) -> float:
    """Mean cosine of videos and the other texts of the set: what a figure has to be above."""
    apart = torch.tensor([[one != other for other in texts] for one in texts])
    cosines = pictures.mean(dim=1) @ wanted.T
    return float(cosines[apart].mean())
