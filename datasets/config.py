"""Settings of the training stream."""

from dataclasses import dataclass

from utils.config import flag


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
    """Loader processes per rank; 0: load in the training process."""
    prefetch: int = 4
    """Batches each worker keeps ready."""
    flip: bool = flag(False, "flip")
    """Mirror half of the clips left to right."""
