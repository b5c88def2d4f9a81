"""The three stages: their losses written out by hand, what trains and what stays frozen, and what they export."""

import copy
import math
import re

import pytest
import torch
from compvis_models import clip_folder
from conftest import TINY, refused
from torch.nn import functional as F
from torch.utils.data import default_collate as collate

import ldm
from ldm.checkpoint.writing import save_file
from ldm.conditioning.public_clip import load_text_encoder
from ldm.conditioning.text import TextEncoder
from ldm.data.digits import Digits
from ldm.diffusion.schedule import training_timesteps
from ldm.models.classifier import Judge
from ldm.models.perceptual import perceptual_distance
from ldm.training.autoencoder import AutoencoderStage
from ldm.training.clip import CLIPStage
from ldm.training.contract import note_noise
from ldm.training.diffusion import DiffusionStage
from ldm.training.latents import LatentDataset, latents_scale
from ldm.training.stage import Trained

CPU = torch.device("cpu")
FIRST_STAGE = TINY["first_stage_config"]["params"]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(first=64)


@pytest.fixture(scope="module")
def batch(digits) -> dict:
    return collate(digits.__getitems__(list(range(8))))


# --- the autoencoder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    params = {"widths": [4, 4, 8]}
    save_file(path, Judge(**params).state_dict(), {"target": "ldm.models.classifier.Judge", "params": params})
    return str(path)


def autoencoder(judge: str | None = None, **settings) -> AutoencoderStage:
    torch.manual_seed(0)
    discriminator = {"input_nc": 1, "ndf": 4, "n_layers": 1}
    options = {"discriminator": discriminator, "perceptual": judge, "preview_columns": 4, **settings}
    return AutoencoderStage(learning_rate=1e-3, **{**copy.deepcopy(FIRST_STAGE), **options})


def test_every_term_of_the_autoencoders_loss(judge, batch):
    options = {"kl_weight": 0.3, "perceptual_weight": 0.7, "disc_weight": 0.5, "edge_weight": 0.4}
    stage = autoencoder(judge, **options, reconstruction="l1")
    x = batch["image"]
    torch.manual_seed(4)
    loss, metrics, _ = stage.turn(batch, 0, 0, None)
    torch.manual_seed(4)
    reconstruction, posterior = stage.model(x)
    error = (reconstruction - x).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    perceptual = perceptual_distance(stage.frozen["perceptual"], reconstruction, x).mean()
    adversarial = -stage.adversary.network(reconstruction).mean()
    wrong = reconstruction - x
    edges = ((wrong[:, :, 1:] - wrong[:, :, :-1]).abs().mean() + (wrong[..., 1:] - wrong[..., :-1]).abs().mean()) / 2
    plain, last = error + 0.4 * edges + 0.3 * kl + 0.7 * perceptual, stage.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (plain, adversarial)]
    expected = plain + 0.5 * norms[0] / (norms[1] + 1e-4) * adversarial
    # the same sums in float32, in another order here and there
    terms = {"error": error, "edges": edges, "kl": kl, "perceptual": perceptual, "adversarial": adversarial}
    for name, value in terms.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert torch.isfinite(loss) and metrics.keys() == terms.keys()


