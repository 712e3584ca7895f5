"""Settings of the training stream."""

from dataclasses import dataclass, replace

from datasets.shards import ShardSet
from utils.config import flag
from utils.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    path: str = flag("", "data-path")
    """Shard set to train on: the folder that preprocess.py wrote (it holds index.json)."""
    val_path: str = flag("", "val-path")
    """Shard set for evaluation and previews; empty: previews show training clips, no evaluation."""
    dataset_name: str = flag("", "dataset-name")
    """Name of the data set for the records; empty: what the shard set says."""
    n_frames: int = flag(0, "n-frames")
    """Frames per training clip, a random window of the stored clip; 0: the whole stored clip."""
    image_size: tuple[int, int] = flag((0, 0), "image-size")
    """Height and width; 0 0: as stored. Anything else must be what the shards hold."""
    num_workers: int = flag(4, "num-workers")
    """Loader processes per rank (threads where clips are stored uncompressed); 0: load in the training process."""
    prefetch: int = 4
    """Batches that each worker process, or all threads together, keep ready."""
    flip: bool = flag(False, "flip")
    """Mirror half of the clips left to right."""


def resolve(data: DataConfig, shards: ShardSet) -> DataConfig:
    """Fills `n_frames`, `image_size` and `dataset_name` from the shard set. ConfigError where they ask for what it does not hold."""
    if data.n_frames > shards.clip_length:
        stored = "its clips have" if shards.meta["clip_length"] else "its shortest video has"
        raise ConfigError(
            f"--n-frames {data.n_frames}: {stored} {shards.clip_length} frames ({shards.folder}): use fewer, "
            "or another --clip-length in preprocess.py"
        )
    if data.n_frames < 0:
        raise ConfigError(f"--n-frames {data.n_frames} is negative: use 0 for the whole stored clip")
    for name in ("num_workers", "prefetch"):
        if getattr(data, name) < 0:
            raise ConfigError(f"data.{name} {getattr(data, name)} is negative: use 0 or more")
    if data.n_frames == 0 and not shards.meta["clip_length"]:
        raise ConfigError(f"{shards.folder} holds whole videos of various lengths: say --n-frames (at most {shards.clip_length})")
    if tuple(data.image_size) not in ((0, 0), shards.size):
        wanted, stored = (" ".join(map(str, size)) for size in (data.image_size, shards.size))
        raise ConfigError(f"--image-size {wanted}: {shards.folder} holds {stored}; drop the flag or preprocess with --image-size {wanted}")
    return replace(
        data, n_frames=data.n_frames or shards.clip_length, image_size=shards.size, dataset_name=data.dataset_name or shards.name
    )
