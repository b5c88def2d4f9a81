"""Comparing kinds of generators: what is drawn, how many evaluations it takes, and the row of figures."""

import torch

from ldm.evaluation import trilemma
from ldm.evaluation.networks import Measuring
from ldm.evaluation.reference import load_reference
from ldm.evaluation.samples import from_pil, quantise


def test_the_prior_is_decoded_seed_by_seed(tiny_model):
    images = trilemma.draw_prior(tiny_model, 5, batch_size=2, seed=3)
    assert images.shape == (5, 28, 28) and images.dtype == torch.uint8
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = quantise(tiny_model.decode(latents[None]))[0]  # the second one's seed
    assert (images[1].int() - expected.int()).abs().max() <= 1


def test_models_are_asked_for_the_reference(tiny_model):
    captions = load_reference().captions(3, "train")
    drawn = trilemma.draw_asked(tiny_model, captions, batch_size=2, seed=1, scale=1, steps=2)
    expected = from_pil(tiny_model.generate([captions[2].text], seed=3, scale=1, steps=2))
    assert drawn.shape == (3, 28, 28) and (drawn[2].int() - expected[0].int()).abs().max() <= 1


def test_evaluations(tiny_model):
    assert trilemma.evaluations(tiny_model) == 4
    assert trilemma.evaluations(tiny_model, sampler="ddpm", steps=10) == 10
    calls = []
    hook = tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
    for own in ({"sampler": "heun", "steps": 10}, {"sampler": "dpm2", "steps": 5, "spacing": "leading"}):
        tiny_model.generate(["a"], scale=1, **own)
        assert trilemma.evaluations(tiny_model, **own) == len(calls) > 1.5 * own["steps"]  # most steps take two
        calls.clear()
    hook.remove()


def test_a_row_of_real_images_is_near_the_floor():
    reference, networks = load_reference(), Measuring.load()
    labels = reference.image_labels[:300]
    row = trilemma.measure("real", 0, lambda: reference.pictures[:300], reference, networks, labels)
    assert (row["name"], row["evaluations"], row["n"]) == ("real", 0, 300)
    assert 0.5 < row["ratio"] < 2 and row["recall"] > 0.7  # the first ones are no fair sample: cleaner than the rest
    assert 0 <= row["cpu_seconds"] < 1 and row["accuracy"] > 0.98
    noise = trilemma.measure("noise", 0, lambda: torch.randint(0, 256, (300, 28, 28)).byte(), reference, networks)
    assert noise["ratio"] > 20 and noise["recall"] < 0.05 and noise["accuracy"] is None
