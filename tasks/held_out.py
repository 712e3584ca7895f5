"""What validation clips must have in common with those of training, and what they must not."""

from datasets.mixture import Collection
from utils.errors import ConfigError


def check_same_kind(shards: Collection, held_out: Collection) -> None:
    """Raises ConfigError when one holds clips and the other latents, or each those of an autoencoder of its own."""
    kinds = [str(item.meta["autoencoder"].get("sha256"))[:12] if item.is_latent else "clips" for item in (shards, held_out)]
    names = [" and ".join(item.tensors) for item in (shards, held_out)]
    if kinds[0] != kinds[1] or names[0] != names[1]:
        what = [f"latents ({name}) of the autoencoder {kind}..." if name else kind for kind, name in zip(kinds, names, strict=True)]
        raise ConfigError(
            f"--val-path {held_out.location} holds {what[1]}, --data-path {shards.location} {what[0]}: both must hold the same kind"
        )


def shared_split(shards: Collection, held_out: Collection) -> str:
    """A warning where validation clips are among those of training, as far as the sets say: all splits of a data set beside one of them."""
    whole = {item.name: item.where for item in shards.sets if item.meta.get("split") == "all"}
    for item in held_out.sets:
        if item.name in whole and item.meta.get("split") not in (None, "all"):
            return f"{whole[item.name]} was prepared with --split all: the clips of --val-path {item.where} are among those trained on"
    return ""
