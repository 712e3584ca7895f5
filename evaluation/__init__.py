"""How good sets of videos and trained models are: what is measured, of which videos, by which named protocol."""
