"""A run that starts from the weights of a trained network."""

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import nn

from pipelines.loading import Loaded
from utils.errors import UserError


def started(
    network: nn.Module, config: Any, loaded: Loaded, path: str, *, free: Collection[str] = (), may_lack: Collection[str] = ()
) -> nn.Module:
    """`network` of `config` with the weights of a trained one, which must have the same settings.

    `free`: settings that change no weights; `may_lack`: those that only add weights that begin at zero, so that the trained network may
    have them off. Raises UserError with one line for anything else.
    """
    if type(loaded.module) is not type(network):
        kinds = type(loaded.module).__name__, type(network).__name__
        raise UserError(f"--init-from {path} cannot start this run: it is a {kinds[0]}, the run trains a {kinds[1]}")
    for field in dataclasses.fields(config):
        theirs, ours = getattr(loaded.config, field.name), getattr(config, field.name)
        if theirs != ours and field.name not in free and not (field.name in may_lack and not theirs):
            raise UserError(f"--init-from {path} cannot start this run: its {field.name} is {theirs}, that of the run {ours}")
    device = next(network.parameters()).device  # a dry run builds it on the meta device
    try:
        network.load_state_dict({name: value.to(device) for name, value in loaded.module.state_dict().items()})
    except RuntimeError as error:
        raise UserError(f"--init-from {path} cannot start this run: {str(error).splitlines()[-1].strip()}") from None
    return network
