"""HVDM's denoiser: a UNet of 3-D convolutions over a clip's latent volume, without any attention (spec, hvdm.md section 6).

Every stage but the first is residual blocks that the step shifts and scales. From level to level rows and columns are halved; all
frames stay. Letters: B batch, C channels, T frames, H and W sides of the latent.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.layers.convolution import laid_out
from models.layers.embeddings import LabelEmbedder, TimestepEmbedder
from models.layers.previous import with_previous
from models.layers.tables import TableConfig, add_told, tables
from models.unets.config import ClipUNetConfig
from models.unets.stages import Head, Plan, Stage, steered

FACTORS = (1, 2, 2)
"""How much smaller time, rows and columns of the next level are."""


@dataclass(frozen=True)
class VolumeUNetConfig(TableConfig, ClipUNetConfig):
    """`latent_frames` is any number: all frames stay from level to level."""

    model_channels: int = 192
    """Width of the first level."""

    def __post_init__(self) -> None:
        ClipUNetConfig.__post_init__(self)
        TableConfig.__post_init__(self)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W)."""
        return (self.in_channels, self.latent_frames, *self.latent_res)


class VolumeUNet(nn.Module):
    """Denoiser of latents (B, C, T, H, W) given the step and, where configured, a latent before, a label and what tables tell."""

    def __init__(self, config: VolumeUNetConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.model_channels
        self.t_embedder = TimestepEmbedder(emb, config.model_channels)
        self.y_embedder = LabelEmbedder(config.num_classes, emb, config.class_dropout_prob > 0) if config.num_classes else None
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        plan = Plan(config, FACTORS, steered(config, FACTORS))  # in this order: it keeps count
        self.input_blocks = nn.ModuleList(map(Stage, plan.down(config.in_channels * (1 + config.conditional))))
        self.middle_block = Stage(plan.middle())
        self.output_blocks = nn.ModuleList(map(Stage, plan.up()))
        self.out = Head(config.widths[0], config.out_channels or config.in_channels, len(FACTORS))
        self.task_emb, self.dynamics_emb, self.stride_emb = tables(config, emb).values()

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks, self.out]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        previous: Tensor | None = None,
        y: Tensor | None = None,
        drop: Tensor | None = None,
        *,
        task: Tensor | None = None,
        dynamics: Tensor | None = None,
        stride: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, T, H, W), step t (B,), latent before (B, C, T, H, W) or None (zeros), labels y (B,) -> (B, out_channels, T, H, W).

        `drop` (B,) bool takes the label away; the label num_classes and None mean the same. `task`, `dynamics`, `stride` (B,): rows of
        the tables; None: not told. Raises ValueError for other shapes than the model's, and for what it has no input or table for.
        """
        x = with_previous(x, previous, self.config.latent_shape, self.config.conditional)
        emb = self.t_embedder(t)
        if self.y_embedder is not None:
            emb = emb + (self.y_embedder.null_label(len(t)) if y is None else self.y_embedder(y, drop))
        emb = add_told(emb, task=(self.task_emb, task), dynamics=(self.dynamics_emb, dynamics), stride=(self.stride_emb, stride))
        x, skips = laid_out(x), []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(x, emb, skips.pop())
        return self.out(x).contiguous()
