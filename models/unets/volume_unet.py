"""HVDM's denoiser: a UNet of 3-D convolutions over a clip's latent volume, without any attention (spec, hvdm.md section 6).

Every stage but the first is residual blocks that the step shifts and scales. From level to level rows and columns are halved; all
frames stay. Letters: B batch, C channels, T frames, H and W sides of the latent.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.layers.embeddings import LabelEmbedder, TimestepEmbedder
from models.layers.previous import with_previous
from models.layers.tables import TableConfig, add_told, tables
from models.unets.adm import channels_last
from models.unets.stages import Head, Plan, Stage, check_halvings, check_widths, steered

FACTORS = (1, 2, 2)
"""How much smaller time, rows and columns of the next level are."""


@dataclass(frozen=True)
class VolumeUNetConfig(TableConfig):
    latent_res: tuple[int, int] = (32, 32)
    """Height and width of the latents."""
    latent_frames: int = 16
    """Frames of the latents."""
    in_channels: int = 4
    """Channels of a latent."""
    out_channels: int = 0
    """Channels of the output; 0: as many."""
    model_channels: int = 192
    """Width of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level over model_channels; each level but the first has half the rows and columns."""
    num_res_blocks: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    use_scale_shift_norm: bool = True
    """The step scales and shifts what is normalised, instead of being added before."""
    resblock_updown: bool = True
    """Sides are halved and doubled inside residual blocks, instead of by convolutions."""
    conditional: bool = True
    """The latent of the previous clip, or of a still picture, is a second input."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label, as in the paper."""
    class_dropout_prob: float = 0.1
    """Share of labels dropped in training. Above 0 there is a null label, the row num_classes of the table."""
    dropout: float = 0.0
    """Share of activations dropped in residual blocks."""

    def __post_init__(self) -> None:
        for name in ("latent_frames", "in_channels", "model_channels", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        for name in ("out_channels", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: a share, from 0 to below 1")
        if not self.channel_mult or min(self.channel_mult) < 1 or min(self.latent_res) < 1:
            raise ValueError(f"channel_mult {self.channel_mult} and latent_res {self.latent_res}: all at least 1")
        check_halvings({"latent_res": self.latent_res}, len(self.channel_mult))
        super().__post_init__()
        check_widths(self.model_channels, self.channel_mult)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W)."""
        return (self.in_channels, self.latent_frames, *self.latent_res)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * times for times in self.channel_mult)


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
        x, skips = channels_last(x), []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(x, emb, skips.pop())
        return self.out(x).contiguous()
