"""A whole stage in one file: a small denoiser of vectors over time, or a generator with a discriminator, and where samples come from."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import (
    BestConfig,
    CheckpointConfig,
    EmaConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScoreConfig,
    TrainConfig,
)
from engine.task import Batch, LossOutput, Network
from utils.rng import SampleRng

WIDTH, TOKENS = 16, 6


class Block(nn.Module):
    """Attention and MLP, modulated by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # a bias of the keys has no gradient but rounding
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """b n d, b d -> b n d."""
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return x + self.mlp(x)


class Net(nn.Module):
    """Three blocks, a bare root parameter, a buffer, and a second method that a loss may call."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.register_buffer("table", torch.randn(1, TOKENS, WIDTH))
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """b n d, b -> b n d."""
        return self.head(self.features(x, t)[0])

    def features(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Everything but the head."""
        c = self.embed(torch.cos(t[:, None] * torch.arange(1, WIDTH + 1, device=t.device)))
        x = x + self.position + self.table
        for block in self.blocks:
            x = block(x, c)
        return x, c

    def decode(self, x: Tensor) -> Tensor:
        """The head alone."""
        return self.head(x)


class Critic(nn.Module):
    """b n d -> b 1, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH * TOKENS, WIDTH), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class ToyTask:
    """Predicts the clean sample from a noisy one; with `gan` also against a critic, from step 2 on."""

    def __init__(self, config: RunConfig, *, gan: bool = False, methods: bool = False, bad_from: int | None = None) -> None:
        self.name = "toy"
        self.config = config
        self.gan = gan
        self.methods = methods
        self.bad_from = bad_from
        self.seen = 0
        self.gradients: list[tuple[str, str]] = []

    def networks(self) -> dict[str, Network]:
        methods = ("features", "decode") if self.methods else ()
        nets = {"net": Network(Net(), optim=self.config.optim, ema=self.config.ema, units=lambda net: list(net.blocks), methods=methods)}
        nets["fixed"] = Network(nn.Linear(WIDTH, WIDTH), "frozen")
        if self.gan:
            nets["critic"] = Network(Critic(), "ddp", optim=dataclasses.replace(self.config.optim, lr=3e-3))
        return nets

    def phases(self, step: int) -> tuple[str, ...]:
        return ("net", "critic") if self.gan and step >= 2 else ("net",)

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        clean = batch["x"]
        if phase == "critic":
            with torch.no_grad():
                fake = self._output(networks, clean, rng)
            margin = nn.functional.relu(1 - networks["critic"](clean)) + nn.functional.relu(1 + networks["critic"](fake))
            return LossOutput(margin.sum(), len(clean), {"margin": (margin.detach().sum(), len(clean))})
        out = self._output(networks, clean, rng)
        error = (out - clean).square().mean((1, 2)) + 0.1 * (networks["fixed"](out) - networks["fixed"](clean)).square().mean((1, 2))
        if self.gan and int(rng.index[0]) >= 2 * self.config.train.global_batch_size:
            error = error - networks["critic"](out)[:, 0]
        step = int(rng.index[0]) // self.config.train.global_batch_size
        if self.bad_from is not None and step >= self.bad_from and int(rng.index[0]) % self.config.train.global_batch_size == 0:
            error = error * torch.nan
        self.seen += 1
        self.gradients.append((phase, ",".join(n for n, m in networks.items() if any(p.requires_grad for p in m.parameters()))))
        return LossOutput(error.sum(), len(clean), {"error": (error.detach().sum(), len(clean))})

    def _output(self, networks: Mapping[str, nn.Module], clean: Tensor, rng: SampleRng) -> Tensor:
        t = rng.uniform("time")
        noisy = clean + t[:, None, None] * rng.normal("noise", (TOKENS, WIDTH))
        if self.methods:
            return networks["net"].decode(networks["net"].features(noisy, t)[0]).float()
        return networks["net"](noisy, t).float()

    def batch_spec(self, batch_size: int) -> Batch:
        return {"x": torch.empty(batch_size, TOKENS, WIDTH, device="meta")}

    def evaluate(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        error = (self._output(networks, batch["x"], rng) - batch["x"]).square().mean((1, 2))
        return {"error": (error.sum(), len(error))}

    def preview(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        out = self._output(networks, batch["x"], rng)
        return {"output": out[:, None, :, :4, None].expand(-1, 3, -1, -1, 4), "picture": out[:, None]}

    def state(self) -> dict[str, int | float]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, int | float]) -> None:
        self.seen = int(state["seen"])

    def card(self) -> dict[str, Any]:
        return {"system": "toy", "width": WIDTH}


class ToySource:
    """Vectors that are a function of their index."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, steps_per_epoch: int = 4) -> None:
        self.steps_per_epoch = steps_per_epoch
        self._global = config.train.global_batch_size
        self._share = self._global // world_size
        self._micro = self._share // config.train.accumulation
        self._offset = rank * self._share

    def batches(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            for start in range(0, self._share, self._micro):
                index = torch.arange(self._micro) + step * self._global + self._offset + start
                yield {"x": SampleRng(1, index % 97).normal("data", (TOKENS, WIDTH)).tanh(), "index": index}
            step += 1

    def describe(self, index: int) -> str:
        return f"toy/{index % 97}"


def toy_config(folder: Path | str, **changes: Any) -> RunConfig:
    """Settings of a short run; `changes` go to the group that has the name (`lr`, `max_steps`, or `ema.every` where several do)."""
    groups: dict[str, Any] = {
        "train": TrainConfig(results_dir=Path(folder), global_batch_size=8, max_steps=5, seed=3),
        "optim": OptimConfig(lr=1e-2, weight_decay=0.01, clip_norm=0.5, warmup_steps=2, schedule="cosine"),
        "ema": EmaConfig(decay=0.9),
        "parallel": ParallelConfig(mode="fsdp", precision="fp32", timeout=60.0),
        "checkpoint": CheckpointConfig(every=100),
        "log": LogConfig(every=1, preview_every=0, eval_every=0, tensorboard=False),
        "best": BestConfig(),
        "score": ScoreConfig(),
    }
    for key, value in changes.items():
        if "." in key:
            group, name = key.split(".")
        else:
            name = key
            group = next(group for group in groups if hasattr(groups[group], key))
        groups[group] = dataclasses.replace(groups[group], **{name: value})
    return RunConfig(**groups)
