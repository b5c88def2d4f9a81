"""The networks: they know no diffusion, no files and no training."""
