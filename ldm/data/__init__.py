"""Data sets: images in [-1, 1] with captions. One module per source; nothing is imported before it is asked for."""
