"""Official checkpoints <-> our state dicts, one file a system, both ways."""
