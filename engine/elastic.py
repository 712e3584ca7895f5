"""The same global batch on however many ranks there are: fewer ranks take more micro-batches, not larger ones."""

import dataclasses
import logging
import os
import time
from typing import NoReturn, TypeVar

from engine.config import RunConfig
from engine.shard import samples_per_rank, shard_size
from launch.env import Env, Stopped
from utils.errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)

NODES = "KINOFORM_NODES"
"""Variable with the number of nodes that an elastic launch has when none is missing; the launchers set it."""

_REMIND = 600.0
"""Seconds after which ranks that wait for nodes say so again."""
_log = logging.getLogger(__name__)


def for_ranks(config: Config, env: Env) -> Config:
    """The config with the accumulation that keeps a micro-batch on one rank to `train.micro_batch` samples.

    Where that is not set, and nodes of an elastic launch are missing: to what it is with all of them. Says so when it changes
    something. Raises ConfigError when the global batch cannot be cut evenly. In an elastic launch that holds for all the nodes; when
    some are missing, and it is those that are left who cannot share it, the ranks wait here for torchrun to start them anew with more.
    """
    nodes = os.environ.get(NODES, "")
    everyone = dataclasses.replace(env, world_size=max(env.world_size, int(nodes if nodes.isdecimal() else 1) * env.local_world_size))
    _check(config, everyone)  # what can never be shows at the first start, not when the last node comes
    if env.peers is not None and not _possible(config, env):
        _wait_for_nodes(config, env, everyone.world_size // env.local_world_size)
    share, least = samples_per_rank(config, env), config.train.accumulation
    limit = config.train.micro_batch or samples_per_rank(config, everyone) // least
    if share <= limit * least:
        return config
    accumulation = next(number for number in range(least, share + 1) if share % number == 0 and share // number <= limit)
    if env.is_main:
        _log.warning(
            "%d processes: accumulation %d in place of %d, for micro-batches of %d samples (%d at most) and the same global batch of %d",
            env.world_size, accumulation, least, share // accumulation, limit, config.train.global_batch_size,
        )  # fmt: skip
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=accumulation))


def _check(config: RunConfig, env: Env) -> None:
    """Raise ConfigError where the ranks cannot share the global batch, or the state."""
    samples_per_rank(config, env)
    shard_size(config.parallel, env.world_size, env.local_world_size)


def _possible(config: RunConfig, env: Env) -> bool:
    try:
        _check(config, env)
    except ConfigError:
        return False
    return True


def _wait_for_nodes(config: RunConfig, env: Env, nodes: int) -> NoReturn:
    """Until a signal comes: from torchrun, when a node joins, or from whoever wants the run to stop. Raises Stopped."""
    local = env.local_world_size
    sizes = [number for number in range(1, nodes + 1) if _possible(config, dataclasses.replace(env, world_size=number * local))]
    due = time.monotonic()
    while not env.stop:
        if env.is_main and time.monotonic() >= due:
            _log.warning(
                "%d node(s) with %d process(es) each cannot share the global batch of %d samples: waiting for more; %s node(s) can",
                env.world_size // local, local, config.train.global_batch_size, " or ".join(map(str, sizes)),
            )  # fmt: skip
            due += _REMIND
        time.sleep(0.2)
    raise Stopped(agreed=False)
