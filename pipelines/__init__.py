"""How the trained networks of a system encode, decode and generate: one file a system."""
