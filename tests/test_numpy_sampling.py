"""The whole way from noise to an image on numpy arrays: what it is on torch's tensors, by the same functions."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.arrays import cast_like, library
from ldm.diffusion.denoiser import from_vp, make_denoiser, to_vp
from ldm.diffusion.guidance import classifier_free, clip_x0
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.sampling.numpy_noise import NumpyNoise
from ldm.diffusion.schedule import Schedule, make_schedule, sampling_sigmas

SHAPE, SEEDS = (2, 4, 4), [3, 8]
SCHEDULE = make_schedule("cosine", zero_terminal_snr=True)
ON_NUMPY = Schedule(SCHEDULE.alphas_cumprod.numpy())


def network(x, t, cond):
    """Any smooth function of all inputs, in operations that both libraries have."""
    t = t.reshape(-1, 1, 1, 1) / 1000
    return library(x).tanh(x * (1 - t) + 0.3 * t + cond["c_crossattn"].reshape(-1, 1, 1, 1))


def run(name, prediction, schedule, noise, dtype, learned=False, **options):
    """The image, and the dtypes and types of the steps' states."""
    first = noise()
    x = cast_like(first, library(first).zeros(1, dtype=dtype))
    double = (lambda *given: library(x).concatenate([network(*given)] * 2, 1)) if learned else network
    denoise = make_denoiser(double, schedule, prediction, learned_variance=learned)
    conds = [{"c_crossattn": cast_like([[low], [high]], x)} for low, high in ((0.1, -0.4), (0.2, 0.0))]
    guided = clip_x0(classifier_free(denoise, *conds, 2.5, (0.2, 30.0), 0.7, prediction), 3.0)
    sigmas = sampling_sigmas(schedule, 6, **options)
    for step in SAMPLERS[name](guided, from_vp(x, float(sigmas[0])), sigmas, noise=noise):
        assert type(step.x) is type(step.x0) is type(x) and step.x.dtype == dtype
    return to_vp(step.x, float(sigmas[-1]))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_every_sampler_on_both(name, prediction):
    options = {"spacing": SAMPLERS[name].spacing, "learned": name == "ddpm"}
    ours = run(name, prediction, ON_NUMPY, NumpyNoise(SEEDS, SHAPE), np.float32, **options)
    theirs = run(name, prediction, SCHEDULE, SeededNoise(SEEDS, SHAPE), torch.float32, **options)
    assert abs(theirs).max() > 0.3  # of an image, not of nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)  # float32 over six steps from sigma 4096


@pytest.mark.parametrize("spacing", ["karras", "exponential", "leading", "quad", "999,640.5,320,100,30,2"])
@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
def test_every_spacing_on_both(spacing, final_sigma):
    ours, theirs = (sampling_sigmas(s, 6, spacing, final_sigma) for s in (ON_NUMPY, SCHEDULE))
    assert isinstance(ours, np.ndarray) and isinstance(theirs, torch.Tensor) and theirs.dtype == torch.float64
    np.testing.assert_array_equal(ours, theirs)


def test_half_precision_is_widened():
    denoise = make_denoiser(lambda x, t, cond: x, SCHEDULE, "eps")
    for x in (np.ones((1, 2), np.float16), torch.ones(1, 2, dtype=torch.bfloat16)):
        step = next(SAMPLERS["ddim"](lambda x, sigma: denoise(x, sigma, {}), x, [2.0, 1.0]))
        assert str(step.x.dtype).removeprefix("torch.") == "float32"


def test_torch_is_not_imported():
    modules = "arrays diffusion.guidance diffusion.sampling diffusion.sampling.numpy_noise interpolation images"
    imports = "".join(f"import ldm.{name}; " for name in modules.split())
    subprocess.run([sys.executable, "-c", f"import sys; {imports}assert 'torch' not in sys.modules"], check=True)
