"""The settings that every training stage shares. A stage's own config adds `system`, `data`, `model`, ... to `RunConfig`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils.config import flag
from utils.errors import ConfigError

_LOWEST = {
    "train": {"global_batch_size": 1, "accumulation": 1, "micro_batch": 0, "epochs": 1, "max_steps": 0, "max_bad_steps": 0},
    "optim": {
        "lr": 0, "eps": 0, "weight_decay": 0, "clip_norm": 0, "clip_start": 0, "warmup_steps": 0, "warmup_start": 0, "final_lr_ratio": 0,
    },
    "ema": {"every": 1},
    "parallel": {"shard_size": 0, "timeout": 1, "step_timeout": 0},
    "checkpoint": {"every": 0, "keep_last": 0, "keep_every": 0},
    "log": {"every": 0, "preview_every": 0, "eval_every": 0, "eval_batches": 0, "status_every": 0},
    "best": {"patience": 0},
    "score": {"every": 0, "videos": 2, "steps": 0},
}  # fmt: skip
"""Group -> setting -> the least that it may be."""

_BETTER = {"psnr": 1, "ssim": 1} | dict.fromkeys(("loss", "l1", "mse", "perceptual", "error"), -1)
"""Metric of an evaluation -> 1 where more is better, -1 where less is."""


@dataclass(frozen=True)
class TrainConfig:
    results_dir: Path = flag(Path("results"), "results-dir")
    """Folder that holds the runs; each run is <results-dir>/<NNN>-<name>."""
    name: str = flag("", "run-name")
    """Name of the run; empty: system and stage."""
    global_batch_size: int = flag(256, "global-batch-size")
    """Samples per optimiser step over all ranks and accumulation steps."""
    accumulation: int = flag(1, "accumulation", "gradient-accumulation", "gradient-accumulation-steps")
    """Micro-batches per optimiser step; gradients are exchanged on the last one only."""
    micro_batch: int = flag(0, "micro-batch-size")
    """Samples of a micro-batch on one rank, at most: accumulation is raised as far as that takes, so that a run fits on fewer GPUs.
    0: as accumulation says."""
    epochs: int = flag(1, "epochs")
    """Passes over the training set."""
    max_steps: int = flag(0, "max-steps", "max-train-steps")
    """End exactly at this optimiser step, whatever the epochs; 0: by epochs."""
    seed: int = flag(0, "global-seed", "seed")
    """Seed of the weights, the order of samples and all noise. Results do not depend on the number of ranks."""
    resume: str = flag("auto", "resume", bare="auto")
    """auto: go on with this run when the results folder has it; refused where the run of this name has checkpoints of other settings.
    none: a new run. Or the folder of a run or of one checkpoint."""
    max_bad_steps: int = flag(20, "max-bad-steps")
    """Stop after this many steps in a row whose loss or gradient is not finite (each is skipped and counted); 0: never."""
    license: str = flag("unknown", "license")
    """Licence of the trained weights, which their export and its README.md state: an identifier such as apache-2.0, or any other line."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = flag(1e-4, "lr")
    """Learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = flag(0.0, "weight-decay")
    """Decoupled weight decay."""
    clip_norm: float = flag(0.0, "clip-norm", "clip-max-norm")
    """Clip the gradient of each network to this total norm; 0: no clipping (the norm is still logged)."""
    clip_start: int = flag(0, "clip-start", "start-clip-iter")
    """First step (from 0) that is clipped; the norms logged before it tell what clip_norm should be."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = flag(0, "warmup-steps")
    """Steps of linear warm-up."""
    warmup_start: float = 0.0
    """Share of lr that the warm-up starts from: step n (from 0) has start + (1 - start) * n / warmup_steps of lr.
    0: (n + 1) / warmup_steps, so that the first step does something."""
    final_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of lr."""


@dataclass(frozen=True)
class EmaConfig:
    decay: float = flag(0.9999, "ema-decay")
    """Decay of the exponential moving average of the weights; 0: no average."""
    warmup: bool = flag(False, "ema-warmup")
    """Use min(decay, (1 + n) / (10 + n)) at the n-th update (from 1), so that short runs average too."""
    every: int = flag(1, "ema-every")
    """Optimiser steps between updates of the average."""


@dataclass(frozen=True)
class ParallelConfig:
    mode: Literal["ddp", "fsdp", "hsdp"] = flag("fsdp", "parallel")
    """ddp: every rank holds all; fsdp: weights, gradients, optimiser and EMA sharded over all ranks;
    hsdp: sharded inside groups, replicated between them."""
    shard_size: int = 0
    """hsdp: ranks per shard group; 0: the ranks of one node."""
    precision: Literal["bf16", "fp32"] = flag("bf16", "precision")
    """Precision of the arithmetic; weights, gradients' reduction, optimiser and EMA stay fp32."""
    activation_checkpointing: Literal["none", "block", "selective"] = flag(
        "none", "activation-checkpointing", "gradient-checkpointing", bare="block"
    )
    """Recompute activations in the backward: block: all of each block; selective: all but the outputs of matrix products and attention."""
    optim_offload: bool = flag(False, "optim-offload")
    """Keep the shards of weights, gradients, AdamW's moments and averages in host memory and step there; for fsdp and hsdp.
    Experimental: not yet run on GPUs."""
    compile: Literal["auto", "on", "off"] = flag("auto", "compile")
    """torch.compile of each block; auto: on with a GPU."""
    timeout: float = 600.0
    """Seconds after which a collective that a rank does not join is an error."""
    step_timeout: float = flag(0.0, "step-timeout")
    """Seconds that a step may take, the first of a process excepted, before the run is ended with a line that names the rank all wait
    for; several times the slowest step, data included. 0: four fifths of `timeout`."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = flag(5000, "ckpt-every")
    """Steps between checkpoints; one is always written at the end and on a stop signal."""
    keep_last: int = flag(3, "keep-last")
    """Checkpoints kept; older ones are deleted after a newer one is committed. 0: all."""
    keep_every: int = flag(0, "keep-every")
    """Never delete the checkpoints of steps that are multiples of this; 0: no step is special."""
    background: bool = flag(True, "ckpt-background")
    """Write in a background thread from a copy of the state, while training goes on."""


@dataclass(frozen=True)
class LogConfig:
    every: int = flag(100, "log-every")
    """Steps between log lines."""
    preview_every: int = flag(1000, "preview-every", "sample-every")
    """Steps between previews (reconstructions or samples under EMA weights); 0: only at the end."""
    eval_every: int = flag(1000, "eval-every")
    """Steps between evaluations on the validation set, where one is given; 0: only at the end."""
    eval_batches: int = 16
    """Global batches per evaluation, at most."""
    tensorboard: bool = flag(True, "tensorboard")
    """Write TensorBoard files beside metrics.jsonl."""
    status_every: float = flag(60.0, "status-every")
    """Seconds without a line after which one says how far the run is, where the output is no terminal; 0: never."""
    profile_steps: str = flag("", "profile-steps")
    """First and last step to record, as log lines count them, such as 10:15: traces and tables of operators go to <run>/profile/."""
    profile_ranks: Literal["first", "all"] = flag("first", "profile-ranks")
    """Ranks that record these steps."""
    memory_history: bool = flag(False, "memory-history")
    """Note who allocates what on a GPU, for the snapshot that is left in <run>/profile/ when its memory runs out."""

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step of `profile_steps`; None for none. Raises ConfigError."""
        if not self.profile_steps:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.profile_steps)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(f"--profile-steps {self.profile_steps}: give the first and the last step as log lines count them: 10:15")
        return first, last

    def check(self) -> None:
        """Raises ConfigError on steps to profile that are none."""
        _ = self.profiled


