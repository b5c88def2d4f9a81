"""Latent diffusion with text: `model = ldm.load(); images = model.generate(["a handwritten digit five"])`.

The reading path: all that it takes to train the digits model and to sample from it, in this order (with lines).

How an image is sampled:
    diffusion/schedule.py            334  noise levels: betas, alpha-bar, sigma; the timesteps to visit
    diffusion/denoiser.py            166  a network that predicts eps, x0, v or flow -> denoise(x, sigma, cond)
    diffusion/guidance.py            122  denoise -> denoise: classifier-free guidance and others
    diffusion/sampling/              503  first_order explains DDIM and DDPM; the others refine it
    latent_diffusion.py              261  first stage + text encoder + UNet + schedule
    generation.py                    229  generate: prompts -> images
The networks:
    models/unet.py                   289  the UNet
    models/blocks.py                 315  its residual blocks, and its plan of levels (levels.py)
    models/attention.py              185  attention to the image and to the text
    models/autoencoder.py            431  the first stage, with its Gaussian latents (distributions.py)
    models/clip.py                   170  the text encoder
    conditioning/text.py             348  prompts -> tokens (tokenizer.py) -> conditioning
How the model is trained:
    diffusion/loss.py                135  errors and their weights; the noise (training_noise.py)
    training/stage.py                245  what a stage of training is, and its loss (objective.py)
    training/autoencoder.py          189  stage 1: the first stage
    training/clip.py                 154  stage 2: the text encoder
    training/diffusion.py            447  stage 3: the UNet (with denoising.py and latents.py)
    training/loop.py                 473  the training loop, its EMA, learning rate and data order
    data/captions.py                 227  the captions of digits (with captioned.py)
    data/mnist.py                    302  MNIST, scikit-learn's digits, and their measured style (measure.py)
    loading.py                       428  load models, our own file format (checkpoint/file.py, writing.py)

Everything else is optional: other models and samplers' settings, fine-tuning, evaluation, the command line, CompVis's
interface. `tests/test_reading_path.py` keeps this list complete.
"""

from importlib import import_module
from typing import Any

from ldm import legacy_paths

__version__ = "0.1.0"

_HOMES = {"load": "ldm.loading", "save": "ldm.saving", "LatentDiffusion": "ldm.latent_diffusion"}
_HOMES |= {name: f"ldm.inference.{name}" for name in ("optimize", "xy_grid")} | {"interpolate": "ldm.interpolation"}
__all__ = ["LatentDiffusion", "__version__", "interpolate", "load", "optimize", "save", "xy_grid"]

legacy_paths.install()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import ldm` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
