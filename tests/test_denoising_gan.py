"""DenoisingGAN: its latents are a function of each image's seed, and sampling is the posterior, step by step."""

import copy

import numpy as np
import pytest
import torch
from conftest import pixels, randomised
from test_ddgan_stage import MODEL

import ldm
from ldm.diffusion.bound import q_posterior
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.images import to_pil
from ldm.inference.precision import set_precision
from ldm.optional.denoising_gan import DenoisingGAN, latent_seed


@pytest.fixture(scope="module")
def model() -> DenoisingGAN:
    torch.manual_seed(0)
    return randomised(DenoisingGAN(**copy.deepcopy(MODEL))).eval().requires_grad_(False)


def test_its_parts(model):
    assert (model.schedule.T, model.prediction, model.channels, model.multiple) == (4, "x0", 1, 4)
    assert float(model.schedule.alphas_cumprod[-1]) == pytest.approx(4.319e-5, rel=5e-4)


def test_generate_is_the_papers_sampling(model):
    """Algorithm: from unit noise, four times x0' = G(x, t, z) and a sample of the posterior; the last is x0' itself."""
    seeds, y = [7, 8], torch.tensor([3, 4])
    found = pixels(model.generate(y.tolist(), seeds=seeds))
    noise, latents = SeededNoise(seeds, (1, 32, 32)), SeededNoise([latent_seed(seed) for seed in seeds], (6,))
    x = noise()
    for t in (3, 2, 1, 0):
        t = torch.full((2,), t)
        mean, variance = q_posterior(model.apply_model(x, t, {"c_adm": y}, latents()), x, t, model.schedule)
        x = mean + variance.sqrt() * noise() if t[0] > 0 else mean
    # float32 in two frames, and rounding to integers
    assert np.abs(found - pixels(to_pil(x))).max() <= 1
    assert found.std() > 1


def test_it_predicts_x0_and_nothing_else(model, tmp_path):
    ldm.save(model, tmp_path / "gan.safetensors")
    assert ldm.load(tmp_path / "gan.safetensors", device="cpu").prediction == "x0"
    with pytest.raises(ValueError, match="holds a ldm.optional.denoising_gan.DenoisingGAN, which has no choice"):
        ldm.load(tmp_path / "gan.safetensors", device="cpu", prediction="eps")


def test_an_image_is_the_same_alone_and_in_any_batch(model):
    together = pixels(model.generate([1, 2, 3], seed=5))
    alone = pixels([model.generate([1 + i], seed=5 + i)[0] for i in range(3)])
    split = pixels(model.generate([1, 2, 3], seed=5, batch_size=2))
    assert np.abs(together - alone).max() <= 1 and np.abs(together - split).max() <= 1
    assert np.abs(together - pixels(model.generate([1, 2, 3], seed=6))).max() > 10


def test_latents_are_fresh_at_each_call_and_follow_the_seeds(model):
    x = torch.randn(2, 1, 32, 32)
    cond = model.condition([1, 1])
    first, second = model.denoiser([4, 5]), model.denoiser([5, 4])
    a, b = first(x, 1.0, cond).x0, first(x, 1.0, cond).x0
    assert not torch.allclose(a, b, atol=1e-3)
    torch.testing.assert_close(second(x.flip(0), 1.0, cond).x0, a.flip(0), rtol=0, atol=1e-5)
    # the same images under two conditionings at once (guidance) get the same latents in both
    both = model.denoiser([4, 5])(x.repeat(2, 1, 1, 1), 1.0, model.condition([1, 1, 1, 1])).x0
    torch.testing.assert_close(both, a.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    free = model.denoiser()
    assert not torch.allclose(free(x, 1.0, cond).x0, free(x, 1.0, cond).x0, atol=1e-3)


def test_latents_are_no_images_noise():
    """One stream for both would tie z to the start: 100 numbers of it would be the image's first 100."""
    seeds = [latent_seed(seed) for seed in range(1000)]
    assert len({seed % 2**32 for seed in seeds}) == 1000  # torch's CPU generator uses 32 bits
    assert all(0 <= seed < 2**64 for seed in seeds) and not set(seeds) & set(range(10**6))


def test_saved_and_loaded(model, tmp_path):
    path = tmp_path / "ddgan.safetensors"
    ldm.save(model, path)
    loaded = ldm.load(path, device="cpu")
    assert type(loaded) is DenoisingGAN
    assert np.array_equal(pixels(loaded.generate([1, 2])), pixels(model.generate([1, 2])))


@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_it_computes_in_the_precision_that_is_set(model, name):
    full, other = pixels(model.generate([3], seed=1)), copy.deepcopy(model)
    set_precision(other, name)
    rounded = np.abs(pixels(other.generate([3], seed=1)) - full)
    assert 0 < rounded.max() and rounded.mean() < 4


def test_what_is_set_on_it_is_saved(model):
    changed = copy.deepcopy(model)
    changed.schedule_params = {"name": "vp", "T": 2}
    changed.defaults["steps"] = 2
    again = DenoisingGAN(**changed.config)
    assert (again.schedule.T, again.defaults["steps"]) == (2, 2)
    changed.prediction = "eps"
    with pytest.raises(ValueError, match="a DenoisingGAN always has prediction x0"):
        changed.config  # noqa: B018
