"""Settings of the training stream."""

from dataclasses import dataclass, replace
from typing import Literal

from datasets.mixture import Collection
from datasets.shards import ShardSet
from datasets.storage import CacheConfig
from utils.config import flag
from utils.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    path: tuple[str, ...] = flag((), "data-path")
    """Shard sets to train on: folders that preprocess.py wrote (they hold index.json), URLs of such folders (s3://, gs://, http://...),
    or `pipe:COMMAND` with {} in place of the file's name."""
    weights: tuple[float, ...] = flag((), "data-weights")
    """Share of each shard set in the samples, in any unit; none: all samples of all sets once an epoch."""
    val_path: str = flag("", "val-path")
    """Shard set for evaluation and previews; empty: previews show training clips, no evaluation."""
    dataset_name: str = flag("", "dataset-name")
    """Name of the data set for the records; empty: what the shard set says."""
    n_frames: int = flag(0, "n-frames")
    """Frames per training clip, a random window of the stored clip; 0: the whole stored clip."""
    frame_interval: int = flag(1, "frame-interval")
    """Distance of the frames of a clip in the stored clip; 1: consecutive frames."""
    clip_rule: Literal["consecutive", "linspace"] = flag("consecutive", "clip-rule")
    """consecutive: every frame_interval-th frame; linspace: frames spread evenly over n_frames x frame_interval, both ends taken."""
    window_step: int = flag(0, "window-step")
    """Of stages that take single frames out of windows of n_frames: how many frames after one another windows of a stored clip begin
    (1: anywhere); 0: as soon as the one before has ended, so that none overlap."""
    frame_sample_prob: float = flag(0.0, "frame-sample-prob")
    """0: samples are clips. Above 0: samples are single frames, each frame of each stored clip kept with this probability; an epoch
    has every kept frame once. n_frames is 1 then, and neither frame_interval nor clip_rule has a meaning."""
    previous: bool = flag(False, "previous", "with-previous")
    """Samples are clips of n_frames together with the n_frames before them, for models that continue a video. Of a stored clip that is
    too short for both, the clip alone."""
    images: int = flag(0, "num-images", "use-image-num")
    """Frames of other clips, drawn at random, that come beside each clip for joint training on videos and images."""
    image_size: tuple[int, int] = flag((0, 0), "image-size")
    """Height and width; 0 0: as stored. Anything else must be what the shards hold."""
    num_workers: int = flag(4, "num-workers")
    """Loader processes per rank (threads where clips are stored uncompressed); 0: load in the training process."""
    prefetch: int = 4
    """Batches that each worker process, or all threads together, keep ready."""
    flip: bool = flag(False, "flip")
    """Mirror half of the clips left to right."""
    shuffle: Literal["auto", "full", "block"] = flag("auto", "shuffle")
    """full: over all samples; block: shards in random order and their samples within a window of shards, so that few shards are needed
    at a time; auto: block for shards that must be fetched, full for those on disk."""
    shuffle_shards: int = flag(16, "shuffle-shards")
    """block: shards of a window. Of shards to be fetched as many are fetched ahead, if the cache has room for twice so many."""
    on_bad_sample: Literal["fail", "skip"] = flag("fail", "on-bad-sample")
    """A sample that is missing or damaged ends the run, or is reported, counted and replaced by another."""
    max_bad_share: float = flag(0.01, "max-bad-share")
    """skip: a larger share of bad samples ends the run all the same (ten bad ones are always allowed, unless this is 0)."""
    cache_dir: str = flag("", "cache-dir")
    """Folder for shards that were fetched; empty: ~/.cache/kinoform."""
    cache_gib: float = flag(64.0, "cache-gib")
    """Size that the cache is kept below; the shards used longest ago go first."""
    fetch_timeout: float = flag(60.0, "fetch-timeout")
    """Seconds without a byte after which fetching a shard is given up and tried again."""
    fetch_retries: int = flag(4, "fetch-retries")
    """How often fetching a shard is tried again."""


def open_shards(data: DataConfig) -> Collection:
    """Opens the shard sets of `data.path`. Raises ConfigError or UserError naming the path."""
    if not data.path:
        raise ConfigError("no training data: give --data-path FOLDER, a shard set made by preprocess.py")
    cache = CacheConfig(data.cache_dir, data.cache_gib, data.fetch_timeout, data.fetch_retries)
    return Collection.of(*(ShardSet.open(path, cache=cache, on_bad=data.on_bad_sample) for path in data.path))