def test_every_term_of_the_vq_autoencoders_loss(batch):
    stage = autoencoder(n_embed=8, codebook_weight=0.5, ddconfig=FIRST_STAGE["ddconfig"] | {"double_z": False})
    x = batch["image"]
    loss, metrics, _ = stage.turn(batch, 0, 0, None)
    z = stage.model.encode(x)
    entries = stage.model.quantize.embedding.weight
    nearest = entries[torch.cdist(z.movedim(1, -1).flatten(0, 2), entries).argmin(1)]
    codebook = 1.25 * (nearest - z.movedim(1, -1).flatten(0, 2)).square().mean()  # its loss and 0.25 of the commitment
    torch.testing.assert_close(metrics["codebook"], codebook, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(metrics["error"], (stage.model.decode(z) - x).square().mean(), rtol=1e-4, atol=1e-7)
    assert metrics.keys() == {"error", "codebook", "adversarial"} and loss.isfinite()
    loss.backward()
    assert entries.grad.abs().max() > 0
    for wrong in ({"kl_weight": 0.1}, {"normalize": True}):
        refused("are for a KL autoencoder", autoencoder, n_embed=8, **wrong)
    refused("codebook_weight for a VQ", autoencoder, codebook_weight=1.0)
    wide = autoencoder(discriminator=None, ddconfig=FIRST_STAGE["ddconfig"] | {"out_ch": 3})
    refused(r"are decoded to \(\d+, 3, 32, 32\): see out_ch", wide.turn, batch, 0, 0, None)


@pytest.mark.smoke
def test_each_loss_reaches_its_own_network_only(judge, batch):
    stage = autoencoder(judge)
    stage.turn(batch, 0, 0, None)[0].backward()
    assert all(p.grad is not None for p in stage.model.parameters())
    assert all(p.grad is None and p.requires_grad for p in stage.adversary.network.parameters())
    Trained(stage).zero_grad()
    loss, metrics, _ = stage.turn(batch, 1, 0, None)
    loss.backward()
    assert metrics["discriminator"] > 0
    assert all(p.grad is None for p in stage.model.parameters())
    assert all(p.grad is not None for p in stage.adversary.network.parameters())
    # the perceptual network is frozen, and neither trained nor averaged nor saved
    assert not any(p.requires_grad for p in stage.frozen["perceptual"].parameters())
    assert stage.networks.keys() == {"model", "discriminator"} and stage.frozen.keys() == {"perceptual"}
    assert [len(o.param_groups[0]["params"]) for o in stage.optimizers()] == [
        len(list(stage.model.parameters())),
        len(list(stage.adversary.network.parameters())),
    ]


def test_the_discriminator_counts_from_disc_start_on(batch):
    stage = autoencoder(disc_start=2, kl_weight=0.1)
    for number in range(4):
        loss, metrics, _ = stage.turn(batch, 0, number, None)
        adversarial = (loss - metrics["error"] - 0.1 * metrics["kl"]).item()
        discriminator = stage.turn(batch, 1, number, None)[0].item()
        if number < 2:
            assert adversarial == pytest.approx(0, abs=1e-6) and discriminator == 0
        else:
            assert abs(adversarial) > 1e-4 and discriminator > 0.1


def test_finish_gives_standard_normal_latents_per_channel(digits):
    stage = autoencoder(discriminator=None)
    with torch.no_grad():  # latents far from normal
        stage.model.quant_conv.weight *= torch.linspace(1, 30, 8)[:, None, None, None] / 10
        stage.model.quant_conv.bias += torch.linspace(-2, 2, 8)
    stage.train(False)
    images = torch.stack([digits[i]["image"] for i in range(len(digits))])
    with torch.no_grad():
        before = stage.model(images, sample_posterior=False)[0]
        stage.finish(digits)
        posterior = stage.model.encode(images)
        after = stage.model(images, sample_posterior=False)[0]
    mean = posterior.mean.mean((0, 2, 3))
    variance = (posterior.mean**2 + posterior.var).mean((0, 2, 3)) - mean**2
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(variance, torch.ones(4), rtol=1e-3, atol=0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # images stay
    config, state = stage.export()
    assert config == {"target": "ldm.models.autoencoder.AutoencoderKL", "params": FIRST_STAGE}
    assert state.keys() == stage.model.state_dict().keys()


def test_finish_may_leave_the_latents_alone(digits):
    stage = autoencoder(discriminator=None, normalize=False)
    before = copy.deepcopy(stage.model.state_dict())
    stage.finish(digits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.state_dict().items())


@pytest.mark.parametrize(("count", "shown"), [(64, 16), (6, 8), (3, 6), (1, 2)])
def test_previews_of_large_and_small_data_sets(count, shown):
    """Two rows of originals, or what there is, each with its reconstructions below it."""
    stage, data = autoencoder(), Digits(first=count)
    assert stage.prepare(data) is data
    images = stage.train(False).preview()
    assert len(images) == shown and len(images) % stage.preview_columns == 0
    assert len(stage.preview_labels()) == shown // stage.preview_columns
    assert stage.preview_labels()[:2] == ["images", "their reconstructions"]
    assert images[0].tobytes() == bytes(data.images[0].flatten().tolist())


# --- CLIP

CLIP = {"width": 16, "layers": 2, "heads": 2, "context_length": 16, "projection_dim": 12, "learning_rate": 3e-3}
CLIP["vision"] = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}


@pytest.fixture(scope="module")
def clip(digits) -> CLIPStage:
    torch.manual_seed(0)
    stage = CLIPStage(**CLIP, merges_first=20, preview_columns=5)
    assert stage.prepare(digits) is digits
    return stage


def test_captions_that_the_context_cuts_are_noted_and_none_is_refused(digits, capsys):
    CLIPStage(**CLIP).prepare(digits)
    assert capsys.readouterr().err == ""
    CLIPStage(**CLIP | {"context_length": 10}).prepare(digits)
    assert re.match(r"note: context_length 10 cuts \d+ of \d+ captions: 15 cuts none\n", capsys.readouterr().err)
    refused("context_length 2 is too short: start, end", CLIPStage(**CLIP | {"context_length": 2}).prepare, digits)


def test_positives_by_hand(clip):
    """Captions j say, of the images i: -1 is silence; a caption of another digit is no positive, whatever it says."""
    batch = {
        "label": torch.tensor([5, 5, 5, 3]),
        "style": torch.tensor([(0, 1), (2, 1), (0, 2), (0, 1)]).unbind(1),
        "stated": torch.tensor([(-1, -1), (2, -1), (0, 2), (0, 1)]).unbind(1),
        "caption": ["five", "bold 5", "a thin five leaning right", "a thin three, upright"],
    }
    assert clip.agreement == 4.0
    assert clip.positives(batch).tolist() == [
        [4, 1, 1, 0],  # thin, upright 5: "five" is all true, "bold 5" and "leaning right" only name it
        [4, 4, 1, 0],
        [4, 1, 4, 0],
        [0, 0, 0, 4],
    ]
    unlabelled = {"caption": ["a", "b", "a"]}
    assert clip.positives(unlabelled).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_contrastive_loss_by_hand(clip, batch, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(8, 5, generator=generator), dim=1) for _ in range(2))
    monkeypatch.setattr(clip, "_embed", lambda batch: (images, texts, torch.tensor(250.0)))
    loss, _ = clip.loss(batch)
    true, scale = clip.positives(batch).tolist(), 100.0  # CLIP clips its temperature at 100
    similar = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in texts.tolist()] for i in images.tolist()]
    expected = 0.0
    for square, weights in ((similar, true), (list(zip(*similar, strict=True)), list(zip(*true, strict=True)))):
        for logits, weight in zip(square, weights, strict=True):
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(value - top) for value in logits))
            terms = [w / sum(weight) * (log_sum - value) for w, value in zip(weight, logits, strict=True)]
            expected += sum(terms) / 8 / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.smoke
