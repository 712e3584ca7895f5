"""Source videos -> clips -> shards."""
