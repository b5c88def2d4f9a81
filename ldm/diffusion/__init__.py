"""The mathematics of diffusion, knowing no network: read schedule, denoiser, guidance, sampling in that order."""
