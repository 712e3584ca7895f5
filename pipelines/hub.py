"""Folders on the Hugging Face hub: what is there is named <owner>/<name>, with @<revision> behind it where a certain one is meant.

Only JSON, safetensors and Markdown are taken and given: nothing of a repository is ever run.
"""

import re
from functools import lru_cache
from pathlib import Path

from utils.errors import UserError

PATTERNS = ["*.json", "*.safetensors", "*.md"]
"""Files that are downloaded and uploaded."""
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself where there is one of this name; else a repository of the hub, downloaded into its cache.

    A name that is neither is given back. Raises UserError in one line where the hub cannot be reached or has no such repository, and for
    a `revision` of a folder.
    """
    place, found = Path(source), _ID.fullmatch(str(source))
    if revision and (place.exists() or found is None):
        raise UserError(f"revision {revision}: only repositories of the hub have them, {source} is none")
    if place.exists() or found is None:
        return place
    return _download(found["repo"], revision or found["revision"])


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder as the repository <owner>/<name>, which is made where it is not there; returns its address.

    Weights that are there and not in the folder are deleted. Needs the token that `hf auth login` or HF_TOKEN gives. Raises UserError.
    """
    if not (found := _ID.fullmatch(repo)) or found["revision"]:
        raise UserError(f"{repo} is no name of a repository: <owner>/<name> is wanted")
    from huggingface_hub import HfApi  # slow to import, and most commands go without

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=PATTERNS, delete_patterns=["*.safetensors"], commit_message="Upload networks"
        )
    except Exception as error:  # of many kinds: of the connection, the token, the repository
        raise UserError(f"{folder} cannot be uploaded to {repo}: {_line(error)}") from None
    return str(address)


@lru_cache
def _download(repo: str, revision: str | None) -> Path:
    """Asked once a process, so that all its networks are of one revision."""
    from huggingface_hub import snapshot_download  # slow to import, and most commands go without

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # of many kinds: of the connection, the name, the token, the disk
        at = f"@{revision}" if revision else ""
        raise UserError(f"{repo}{at}: no such folder; as a repository of the Hugging Face hub: {_reason(repo, revision, error)}") from None


def _reason(repo: str, revision: str | None, error: Exception) -> str:
    """Why a repository is not given, in words for those who may have meant a folder."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "not downloaded before, and HF_HUB_OFFLINE forbids to ask"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {repo}, or it is private and wants the token of `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"not downloaded before, and the hub cannot be asked ({_line(error)})"
    return f"it is not given: {_line(error)}"


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
