"""Diffusion in pixels is latent diffusion without a first stage."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from torch.utils.data import default_collate as collate

import ldm
from ldm.conditioning.classes import ClassLabels
from ldm.data.digits import Digits
from ldm.diffusion.bound import step_bits
from ldm.diffusion.denoiser import split_variance
from ldm.diffusion.loss import loss_weight
from ldm.diffusion.schedule import q_sample, training_timesteps
from ldm.diffusion.training_noise import training_noise
from ldm.inference.generate import change_recipe, default_recipe
from ldm.pixel_diffusion import PixelDiffusion
from ldm.saving import save
from ldm.training.pixel_diffusion import PixelDiffusionStage
from ldm.training.stage import Trained
from ldm.util import call_with

CLASSES = {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 11}}
PIXEL = {
    "unet_config": {
        "target": "ldm.models.unet.UNetModel",
        "params": {
            "image_size": 32,
            "in_channels": 1,
            "out_channels": 1,
            "model_channels": 8,
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "channel_mult": [1, 1],
            "num_heads": 1,
            "num_classes": 11,
            "norm_groups": 4,
        },
    },
    "channels": 1,
    "cond_stage_config": CLASSES,
    "schedule": {"name": "linear"},
    "defaults": {"height": 32, "width": 32, "steps": 4, "scale": 1.0, "sampler": "ddpm"},
}
CONFIG = {"target": "ldm.pixel_diffusion.PixelDiffusion", "params": PIXEL}


def build(**settings) -> PixelDiffusion:
    torch.manual_seed(0)
    model = PixelDiffusion(**{**PIXEL, **settings}).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))  # what starts at zero would make every prediction zero
    return model


def pixels(model: PixelDiffusion, classes: list, **settings) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in model.generate(classes, **settings)])


def test_pixels_are_the_latents():
    model, x = build(), torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.equal(model.encode(x), x) and torch.equal(model.decode(x), x)
    assert model.latent_size(32, 32) == (1, 32, 32) and model.multiple == 2
    assert not list(model.first_stage_model.parameters())


def test_a_class_is_a_number_or_text():
    """The null class is the last one, or the empty text."""
    labels = ClassLabels(11)
    assert labels.null == 10 and labels(["3", 7, ""])["c_adm"].tolist() == [3, 7, 10]
    refused("class 'five' does not exist: this model's are 0 to 10", labels, ["five"])
    refused("class 11 does not exist", labels, torch.tensor([11]))


def test_generating():
    model = build()
    drawn = pixels(model, [5, 5, 3], seed=4)
    assert drawn.shape == (3, 32, 32) and (drawn[0] != drawn[1]).any()
    alone = pixels(model, ["5"], seed=5)
    assert np.abs(alone[0] - drawn[1]).max() <= 1  # the same noise, alone and in a batch
    guided = pixels(model, [5, 5, 3], seed=4, scale=3.0)
    assert (guided != drawn).any()


def test_auto_chooses_by_the_number_of_steps():
    model = build(schedule={"name": "linear", "T": 6})
    for steps, name in ((6, "ddpm"), (3, "ddim")):
        drawn = pixels(model, [5], steps=steps, sampler="auto")
        assert (drawn == pixels(model, [5], steps=steps, sampler=name)).all()
    assert (
        pixels(model, [5], steps=3, sampler="auto", eta=1.0) == pixels(model, [5], steps=3, sampler="euler_a")
    ).all()
    recipe = default_recipe(model, "tiny", sampler="auto", steps=6)
    assert (recipe.sampler, recipe.eta) == ("ddpm", 1.0)
    assert change_recipe(recipe, model, sampler="auto", steps=3).sampler == "ddim"


def test_clipping_is_that_of_x0_after_guidance():
    found = {}
    for clip in (True, False):
        steps = []
        build(clip=clip).generate([5], scale=30.0, steps=3, callback=steps.append)
        found[clip] = max(step.x0.abs().max().item() for step in steps)
    assert found[True] == 1.0 and found[False] > 1.5


def test_a_file_gives_the_model_back(tmp_path):
    model = build()
    save(model, tmp_path / "pixel.safetensors")
    again = ldm.load(tmp_path / "pixel.safetensors", device="cpu")
    assert type(again) is PixelDiffusion and again.clip == 1.0
    assert (pixels(model, [1, 2]) == pixels(again, [1, 2])).all()
    with pytest.raises(
        ValueError, match="holds a ldm.pixel_diffusion.PixelDiffusion: only latent diffusion models have --vae"
    ):
        ldm.load(tmp_path / "pixel.safetensors", vae=ldm.loading.SHIPPED)
    with pytest.raises(ValueError, match="holds a ldm.pixel_diffusion.PixelDiffusion, which cannot be a model's unet"):
        ldm.load(unet=tmp_path / "pixel.safetensors")
    for kind in ("compvis", "diffusers"):
        with pytest.raises(ValueError, match=f"a PixelDiffusion cannot be written as '{kind}', only as 'ldm'"):
            save(model, tmp_path / "other", format=kind)


@pytest.mark.parametrize(("error", "weight"), [("l2", {"name": "none"}), ("l1", {"name": "min_snr", "gamma": 2.0})])
def test_the_loss_by_hand(error, weight):
    """With the same random numbers sampled again in the same order."""
    stage, batch = learning(class_dropout=0.5, error=error, weight=weight)
    model = stage.latent_diffusion
    torch.manual_seed(7)
    loss, metrics = stage.loss(batch)
    torch.manual_seed(7)
    labels = torch.where(torch.rand(4) < 0.5, 10, batch["label"])
    t, noise = training_timesteps("uniform", 4, 1000), torch.randn(4, 1, 32, 32)
    output = model.model.diffusion_model(q_sample(batch["image"], t, noise, model.schedule), t, y=labels)
    errors = (F.mse_loss if error == "l2" else F.l1_loss)(output, noise, reduction="none").mean((1, 2, 3))
    weights = loss_weight(prediction="eps", alphas_cumprod_t=model.schedule.alphas_cumprod[t], **weight)
    torch.testing.assert_close(loss, (errors * weights).mean(), rtol=1e-5, atol=1e-7)
    assert metrics["loss"] == loss and 0 < (labels == 10).sum() < 4


def test_previews_show_every_class():
    stage = PixelDiffusionStage(CONFIG, 1e-3, previews=12)
    assert stage.preview_prompts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(stage.train(False).preview()) == 12


def test_classes_without_a_null_class():
    cond = {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 10, "null": False}}
    config = {**CONFIG, "params": {**PIXEL, "cond_stage_config": cond}}
    stage = PixelDiffusionStage(config, 1e-3, class_dropout=0.0, previews=12)
    assert stage.preview_prompts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    labels = torch.tensor([9, 0, 9])
    assert torch.equal(stage.data({"image": torch.zeros(3, 1, 32, 32), "label": labels})[1]["c_adm"], labels)
    refused("dropout 0.1 needs a null condition, which this", PixelDiffusionStage, config, 1e-3, class_dropout=0.1)
    assert PixelDiffusionStage(config, 1e-3).class_dropout == 0
    params = {**config["params"], "defaults": {**PIXEL["defaults"], "scale": 2.0}}
    with pytest.raises(ValueError, match="^the model's defaults: guidance scale 2 needs a null or negative"):
        PixelDiffusionStage({**config, "params": params}, 1e-3, class_dropout=0.0)
    refused("guidance scale 2 needs a null or negative", stage.latent_diffusion.generate, [3], scale=2.0)


def embedded(n_classes: int) -> dict:
    """PIXEL with class embeddings, which the network attends to."""
    unet = {**PIXEL["unet_config"]["params"], "num_classes": None, "attention_resolutions": [2]}
    unet |= {"use_spatial_transformer": True, "context_dim": 4}
    embedder = {"target": "ldm.conditioning.classes.ClassEmbedder", "params": {"embed_dim": 4, "n_classes": n_classes}}
    return {"unet_config": {**PIXEL["unet_config"], "params": unet}, "cond_stage_config": embedder}


def test_previews_of_a_single_class():
    params = {**PIXEL, **embedded(1)}
    assert PixelDiffusionStage({**CONFIG, "params": params}, 1e-3, previews=3).preview_prompts == [0, 0, 0]


def test_class_embeddings_learn():
    """With the network, averaged and saved as it is; a class that the batch lacks stays as it was."""
    stage, batch = learning(weight_decay=0.0, changes=embedded(11))
    before = stage.latent_diffusion.cond_stage_model.embedding.weight.detach().clone()
    (optimizer,) = stage.optimizers()
    stage.loss(batch)[0].backward()
    optimizer.step()
    assert stage.networks.keys() == {"model", "cond_stage"}
    moved = (stage.export()[1]["cond_stage_model.embedding.weight"] != before).any(1)
    assert set(moved.nonzero().flatten().tolist()) == set(batch["label"].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound_weight": -1.0}, "bound_weight -1.0 must be a number of at least 0"),
        (
            {"model": {**CONFIG, "params": {**PIXEL, "learned_variance": True}}},
            "returns 2 x 1 channels, but this one returns 1",
        ),
        ({"model": {**CONFIG, "params": {**PIXEL, "self_condition": True}}}, "does not fit latents"),
        ({"class_dropout": 2.0}, "class_dropout 2.0 must be a number from 0 to 1"),
        ({"model": {**CONFIG, "params": {**PIXEL, "prediction": "y"}}}, "unknown prediction 'y'"),
        ({"model": {**CONFIG, "params": {**PIXEL, "channels": 3}}}, r"the network does not fit latents \(3, 32, 32\)"),
        ({"model": {**CONFIG, "params": {**PIXEL, "cond_stage_config": None}}}, "needs y"),
        (
            {"model": {**CONFIG, "params": {**PIXEL, "defaults": {**PIXEL["defaults"], "steps": 1001}}}},
            "number of steps must be from 1 to 1000",
        ),
        ({"previews": 0}, "previews 0 must be an integer from 1"),
        (
            {"model": {**CONFIG, "params": {**PIXEL, "cond_stage_config": {**CLASSES, "params": {"n_classes": 12}}}}},
            "does not fit .* num_classes.*: index out of range",
        ),
        ({"model": {"target": "torch.nn.Identity"}}, "not a torch.nn.Identity conditioned by NoneType"),
    ],
)
def test_mistakes_in_a_configuration(settings, message):
    refused(message, call_with, "stage", PixelDiffusionStage, {"model": CONFIG, "learning_rate": 1e-3, **settings})


def test_images_of_another_size():
    params = {**PIXEL, "defaults": {**PIXEL["defaults"], "height": 16, "width": 16}}
    stage = PixelDiffusionStage({**CONFIG, "params": params}, 1e-3)
    refused(r"the images of Digits are \(1, 32, 32\) and the model's, .* \(1, 16, 16\)", stage.prepare, Digits(first=5))


def test_a_note_on_nonzero_terminal_snr(capsys):
    """300 unscaled linear steps leave sqrt(alpha-bar) = 0.2192; 1000 leave 0.006."""
    PixelDiffusionStage({**CONFIG, "params": {**PIXEL, "schedule": {"name": "linear", "T": 300}}}, 1e-3)
    assert "last noise level of this schedule, 299, still has signal level 0.219" in capsys.readouterr().err
    PixelDiffusionStage(CONFIG, 1e-3)
    assert capsys.readouterr().err == ""


WIDER = {"learned_variance": {"out_channels": 2}, "self_condition": {"in_channels": 2}}


def widened(*options: str) -> dict:
    """PIXEL with these options, and the channels that its network needs for them."""
    unet = PIXEL["unet_config"]["params"]
    for option in options:
        unet = unet | WIDER[option]
    return {"unet_config": {**PIXEL["unet_config"], "params": unet}, **dict.fromkeys(options, True)}


@pytest.mark.parametrize("options", [["learned_variance"], ["self_condition"], list(WIDER)])
def test_wider_models_generate_the_same_alone_and_in_a_batch(options, tmp_path):
    """By guidance in an interval too, with the sampler that takes the variance; and from a file."""
    model = build(**widened(*options))
    settings = {"sampler": "ddpm", "steps": 6, "scale": 2.0, "interval": (0.5, 20.0)}
    drawn = pixels(model, [5, 5, 3], seed=4, **settings)
    alone = pixels(model, ["5"], seed=5, **settings)
    assert np.abs(alone[0] - drawn[1]).max() <= 1 and (drawn[0] != drawn[1]).any()
    save(model, tmp_path / "pixel.safetensors")
    again = ldm.load(tmp_path / "pixel.safetensors", device="cpu")
    assert (pixels(again, [5, 5, 3], seed=4, **settings) == drawn).all()


def test_a_self_conditioned_model_is_given_its_last_x0():
    model, inputs, steps = build(**widened("self_condition")), [], []
    network = model.model.diffusion_model
    network.register_forward_pre_hook(lambda module, args: inputs.append(args[0][:, 1:].clone()))
    model.generate([1, 2], steps=3, callback=steps.append)
    assert not inputs[0].any()
    for given, step in zip(inputs[1:], steps, strict=False):
        assert torch.equal(given, step.x0)
    del inputs[:]
    model.generate([1, 2], steps=1)
    assert not inputs[0].any()  # nothing of the run before


def test_the_learned_variance_changes_ddpm_only():
    model = build(**widened("learned_variance"))
    plain = {name: pixels(model, [1], sampler=name) for name in ("ddpm", "ddim", "euler_a")}
    out = model.model.diffusion_model.out[-1]
    out.weight[1].zero_()
    out.bias[1] = -1.0  # the small variance, which is that of euler_a
    assert (pixels(model, [1], sampler="ddim") == plain["ddim"]).all()
    assert (pixels(model, [1], sampler="ddpm") == plain["euler_a"]).all() and (plain["ddpm"] != plain["euler_a"]).any()


def learning(
    *options: str, class_dropout: float = 0.0, changes: dict | None = None, **settings
) -> tuple[PixelDiffusionStage, dict]:
    """A stage whose network has no zero weights, and a batch."""
    torch.manual_seed(0)
    params = {**PIXEL, **widened(*options), **(changes or {})}
    stage = PixelDiffusionStage({**CONFIG, "params": params}, 1e-3, class_dropout=class_dropout, **settings)
    with torch.no_grad():
        for p in Trained(stage).parameters():
            p.add_(0.05 * torch.randn_like(p))
    return stage, collate(stage.prepare(Digits(first=50)).__getitems__([3, 1, 40, 41]))


def test_the_hybrid_loss_by_hand():
    """L_simple + 0.001 L_vlb, whose gradient reaches the variance alone."""
    stage, batch = learning("learned_variance")
    out = stage.latent_diffusion.model.diffusion_model.out[-1]
    torch.manual_seed(7)
    loss, _ = stage.loss(batch)
    torch.manual_seed(7)
    t, noise = training_timesteps("uniform", 4, 1000), torch.randn(4, 1, 32, 32)
    model, x0 = stage.latent_diffusion, batch["image"]
    x = q_sample(x0, t, noise, model.schedule)
    eps, share = split_variance(model.model.diffusion_model(x, t, y=batch["label"]), 1)
    ab = model.schedule.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    guessed = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    bits = 1000 * step_bits(x0, x, t, guessed, share, model.schedule).mean()
    torch.testing.assert_close(loss, F.mse_loss(eps, noise) + 0.001 * bits, rtol=1e-4, atol=1e-6)
    of_hybrid = torch.autograd.grad(loss, out.weight)[0]
    torch.manual_seed(7)
    stage.objective.extras["bound_weight"] = 0.0
    of_simple = torch.autograd.grad(stage.loss(batch)[0], out.weight)[0]
    torch.testing.assert_close(of_hybrid[0], of_simple[0])  # the mean's
    assert of_hybrid[1].abs().max() > 0 and not of_simple[1].any()


def test_self_conditioned_training_is_given_its_own_x0_at_even_odds():
    stage, batch = learning("self_condition")
    model, inputs = stage.latent_diffusion, []
    network = model.model.diffusion_model
    network.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    given = 0
    for seed in range(40):
        del inputs[:]
        torch.manual_seed(seed)
        loss, _ = stage.loss(batch)
        assert not inputs[0][:, 1:].any()
        if len(inputs) == 2:  # the same noised image again, and a guess within [-1, 1] of it
            given += 1
            assert torch.equal(inputs[0][:, :1], inputs[1][:, :1]) and 0 < inputs[1][:, 1:].abs().max() <= 1
    assert 10 <= given <= 30  # of 40 at one half: 3.2 standard deviations
    loss.backward()  # the guess has no gradient, the second pass has
    assert all(p.grad is not None for p in network.parameters())


def test_noise_of_a_stage(monkeypatch):
    stage, batch = learning(noise={"offset": 0.5, "immiscible": True})
    given = []
    monkeypatch.setattr(
        stage.objective, "losses", lambda z, cond, t, noise, *_: given.append(noise) or z.flatten(1).mean(1)
    )
    torch.manual_seed(3)
    stage.loss(batch)
    torch.manual_seed(3)
    training_timesteps("uniform", 4, 1000)
    assert torch.equal(given[0], training_noise(batch["image"], offset=0.5, immiscible=True))