SCORE = "score/"
"""How the names of figures begin that compare what is made with what is real; less is better."""


@dataclass(frozen=True)
class ScoreConfig:
    """Figures of what the averaged weights make, measured by all ranks while training goes on."""

    every: int = flag(0, "score-every")
    """Steps between figures of what the averaged weights generate or give back, of the last step too; 0: none."""
    videos: int = flag(256, "score-videos")
    """How many are compared with as many real ones."""
    i3d: str = flag("", "score-i3d")
    """Network of the Frechet video distance: i3d_torchscript.pt or i3d_pretrained_400.pt, or that of the protocol. Empty: frames are
    compared through EfficientNet-Lite0, whose weights a pip package has."""
    protocol: str = flag("", "score-protocol")
    """With --score-i3d: that of evaluate.py fvd; empty: its default, and of reconstructions that of evaluate.py reconstruct."""
    steps: int = flag(0, "score-steps")
    """Steps of the sampler; 0: as previews."""
    real: str = flag("", "score-real")
    """Real videos that generated ones are compared with: a shard set or a folder; empty: those of --val-path, else of training."""
    cache: str = flag("", "score-cache")
    """Folder of features of real videos; empty: $KINOFORM_CACHE, or ~/.cache/kinoform."""


@dataclass(frozen=True)
class BestConfig:
    metric: str = flag("", "best-metric")
    """Keep the export of the evaluation that was best by this metric, in place of the last weights: one of --val-path, such as psnr, or
    with --score-every its figure, score/<name>. Empty: the last weights."""
    mode: Literal["auto", "min", "max"] = flag("auto", "best-mode")
    """Whether less or more of the metric is better; auto: as is known of the metric."""
    patience: int = flag(0, "patience")
    """End the run after this many evaluations without a better one; 0: never."""

    @property
    def name(self) -> str:
        """The metric as an evaluation names it; log lines have a prefix before it. A score keeps its own."""
        return self.metric.removeprefix("eval/")

    @property
    def scored(self) -> bool:
        """Whether it is a score, not a metric of the validation set."""
        return self.name.startswith(SCORE)

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is. Raises ConfigError where `auto` does not know."""
        if self.mode != "auto":
            return 1 if self.mode == "max" else -1
        if self.scored:
            return -1
        if self.name in _BETTER:
            return _BETTER[self.name]
        raise ConfigError(f"--best-metric {self.metric}: give --best-mode min or max; it is known of {', '.join(_BETTER)}")

    def check(self) -> None:
        """Raises ConfigError on a metric of which `auto` does not know what is better."""
        if self.metric:
            _ = self.sign

    def check_among(self, measured: Sequence[str]) -> None:
        """Raises ConfigError on a metric of the validation set that the evaluations of a stage do not measure."""
        if self.metric and not self.scored and self.name not in measured:
            raise ConfigError(f"--best-metric {self.metric}: evaluations measure {', '.join(measured)}")


@dataclass(frozen=True)
class RunConfig:
    """What `engine.loop.fit` reads. Stages subclass it."""

    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    best: BestConfig = field(default_factory=BestConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def validate(self) -> None:
        """Raises ConfigError for a number that cannot be. Stages add what they know."""
        for group, settings in _LOWEST.items():
            for name, lowest in settings.items():
                value = getattr(getattr(self, group), name)
                if not value >= lowest:  # NaN too
                    raise ConfigError(f"{group}.{name} {value}: at least {lowest}")
        if not self.train.license.strip() or len(self.train.license.splitlines()) > 1:
            raise ConfigError("--license: one line, such as apache-2.0, or unknown")
        shares = {"optim.betas": self.optim.betas, "ema.decay": (self.ema.decay,)}
        for name, values in shares.items():
            if not all(0 <= value < 1 for value in values):
                raise ConfigError(f"{name} {' '.join(map(str, values))}: 0 or more, and below 1")
        if not self.optim.warmup_start <= 1:
            raise ConfigError(f"optim.warmup_start {self.optim.warmup_start}: a share of lr, at most 1")
        every, kept = self.checkpoint.every, self.checkpoint.keep_every
        if every and kept and every % kept and kept % every:
            raise ConfigError(f"--keep-every {kept}: checkpoints are written every {every} steps (--ckpt-every): give a multiple of that")
        if self.parallel.optim_offload and self.parallel.mode == "ddp":
            raise ConfigError("--optim-offload moves the shards of a network to host memory: use it with --parallel fsdp or hsdp")
        self.log.check()
        self.best.check()
        if self.best.patience and not self.best.metric:
            raise ConfigError("--patience: name what should get better with --best-metric, such as psnr or loss")
        if self.best.scored and not self.score.every:
            raise ConfigError(f"--best-metric {self.best.metric} is measured while training goes on: set --score-every")
        if self.best.patience and not (self.best.scored or self.log.eval_every):
            raise ConfigError("--patience counts evaluations: set --eval-every")
        if self.score.protocol and not self.score.i3d:
            raise ConfigError(f"--score-protocol {self.score.protocol} is one of video distances: give their network with --score-i3d FILE")