def test_clip_learns_and_exports_its_text_half(clip, batch):
    (optimizer,) = clip.optimizers()
    losses = []
    for _ in range(12):
        loss, metrics = clip.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and 0 <= metrics["accuracy"] <= 1
    config, state = clip.export()
    assert config["target"] == "ldm.conditioning.text.TextEncoder"
    encoder = TextEncoder(**config["params"])
    encoder.load_state_dict(state)
    prompts = [*batch["caption"], "", "an image of anything else, and longer than the context of sixteen tokens is"]
    tokens = encoder.tokenizer(prompts)
    clip.clip.train(False)
    with torch.no_grad():
        cond = encoder.eval()(prompts)
        pooled = clip.clip.encode_text(tokens)
        hidden = clip.clip.token_embedding(tokens) + clip.clip.positional_embedding
        hidden = clip.clip.ln_final(clip.clip.transformer(hidden, attn_mask=clip.clip.attn_mask))
    torch.testing.assert_close(cond["c_adm"], pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(cond["c_crossattn"], hidden, rtol=0, atol=1e-5)
    assert len(clip.preview()) == 25


def test_the_vocabulary_spells_everything(clip):
    """Words of the captions are one token each, as in CLIP's own; any other text is there down to its bytes."""
    from tokenizers import decoders

    tokenizer = clip.encoder.tokenizer
    assert tokenizer.vocab_size == 512 + len(tokenizer.merges) + 2 < 2000
    assert len(tokenizer.encode("a bold handwritten digit seven leaning right")) == 7
    for text in ("a zebra on a quetzal", "日本語", "naïve ☃ 🦓", "x" * 50):
        ids = tokenizer.encode(text)
        assert max(ids) < tokenizer.sot
        spelled = "".join(tokenizer.pipeline.id_to_token(i) for i in ids)
        words = [decoders.ByteLevel().decode([word]) for word in spelled.split("</w>")]
        assert "".join(words) == text.replace(" ", "")


def test_clip_of_fewer_images_than_a_preview_shows():
    stage = CLIPStage(**CLIP, merges_first=0)
    stage.prepare(Digits(first=3))
    assert len(stage.preview()) == 9 and stage.preview_columns == 3


# --- diffusion


def diffusion(tiny_parts: dict, **settings) -> DiffusionStage:
    torch.manual_seed(0)
    options = {"schedule": {"name": "cosine"}, "learning_rate": 1e-3, "defaults": TINY["defaults"], **settings}
    stage = DiffusionStage(**{"unet_config": TINY["unet_config"], **tiny_parts, **options})
    with torch.no_grad():
        for p in Trained(stage).parameters():
            p.add_(0.05 * torch.randn_like(p))  # what starts at zero would make every prediction zero
    return stage


@pytest.mark.parametrize(
    ("prediction", "options"),
    [
        *(("eps", {}), ("x0", {}), ("v", {}), ("v", {"error": "l1"}), ("eps", {"weight": {"name": "min_snr"}})),
        ("v", {"error": "l1", "weight": {"name": "min_snr", "gamma": 2.0}}),
    ],
)
def test_the_diffusion_loss_by_hand(tiny_parts, digits, prediction, options):
    """Rombach et al. 2022, eq. 3 (min-SNR: Hang et al. 2023), sampling the same random numbers again."""
    levels = {"name": "logit_normal", "mean": 0.5, "std": 0.8}
    stage = diffusion(tiny_parts, prediction=prediction, timesteps=levels, caption_dropout=0.5, **options)
    model, data = stage.latent_diffusion, stage.prepare(digits)
    batch = collate(data.__getitems__([3, 1, 40, 41]))
    torch.manual_seed(9)
    loss, metrics = stage.loss(batch)
    torch.manual_seed(9)
    z = model.scale_factor * (batch["mean"] + batch["std"] * torch.randn(4, 4, 8, 8))
    kept = torch.rand(4) >= 0.5
    cond = model.cond_stage_model([c if keep else "" for c, keep in zip(batch["caption"], kept, strict=True)])
    t = training_timesteps("logit_normal", 4, 1000, mean=0.5, std=0.8)
    noise = torch.randn(4, 4, 8, 8)
    ab = model.schedule.alphas_cumprod[t].float()[:, None, None, None]
    x_t = ab.sqrt() * z + (1 - ab).sqrt() * noise
    wanted = {"eps": noise, "x0": z, "v": ab.sqrt() * noise - (1 - ab).sqrt() * z}[prediction]
    difference = model.model.diffusion_model(x_t, t, cond["c_crossattn"], cond["c_adm"]) - wanted
    errors = difference.abs() if options.get("error") == "l1" else difference**2
    if "weight" in options:
        snr, gamma = ab / (1 - ab), options["weight"].get("gamma", 5.0)
        errors *= snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1)
    expected = errors.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert metrics["loss"].item() == pytest.approx(loss.item()) and 0 < kept.sum() < 4


