"""Data sets: images in [-1, 1] with captions. One module per source, imported only when it is used."""
