"""Training a denoising diffusion GAN: both losses written out, whose gradients they are, R1's turn, exact resume."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import refused
from omegaconf import OmegaConf
from safetensors.torch import load_file
from script_runs import load_script, names, pixels, recipe
from test_ddgan import UNET
from test_loop import assert_same, interrupt
from torch.nn import functional as F
from torch.utils.data import default_collate as collate

import ldm
from ldm.data.digits import Digits
from ldm.optional.ddgan_stage import DenoisingGANStage
from ldm.training import loop
from ldm.training.loop import Interrupted, train
from ldm.training.stage import Trained

CONFIG = Path(__file__).parents[1] / "configs" / "pixel" / "ddgan.yaml"
GENERATOR = {"unet": UNET, "latent_dim": 6, "mapped": 24, "layers": 2}
DISCRIMINATOR = {"width": 8, "channel_mult": [1, 2], "time_channels": 16, "patch": 2}
MODEL = {
    "unet_config": {"target": "ldm.optional.ddgan.Generator", "params": {**GENERATOR, "classes": 11}},
    "channels": 1,
    "cond_stage_config": {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 11}},
    "defaults": {"height": 32, "width": 32, "steps": 4, "scale": 1.0, "sampler": "ddpm"},
}
PARAMS = {
    "model": {"target": "ldm.optional.denoising_gan.DenoisingGAN", "params": MODEL},
    "discriminator": {**DISCRIMINATOR, "classes": 11},
    "learning_rate": 1e-3,
    "discriminator_rate": 1e-3,
    "previews": 3,
}
EMBEDDER = {"target": "ldm.conditioning.classes.ClassEmbedder", "params": {"embed_dim": 4, "n_classes": 11}}


@pytest.fixture(scope="module")
def batch() -> dict:
    return collate(Digits(first=64).__getitems__(list(range(8))))


def stage(**settings) -> DenoisingGANStage:
    torch.manual_seed(0)
    made = DenoisingGANStage(**copy.deepcopy(PARAMS) | settings)
    with torch.no_grad():
        for p in Trained(made).parameters():
            p.add_(0.05 * torch.randn_like(p))  # what starts at zero would make every image grey
    return made


def unconditional(**settings) -> DenoisingGANStage:
    generator = {"target": MODEL["unet_config"]["target"], "params": GENERATOR}
    params = {**MODEL, "unet_config": generator, "cond_stage_config": None}
    return stage(model={**PARAMS["model"], "params": params}, discriminator=DISCRIMINATOR, **settings)


@pytest.mark.parametrize("conditional", [True, False])
def test_the_losses_by_hand(batch, conditional):
    """(Xiao et al. 2022, eq. 4 and 5) with the same random numbers sampled again."""
    held = 2.0 if conditional else 0.0  # to x0 (Phung et al. 2023)
    made = stage(r1_weight=0.3, class_dropout=0.5, reconstruction=held) if conditional else unconditional(r1_weight=0.3)
    torch.manual_seed(9)
    of_generator, _, steps = made.turn(batch, 0, 0, None)
    of_discriminator, *_ = made.turn(batch, 1, 0, steps)
    torch.manual_seed(9)
    y = torch.where(torch.rand(8) < 0.5, 10, batch["label"]) if conditional else None
    t = torch.randint(0, 4, (8,))
    noise, fresh, z = torch.randn(8, 1, 32, 32), torch.randn(8, 1, 32, 32), torch.randn(8, 6)
    x0, again = batch["image"], torch.randn(8, 1, 32, 32)
    beta = torch.tensor([0.478286, 0.849203, 0.956422, 0.987394])[t].reshape(8, 1, 1, 1)
    ab = torch.tensor([1.0, 0.521714, 0.078673, 0.00342837, 4.3219e-5])
    before, now = ab[t].reshape(8, 1, 1, 1), ab[t + 1].reshape(8, 1, 1, 1)
    true = before.sqrt() * x0 + (1 - before).sqrt() * noise
    x = (1 - beta).sqrt() * true + beta.sqrt() * fresh
    generated = made.model.diffusion_model(x, t, z, y=y)
    mean = before.sqrt() * beta / (1 - now) * generated + (1 - beta).sqrt() * (1 - before) / (1 - now) * x
    fake = mean + (beta * (1 - before) / (1 - now)).sqrt() * again
    true.requires_grad_()
    real, judged = made.discriminator(true, x, t, y=y), made.discriminator(fake, x, t, y=y)
    expected = F.softplus(-judged).mean() + held * (generated - x0).square().mean()
    torch.testing.assert_close(of_generator, expected, rtol=1e-4, atol=1e-6)
    penalty = torch.autograd.grad(real.sum(), true)[0].square().sum((1, 2, 3)).mean()
    expected = F.softplus(-real).mean() + F.softplus(judged).mean() + 0.3 / 2 * penalty
    torch.testing.assert_close(of_discriminator, expected, rtol=1e-4, atol=1e-6)


def test_each_loss_reaches_its_own_network_only(batch):
    made = stage()
    loss, _, steps = made.turn(batch, 0, 0, None)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.model.parameters())
    assert all(p.grad is None and p.requires_grad for p in made.discriminator.parameters())
    Trained(made).zero_grad()
    made.turn(batch, 1, 0, steps)[0].backward()
    assert all(p.grad is None for p in made.model.parameters())
    assert all(p.grad is not None for p in made.discriminator.parameters())
    optimizers = made.optimizers()
    sizes = [len(list(network.parameters())) for network in (made.model, made.discriminator)]
    assert [len(o.param_groups[0]["params"]) for o in optimizers] == sizes
    assert all(o.defaults["betas"] == (0.5, 0.9) and o.defaults["weight_decay"] == 0 for o in optimizers)


def test_r1_is_lazy(batch):
    made = stage(r1_every=3)
    _, _, steps = made.turn(batch, 0, 0, None)
    penalised = ["r1" in made.turn(batch, 1, number, steps)[1] for number in range(7)]
    assert penalised == [True, False, False, True, False, False, True]


def config(outdir: Path) -> dict:
    return {
        "name": "ddgan",
        "outdir": str(outdir),
        "seed": 3,
        "stage": {"target": "ldm.optional.ddgan_stage.DenoisingGANStage", "params": {**PARAMS, "r1_every": 2}},
        "data": {"target": "ldm.data.digits.Digits", "params": {"first": 20}},
        "loop": {"steps": 5, "batch_size": 4, "log_every": 1, "preview_every": 2, "precision": "fp32"},
    }


@pytest.mark.smoke
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    alone = train(config(tmp_path / "alone"), device="cpu")
    with monkeypatch.context() as patch:
        # Ctrl-C in step 2, so that step 3 is again one with R1
        patch.setattr(loop, "preview", interrupt)
        refused("stopped at step 2", train, config(tmp_path / "resumed"), error=Interrupted, device="cpu")
    torch.manual_seed(99)
    resumed = train(config(tmp_path / "resumed"), resume=True, device="cpu")
    assert_same(alone, resumed)
    assert not any("discriminator" in name for name in load_file(alone))
    model = ldm.load(alone, device="cpu")
    assert len(model.generate([0, 5], seed=1)) == 2
    assert len(list((alone.parent / "previews").iterdir())) == 3


@pytest.mark.parametrize("key", ["learning_rate", "discriminator_rate"])
def test_a_learning_rate_that_ruins_the_weights_stops_the_training(tmp_path, key):
    settings = config(tmp_path)
    settings["stage"]["params"][key] = 1e30
    match = (
        r"ddgan: a weight became .*e\+\d+ by step 1, so training stopped; nothing was saved yet: .* lower learning rate"
    )
    refused(match, train, settings, device="cpu")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("resume.pt"))


def test_the_shipped_configuration_trains_and_generates(tmp_path):
    settings = OmegaConf.load(CONFIG)
    settings.data = {"target": "ldm.data.digits.Digits", "params": {"first": 20}}
    OmegaConf.save(settings, tmp_path / "ddgan.yaml")
    changes = ["loop.steps=1", "loop.batch_size=4", "loop.report_to=none", f"outdir={tmp_path}", "--device=cpu"]
    load_script("train").main([str(tmp_path / "ddgan.yaml"), *changes])
    model, out = tmp_path / "ddgan" / "model.safetensors", tmp_path / "out"
    load_script("sample").main([f"--ckpt={model}", f"--outdir={out}", "--class", "3", "4", "--device=cpu"])
    assert names(out / "samples") == ["00000.png", "00001.png"]
    assert pixels(out / "samples" / "00000.png").shape == (32, 32)
    used = recipe(out / "samples" / "00000.png")
    assert (used.steps, used.sampler) == (4, "ddpm")


def test_the_shipped_configuration_has_the_papers_numbers():
    params = OmegaConf.load(CONFIG).stage.params
    model = params.model.params
    assert OmegaConf.to_container(model.schedule) == {"name": "vp", "T": 4}
    assert (model.defaults.steps, model.unet_config.params.latent_dim) == (4, 100)
    assert (list(params.betas), params.r1_every) == ([0.5, 0.9], 15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r1_every": 0}, "r1_every 0"),
        ({"model": PARAMS["model"] | {"target": "ldm.pixel_diffusion.PixelDiffusion"}}, "has no latent generator"),
        ({"model": PARAMS["model"] | {"params": MODEL | {"cond_stage_config": EMBEDDER}}}, "use .*ClassLabels"),
        ({"r1_weight": -1.0}, "weight -1"),
        ({"discriminator": {**DISCRIMINATOR, "clases": 11}}, "^discriminator: .*'clases'.*; it takes .*'classes'"),
        ({"reconstruction": -0.5}, "reconstruction -0.5 at least 0"),
        ({"discriminator": {**DISCRIMINATOR, "classes": 11, "patch": 3}}, r"discriminator does not fit \(1, 32, 32\)"),
        ({"discriminator": {**DISCRIMINATOR, "classes": 10}}, "discriminator does not fit .* classes: index out of"),
    ],
)
def test_mistakes_show_before_training(settings, message):
    refused(message, stage, **settings)
