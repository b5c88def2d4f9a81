"""Systems beside the main path: teaching networks, denoising diffusion GANs, noisy classifiers, and their stages."""