def test_captions_are_dropped_at_their_share(tiny_parts, monkeypatch):
    stage, seen = diffusion(tiny_parts, caption_dropout=0.3), []
    monkeypatch.setattr(stage, "condition", lambda texts: seen.extend(texts) or {})
    monkeypatch.setattr(stage.latent_diffusion, "loss", lambda z, *_: z.mean((1, 2, 3)))
    captions = [f"caption {i}" for i in range(2000)]
    stage.loss({"mean": torch.zeros(2000, 1, 1, 1), "std": torch.ones(2000, 1, 1, 1), "caption": captions})
    assert all(said in ("", caption) for said, caption in zip(seen, captions, strict=True))
    assert seen.count("") / 2000 == pytest.approx(0.3, abs=0.041)  # 4 standard deviations of 0.0102


def test_cached_latents_equal_encoding_on_the_fly(tiny_parts, digits):
    stages = [diffusion(tiny_parts, cache_latents=cached) for cached in (True, False)]
    data = [stage.prepare(digits) for stage in stages]
    assert isinstance(data[0], LatentDataset) and data[1] is digits and len(data[0]) == len(digits)
    factors = [stage.latent_diffusion.scale_factor for stage in stages]
    assert factors[0] == pytest.approx(factors[1], rel=1e-6) and factors[0] != 1.0
    for epoch in (0, 1):
        losses, captions = [], []
        for stage, part in zip(stages, data, strict=True):
            part.set_epoch(epoch)
            batch = collate(part.__getitems__([7, 0, 63]))
            captions.append(batch["caption"])
            torch.manual_seed(5)
            losses.append(stage.loss(batch)[0])
        assert captions[0] == captions[1]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)  # encoded in batches of 64 and of 3
    digits.set_epoch(0)
    digits_without_caption = [{"caption": "from the sample"}]
    other = LatentDataset(digits_without_caption, torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
    assert other.__getitems__([0])[0]["caption"] == "from the sample"


def test_the_scale_factor_gives_unit_variance(tiny_parts, digits):
    stage = diffusion(tiny_parts)
    data = stage.prepare(digits)
    factor = stage.latent_diffusion.scale_factor
    # total variance = variance of the means + mean of the variances
    mean, std = data.mean, data.std
    assert factor**2 * (mean.var() + (std**2).mean()) == pytest.approx(1, rel=1e-5)
    images = torch.stack([digits[i]["image"] for i in range(len(digits))])
    z = stage.latent_diffusion.encode(images, torch.Generator().manual_seed(0))
    assert z.std() == pytest.approx(1, abs=0.03)  # 16,384 draws, neighbours alike
    assert stage.export()[0]["params"]["scale_factor"] == factor


def test_training_on_the_means_of_posteriors(tiny_parts, digits, capsys):
    stage = diffusion(tiny_parts, posterior="mean")
    batch = collate(stage.prepare(digits).__getitems__([7, 0]))
    factor = stage.latent_diffusion.scale_factor
    means = torch.stack([stage.prepare(digits).mean[i] for i in range(len(digits))])
    assert factor == pytest.approx(1 / means.std().item(), rel=1e-5)
    assert torch.equal(stage.data(batch)[0], factor * batch["mean"])
    assert "note" not in capsys.readouterr().err  # their noise is left out


def test_noise_of_posteriors_is_told_of(capsys):
    mean, std = torch.randn(9, 4, 8, 8), torch.full((9, 4, 8, 8), 0.5)
    variance = mean.var().item()
    factor, noise = latents_scale(mean, std)
    assert noise == pytest.approx(0.25 / (variance + 0.25), rel=1e-5)
    assert factor == pytest.approx((variance + 0.25) ** -0.5, rel=1e-5)
    assert latents_scale(mean, std, sampled=False) == (pytest.approx(variance**-0.5, rel=1e-5), 0)
    note_noise(0.1)
    assert capsys.readouterr().err == ""
    note_noise(noise)
    assert f"{noise:.0%} of the latents' variance" in capsys.readouterr().err


def test_the_networks_of_other_programs_can_be_used(tiny_model, tmp_path):
    """A first stage out of a model's file, and a text encoder as transformers saves it."""
    ldm.save(tiny_model, tmp_path / "model.safetensors", format="compvis")
    folder = str(clip_folder(tmp_path / "clip"))
    tower = load_text_encoder(folder)
    width = tower.state_dict()["transformer.text_model.final_layer_norm.weight"].numel()
    params = TINY["unet_config"]["params"] | {"context_dim": width}
    paths = {"first_stage": str(tmp_path / "model.safetensors"), "cond_stage": folder}
    stage = diffusion(paths, unet_config=TINY["unet_config"] | {"params": params}, pooled=False)
    for ours, theirs in (
        (stage.latent_diffusion.first_stage_model, tiny_model.first_stage_model),
        (stage.latent_diffusion.cond_stage_model, tower),
    ):
        found = ours.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in theirs.state_dict().items())