def resolve(data: DataConfig, shards: Collection | ShardSet) -> DataConfig:
    """Fills what the shard sets decide: `n_frames`, `image_size`, `dataset_name`, `shuffle`.

    ConfigError where the settings ask for what the sets do not hold, or cannot be.
    """
    shards = Collection.over(shards)
    _check_numbers(data)
    _check_frames(data, shards)
    if shards.is_latent and data.flip:
        raise ConfigError(f"--flip: {shards.location} holds latents, which cannot be mirrored; say --no-flip, or train on the clips")
    if shards.by_frame:
        _check_clips(data, shards)
    else:
        _check_latents(data, shards)
    if tuple(data.image_size) not in ((0, 0), shards.size):
        wanted, stored = (" ".join(map(str, size)) for size in (data.image_size, shards.size))
        raise ConfigError(f"--image-size {wanted}: {shards.location} holds {stored}; drop it or preprocess with --image-size {wanted}")
    shuffle = data.shuffle
    if shuffle == "auto":
        shuffle = "block" if shards.is_remote else "full"
    return replace(
        data,
        n_frames=1 if data.frame_sample_prob else data.n_frames or shards.clip_length,
        image_size=shards.size,
        dataset_name=data.dataset_name or shards.name,
        shuffle=shuffle,
    )


def _check_numbers(data: DataConfig) -> None:
    if data.n_frames < 0:
        raise ConfigError(f"--n-frames {data.n_frames} is negative: use 0 for the whole stored clip")
    for name in ("num_workers", "prefetch", "window_step"):
        if getattr(data, name) < 0:
            raise ConfigError(f"data.{name} {getattr(data, name)} is negative: use 0 or more")
    for name in ("frame_interval", "shuffle_shards"):
        if getattr(data, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(data, name)}: use 1 or more")
    if data.images < 0:
        raise ConfigError(f"--num-images {data.images} is negative: use 0 for clips alone")
    if not 0 <= data.frame_sample_prob <= 1:
        raise ConfigError(f"--frame-sample-prob {data.frame_sample_prob:g}: it is a probability, from 0 (whole clips) to 1 (all frames)")
    if not 0 <= data.max_bad_share <= 1:
        raise ConfigError(f"--max-bad-share {data.max_bad_share:g}: it is a share, from 0 to 1")


def _check_frames(data: DataConfig, shards: Collection) -> None:
    """What takes single frames needs stored ones; samples that are frames need nothing else."""
    share, images = f"--frame-sample-prob {data.frame_sample_prob:g}", f"--num-images {data.images}"
    for given, told in ((data.frame_sample_prob, share), (data.images, images)):
        if given and not shards.by_frame:
            raise ConfigError(f"{told}: {shards.location} holds latents of whole clips, of which no frame can be taken; drop the flag")
    if data.previous and not shards.by_frame:
        raise ConfigError(
            f"--previous: {shards.location} holds latents of whole clips, which say themselves what came before; drop the flag"
        )
    if data.previous and not data.n_frames:
        raise ConfigError(f"--previous: say --n-frames, for the whole clips of {shards.location} have nothing before them")
    others = {share: data.frame_sample_prob > 0, images: data.images > 0, "--clip-rule linspace": data.clip_rule == "linspace"}
    other = next((told for told, given in others.items() if given), None)
    if data.previous and other:
        raise ConfigError(f"--previous {other}: what comes before a clip is taken with consecutive frames alone; drop one of the flags")
    if data.frame_sample_prob and data.n_frames > 1:
        raise ConfigError(f"{share} --n-frames {data.n_frames}: samples are single frames or clips; drop one of the flags")
    if data.frame_sample_prob and data.images:
        raise ConfigError(f"{share} {images}: images stand beside clips, not beside single frames; drop one of the flags")


def _check_clips(data: DataConfig, shards: Collection) -> None:
    if data.frame_sample_prob:
        return
    if data.n_frames == 0 and not shards.stored_length:
        raise ConfigError(f"{shards.location} holds videos of various lengths: say --n-frames (at most {shards.clip_length})")
    frames = data.n_frames or shards.clip_length
    # linspace takes smaller steps where a clip is short.
    needed = frames if data.clip_rule == "linspace" else (frames - 1) * data.frame_interval + 1
    if needed > shards.clip_length:
        stored = "its clips have" if shards.stored_length else "its shortest video has"
        wanted = f"--n-frames {frames}" + (f" --frame-interval {data.frame_interval} ({needed} frames)" if needed > frames else "")
        raise ConfigError(
            f"{wanted}: {stored} {shards.clip_length} frames ({shards.location}): use fewer, or another --clip-length in preprocess.py"
        )


def _check_latents(data: DataConfig, shards: Collection) -> None:
    if data.n_frames not in (0, shards.clip_length):
        raise ConfigError(f"--n-frames {data.n_frames}: {shards.location} holds latents of {shards.clip_length} frames; drop the flag")
    if data.frame_interval != 1:
        raise ConfigError(f"--frame-interval {data.frame_interval}: {shards.location} holds latents of chosen frames; drop the flag")
