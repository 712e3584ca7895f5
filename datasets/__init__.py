"""Videos to shards, shards to batches. Not the Hugging Face package of the same name."""


def __getattr__(name: str) -> object:
    raise AttributeError(
        f"module 'datasets' of Kinoform has no attribute {name!r}: it hides the Hugging Face package of that name in this process. "
        "Convert Hugging Face data in a separate process (python -I) to a folder of videos, then run preprocess.py on it."
    )