def test_images_that_change_cannot_be_cached(tiny_parts):
    bent = Digits(first=64)
    bent.augments = True
    refused("Digits crops or mirrors .* stage.params.cache_latents=false", diffusion(tiny_parts).prepare, bent)
    assert diffusion(tiny_parts, cache_latents=False).prepare(bent) is bent


@pytest.mark.smoke
def test_only_the_unet_trains_and_the_whole_is_exported(tiny_parts, digits, tiny_model, tmp_path):
    stage = diffusion(tiny_parts, preview_prompts=["4", "", "bold 7"])
    data = stage.prepare(digits)
    assert stage.networks.keys() == {"model"} and stage.frozen.keys() == {"first_stage", "cond_stage"}
    before = copy.deepcopy(stage.model.state_dict())
    (optimizer,) = stage.optimizers()
    stage.loss(collate(data.__getitems__([0, 1, 2, 3])))[0].backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in stage.model.state_dict().items())
    stage.train(False)
    config, state = stage.export()
    save_file(tmp_path / "model.safetensors", state, config)
    model = ldm.load(tmp_path / "model.safetensors", device="cpu")
    assert model.scale_factor == stage.latent_diffusion.scale_factor and model.prediction == "v"
    for frozen in ("first_stage_model", "cond_stage_model"):
        found = getattr(model, frozen).state_dict()
        for name, tensor in getattr(tiny_model, frozen).state_dict().items():
            assert torch.equal(found[name], tensor)
    drawn, previews = model.generate(["4", "", "bold 7"], batch_size=64), stage.preview()
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in previews]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "w"}, "unknown prediction 'w'"),
        ({"schedule": {"name": "cosin"}}, "noise schedule 'cosin'"),
        ({"schedule": {"nam": "cosine"}}, "^schedule: .*'nam'.*; it takes .'name', 'T', 'start', 'end', 'zero"),
        ({"schedule": "cosine"}, "^schedule: 'cosine' is not a mapping"),
        ({"defaults": {**TINY["defaults"], "sampler": "dimm"}}, "unknown sampler 'dimm'"),
        ({"defaults": {**TINY["defaults"], "height": 30}}, "height 30 "),
    ],
)
def test_mistakes_show_before_training(tiny_parts, settings, message):
    refused(message, diffusion, tiny_parts, **settings)
