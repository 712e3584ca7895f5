"""Which timesteps are trained on (spec: diffusion section 8). Both samplers turn addressed uniform numbers into (t, loss weight)."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class UniformTimesteps:
    """Every timestep alike, weight 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """t (b,) int64 and loss weights (b,) float32 from numbers in [0, 1), (b,)."""
        t = (uniform.double() * self.num_timesteps).long()
        return t, torch.ones_like(uniform, dtype=torch.float32)


class LossSecondMomentTimesteps:
    """Timesteps in proportion to the root mean square of their last `history` losses, once every timestep has that many."""

    def __init__(self, num_timesteps: int, history: int = 10, uniform_prob: float = 0.001) -> None:
        if history < 1 or not 0 <= uniform_prob <= 1:
            raise ValueError(f"history must be at least 1 and uniform_prob in [0, 1], got {history} and {uniform_prob}")
        self.num_timesteps, self.history, self.uniform_prob = num_timesteps, history, uniform_prob
        self._losses = np.zeros((num_timesteps, history))
        self._counts = np.zeros(num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        """Unnormalised sampling weights, (T,) float64."""
        if (self._counts < self.history).any():
            return np.ones(self.num_timesteps)
        weights = np.sqrt(np.mean(self._losses**2, axis=-1))
        weights /= weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """t (b,) int64 and loss weights 1/(T p_t) (b,) float32 from numbers in [0, 1), (b,)."""
        weights = self.weights()
        p = torch.from_numpy(weights / weights.sum()).to(uniform.device)
        t = torch.searchsorted(p.cumsum(0), uniform.double(), right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Records this rank's losses (b,) at t (b,); with process groups those of all ranks, in rank order, so that all stay alike.

        Copies to the host: one synchronisation a call.
        """
        pairs = torch.stack([t.double(), losses.detach().double()], dim=1)
        for step, loss in _gather_rows(pairs, group).tolist():
            self._record(int(step), loss)

    def _record(self, t: int, loss: float) -> None:
        count = self._counts[t]
        if count == self.history:
            self._losses[t, :-1] = self._losses[t, 1:]
            self._losses[t, -1] = loss
        else:
            self._losses[t, count] = loss
            self._counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The history, for a checkpoint."""
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        if state["losses"].shape != self._losses.shape:
            raise ValueError(f"history of shape {tuple(state['losses'].shape)} does not fit {self._losses.shape}")
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


def _gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows (b, k) of all ranks; local batches may differ in size, so they are padded to the largest for the exchange."""
    if not dist.is_available() or not dist.is_initialized():
        return rows
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device), group=group)
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
