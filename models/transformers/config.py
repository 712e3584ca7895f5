"""What the transformers over a clip's latents share of their configs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipDiTConfig:
    latent_res: tuple[int, int] = (32, 32)
    """Height and width of the latents."""
    latent_frames: int = 16
    """Frames of the latents."""
    in_channels: int = 4
    """Channels of a latent."""
    patch_size: int = 2
    """Side of a patch; each becomes one token."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over hidden_size."""
    learn_sigma: bool = False
    """Give twice the channels: the noise and the interpolation of its variance."""
    conditional: bool = True
    """The latent of the previous clip is a second input."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label."""
    class_dropout_prob: float = 0.1
    """Share of labels dropped in training. Above 0 there is a null label, the row num_classes of the table."""

    def __post_init__(self) -> None:
        for name in ("latent_frames", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if self.num_classes < 0:
            raise ValueError(f"num_classes {self.num_classes}: at least 0")
        for name, sides in self.patched().items():
            if any(side % self.patch_size or side < 1 for side in sides):
                raise ValueError(f"{name} {' x '.join(map(str, sides))} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} and of 4")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: nothing is left between the layers of an MLP of width {self.hidden_size}")

    def patched(self) -> dict[str, tuple[int, ...]]:
        """Sides that are cut into patches, by the names of their settings."""
        return {"latent_res": self.latent_res}

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)
