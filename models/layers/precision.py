"""Parts of a network that are computed in float32 whatever the autocast around them."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """A context on the tensor's device in which operators take the types of what they are given."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # there is none for the meta device
