"""What stands beside a clip in its shard and goes with it into another: card, label, caption, condition vector."""

import json
import os

from datasets.conditions import MEMBER
from datasets.prepare.tars import BLOCK, BadTar, read_members
from datasets.prepare.writer import dump_json
from datasets.shards import ShardSet
from utils.errors import UserError

CARRIED = ("json", "cls", "txt", MEMBER)


def carried(shards: ShardSet, row: int) -> dict[str, bytes]:
    """Extension -> bytes of the members behind the clip of sample `row`. UserError where the tar is damaged or cannot be read."""
    behind = -(-int(shards.offset[row] + shards.nbytes[row]) // BLOCK) * BLOCK
    try:
        with os.fdopen(shards.open_shard(int(shards.shard[row])), "rb") as file:
            members, _ = read_members(file, behind, shards.keys[row])
    except (BadTar, OSError) as error:
        raise UserError(f"{shards.describe(row)}: {error}: copy the shard again or rerun preprocess.py") from None
    return {member.extension: member.payload for member in members if member.extension in CARRIED}


def with_window(card: bytes, start: int, frames: int, where: str) -> bytes:
    """The card of a clip for a window of its frames. UserError naming `where` when it is damaged."""
    try:
        return dump_json(json.loads(card) | {"window": [start, start + frames]})
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: its card is damaged ({error}): copy the shard again or rerun preprocess.py") from None
