"""The previous clip's latent as a second input of a denoiser: what long videos are made with, clip after clip."""

import torch
from torch import Tensor


def with_previous(x: Tensor, previous: Tensor | None, shape: tuple[int, ...], conditional: bool) -> Tensor:
    """Latents (B, *shape), where the network is `conditional` with the previous clip's after them on the channel axis: None is zeros.

    Raises ValueError for another shape, and for a `previous` that the network has no input for.
    """
    for name, latent in (("latents", x), ("previous", previous)):
        if latent is not None and latent.shape != (len(x), *shape):
            raise ValueError(f"{name}: the model takes ({', '.join(map(str, (len(x), *shape)))}), not {tuple(latent.shape)}")
    if conditional:
        return torch.cat([x, torch.zeros_like(x) if previous is None else previous.to(x.dtype)], dim=1)
    if previous is not None:
        raise ValueError("previous: the model is not conditional, it has no input for the previous clip's latent")
    return x
