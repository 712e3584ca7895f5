"""Video autoencoders, one file each."""
