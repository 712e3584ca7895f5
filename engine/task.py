"""All that the engine knows of a stage: a Task says what is trained and how the loss is computed, a BatchSource where samples come from.

Both are protocols: a task is a plain class with these methods, it inherits nothing and never sees process groups.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from engine.config import EmaConfig, OptimConfig
from utils.rng import SampleRng

Batch = dict[str, Tensor]
"""Tensors with a leading sample axis. `index` (b, int64, always on the CPU) is each sample's position in the endless
sequence of training samples; everything random about the sample is keyed by it. All others are on the device in `loss`."""


@dataclass
class Network:
    """One module of a stage and how it is treated. Built on the CPU, unwrapped; the engine moves, shards and wraps it."""

    module: nn.Module
    strategy: Literal["fsdp", "ddp", "frozen"] = "fsdp"
    """fsdp: as `parallel.mode` says; ddp: never sharded (discriminators with R1 or batch norm);
    frozen: no gradient, a copy on each rank."""
    optim: OptimConfig | None = None
    """None exactly when frozen."""
    ema: EmaConfig | None = None
    units: Callable[[nn.Module], list[nn.Module]] | None = None
    """Module -> its shard, compile and checkpointing units (the transformer blocks); None: the module is one unit.

    A unit with `float32 = True` is never given rounded weights."""
    methods: tuple[str, ...] = ()
    """Methods besides `forward` that the task calls (`encode`, `decode`): they need their parameters gathered too."""
    clip_parts: tuple[str, ...] = ()
    """Children whose gradients are clipped each to the norm of its own, and what is left to its own; (): all of them together."""
    sync_norms: bool = False
    """Batch norms normalise by the statistics of the whole micro-batch over all ranks, in place of each rank's own samples."""


@dataclass
class LossOutput:
    """Loss of one micro-batch as a sum, so that accumulation and uneven counts are exact.

    `total` is the scalar sum over samples, attached to the graph; `count` the number of samples;
    `metrics` name -> detached (sum, count): the engine logs sum / count over ranks and the log interval.
    """

    total: Tensor
    count: int
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class Task(Protocol):
    name: str
    """Short name of the stage, used for the run folder: <system>-<stage>."""

    def networks(self) -> dict[str, Network]:
        """Name -> network, the exported one first. Weights come from the global torch RNG, which the engine has seeded."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Names of the networks that take an optimiser turn in this step, in order: ("ae",), ("ae", "disc"), ("model",)."""

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        """Loss whose gradient updates network `phase`. Only that network's parameters require a gradient meanwhile."""

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device: counts FLOPs, sizes activations."""

    def evaluate(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """Validation metrics of one micro-batch as (sum, count); EMA weights where there are any, no gradient."""

    def preview(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Name -> video b c t h w (or image b c h w) in [-1, 1] worth looking at. Every rank calls it with the same batch."""

    def state(self) -> dict[str, int | float]:
        """Small numbers of the task's own that must survive a restart; usually {}."""

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave."""

    def card(self) -> dict[str, Any]:
        """Plain values written to export/config.json: all that later stages need to rebuild and use the exported network."""


class BatchSource(Protocol):
    """Where micro-batches come from. Batch k of step s is a pure function of (seed, s, k, rank): nothing needs saving."""

    steps_per_epoch: int

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from `first_step` on, `accumulation` per step, over epochs without end."""

    def describe(self, index: int) -> str:
        """Shard and key of the sample at a position, for reports."""


@runtime_checkable
class Measuring(Protocol):
    """A Task that measures samples before it is trained may have this too."""

    def measure(self) -> None:
        """Every rank calls it, in a run that has no checkpoint to go on from: others take what was measured from there."""


@dataclass(frozen=True)
class Scored:
    """What a task makes to be scored."""

    what: str
    """In words, after their number: "generated", "given back"."""
    frames: int
    """Of each; 1: pictures."""
    size: tuple[int, int]
    """Height and width."""
    label: str = ""
    """What the figure's name begins with, where it is not of whole samples or not of the whole system."""
    originals: bool = False
    """They come with what they are compared with; else they are compared with real videos."""
    stride: int = 1
    """Distance of their frames in the stored videos."""
    missing: str = ""
    """Why nothing can be made after all, and what to do about it."""


@dataclass(frozen=True)
class Made:
    """Videos b 3 t h w or pictures b 3 h w in [-1, 1], one of each sample of a batch, and their originals where there are any."""

    videos: Tensor
    originals: Tensor | None = None


@runtime_checkable
class Scoring(Protocol):
    """A Task that makes what can be compared with real videos may have this too."""

    def scored(self) -> Scored:
        """What `make` gives."""

    def make(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Made:
        """Something of each sample: the conditions are the batch's, the noise is the samples' own. EMA weights where there are any, no
        gradient; every rank calls it equally often."""


class Scorer(Protocol):
    """Compares what a task makes, on all ranks, with what is real. It may know process groups."""

    name: str
    """Of the figure, after `score/`."""
    about: str
    """A line that says what is compared with what."""
    steps: int
    """Global batches that are needed."""

    @property
    def source(self) -> BatchSource:
        """Of the samples that are made."""

    def measure(self, made: Iterable[tuple[Tensor, Made]]) -> float:
        """The figure, on every rank, of (`index`, what was made) of this rank's micro-batches. Raises an agreed Stopped after a signal."""


@runtime_checkable
class Counting(Protocol):
    """A BatchSource that counts something may have this too."""

    def counters(self) -> Mapping[str, int | frozenset[str]]:
        """Name in the log -> what this rank has counted since it began, or the names of what it has met. The same names on every rank.

        Over all ranks numbers are added up; of names the different ones are counted.
        """
