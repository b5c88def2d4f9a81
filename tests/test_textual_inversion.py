"""Textual inversion: what trains, what does not, and what comes of it, on a tiny model and on the one that ships."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from script_runs import load_script, pixels
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate as collate

import ldm
from ldm.conditioning.tokenizer import Tokenizer
from ldm.conditioning.words import token_embedding
from ldm.data.captions import TRAIN_FRAMES
from ldm.data.folder import Folder
from ldm.diffusion.schedule import q_sample
from ldm.evaluation.networks import Measuring, features_of
from ldm.evaluation.reference import load_reference
from ldm.evaluation.samples import from_pil
from ldm.finetune import flags
from ldm.finetune.embedding_files import read_words
from ldm.finetune.embeddings import apply_embedding
from ldm.finetune.textual_inversion import FRAMES, TextualInversionStage, captions
from ldm.input_files import load_yaml
from ldm.labels import GAP, LINE
from ldm.training.stage import Trained

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent
script = load_script("textual_inversion")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Three images, one of them not square, and files that are not images."""
    folder = tmp_path_factory.mktemp("subject")
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 40), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image[:, : 32 if i else 40]).save(folder / f"{i}.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.pdf").write_bytes(b"x")
    return folder


def stage_of(checkpoint, **settings) -> TextualInversionStage:
    options = {"word": "<sks>", "initial": "five", "resolution": 32, "ckpt": str(checkpoint), "previews": 2}
    options["learning_rate"] = 1e-3
    return TextualInversionStage(**options | settings)


# --- the stage


def test_only_the_vectors_train(tiny_checkpoint, tiny_model, subject):
    stage = stage_of(tiny_checkpoint, vectors=3)
    dataset = stage.prepare(Folder(subject, 32, 1, caption=""))
    assert [p.shape for p in Trained(stage).parameters()] == [(3, 32)] and list(Trained(stage).state_dict()) == [
        "word.0"
    ]
    batch = collate(dataset.__getitems__([0, 4, 299, 5]))
    torch.manual_seed(0)
    loss, metrics = stage.loss(batch)
    loss.backward()
    assert (stage.vectors.grad.abs().sum(1) > 0).all() and metrics.keys() == {"loss", "moved"}
    assert not any(p.requires_grad or p.grad is not None for p in stage.latent_diffusion.parameters())
    before = stage.vectors.detach().clone()
    (optimizer,) = stage.optimizers()
    optimizer.step()
    moved = (stage.vectors.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)  # Adam's first
    state = stage.latent_diffusion.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_model.state_dict().items())
    config, exported = stage.export()
    assert config is None and exported.keys() == {"<sks>"} and torch.equal(exported["<sks>"], stage.vectors)


def test_the_loss_is_the_models_own(tiny_checkpoint, subject):
    stage = stage_of(tiny_checkpoint, pull=0.5, frames=["a {}"])
    dataset = stage.prepare(Folder(subject, 32, 1, caption=""))
    assert len(dataset) == 300
    batch = collate(dataset.__getitems__([1, 3]))
    model = stage.latent_diffusion
    torch.manual_seed(3)
    loss, metrics = stage.loss(batch)
    torch.manual_seed(3)
    images = torch.stack([Folder(subject, 32, 1, caption="")[i]["image"] for i in (1, 0)])
    posterior = model.first_stage_model.encode(images)
    z = model.scale_factor * (posterior.mean + posterior.std * torch.randn_like(posterior.mean))
    t = torch.randint(0, model.schedule.T, (2,))
    torch.randint(1, (2,))
    noise = torch.randn_like(z)
    cond = model.cond_stage_model(["a <sks>"] * 2)
    predicted = model.apply_model(q_sample(z, t, noise, model.schedule), t, cond)
    ab = model.schedule.alphas_cumprod[t][:, None, None, None].float()
    expected = (predicted - (ab.sqrt() * noise - (1 - ab).sqrt() * z)).square().mean()
    torch.testing.assert_close(metrics["loss"], expected, rtol=1e-4, atol=1e-5)  # float32, other order of sums
    torch.testing.assert_close(loss, metrics["loss"])  # nothing to pull yet
    with torch.no_grad():
        stage.vectors += 2 * stage.deviation
    torch.manual_seed(3)
    loss, metrics = stage.loss(batch)
    torch.testing.assert_close(loss - metrics["loss"], torch.tensor(0.5 * 4.0), rtol=1e-4, atol=0)
    assert metrics["moved"].item() == pytest.approx(2, rel=1e-4)


def test_captions_suit_the_model():
    full = Tokenizer()
    assert captions(full, "<a>", 1) == [frame.replace("{}", "<a>") for frame in FRAMES["object"]]
    assert "art by <a>" in captions(full, "<a>", 1, "style")
    digits = ldm.load(device="cpu").cond_stage_model.tokenizer
    found = captions(digits, "<a>", 1)
    assert len(found) == len(TRAIN_FRAMES) and "the number <a>" in found and "a photo of the digit <a>" in found
    assert all(len(digits.encode(text)) + 15 - len(digits.encode("<a>")) <= 22 for text in captions(digits, "<a>", 15))
    assert captions(digits, "<a>", 1, ["{}, {}"]) == ["<a>, <a>"]
    for vectors, frames, sentence in (
        (1, ["a thing"], "'a thing' has no {}"),
        (1, [], "'' has no {}"),
        (22, None, "22 vectors leave room for 0 tokens"),
    ):
        refused(sentence, captions, digits, "<a>", vectors, frames)


def test_models_and_words_that_are_refused(tiny_checkpoint):
    refused("initial words", stage_of, tiny_checkpoint, initial="")
    refused("cannot be a new word", stage_of, tiny_checkpoint, word="my word")
    refused("a word that the text encoder has already", stage_of, tiny_checkpoint, word="a")
    refused("height 33 cannot be made", stage_of, tiny_checkpoint, resolution=33)


# --- the script


def run(checkpoint, subject, folder, *options: object) -> None:
    fixed = ["--ckpt", checkpoint, "--device", "cpu", "--train_data_dir", subject, "--output_dir", folder]
    fixed += ["--placeholder_token", "<sks>", "--initializer_token", "five", "--report_to", "none"]
    small = ["--max_train_steps", 6, "--train_batch_size", 2, "--num_validation_images", 2, "--num_vectors", 2]
    script.main([str(option) for option in [*fixed, *small, *options]])


def test_a_run_writes_the_word_and_nothing_else_changes(tiny_checkpoint, subject, tmp_path, capsys):
    before = tiny_checkpoint.read_bytes()
    all_formats = ("diffusers", "a1111", "compvis")
    objective = ("--error", "l1", "--snr_gamma", 5, "--offset_noise")
    run(tiny_checkpoint, subject, tmp_path / "out", "--report_to", "tensorboard", *objective, "--format", *all_formats)
    stage = load_yaml(tmp_path / "out" / "config.yaml").stage.params
    assert (stage.error, stage.weight.gamma, stage.noise.offset) == ("l1", 5, 0.1)
    assert tiny_checkpoint.read_bytes() == before
    words = [read_words(tmp_path / "out" / name) for name in ("learned_embeds.safetensors", "sks.pt", "embeddings.pt")]
    assert [(found[0].word, found[0].inside) for found in words] == [
        ("<sks>", None),
        ("sks", "<sks>"),
        ("embeddings", "<sks>"),
    ]
    assert all(torch.equal(found[0].vectors, words[0][0].vectors) for found in words)
    assert words[0][0].vectors.shape == (2, 32) and words[1][0].step == 6
    printed = capsys.readouterr()
    assert "skipped .DS_Store, notes.pdf" in printed.err and "own captions" not in printed.err
    assert "sks.pt (2 vectors), which is sks by the file's name" in printed.out
    assert re.search(r"--ckpt \S*tiny.safetensors --embedding \S*learned_embeds.safetensors --prompt 'a ", printed.out)
    height = pixels(tmp_path / "out" / "previews" / "000006.png").shape[0]
    assert height == 2 * (64 + LINE + GAP) + GAP  # the subject's and the word's, under labels
    written = {re.sub(r"tfevents.*", "tfevents", path.name) for path in (tmp_path / "out").iterdir()}
    assert written == {"learned_embeds.safetensors", "sks.pt", "embeddings.pt", "contact_sheet.png", "previews"} | {
        *("metrics.jsonl", "events.out.tfevents", "config.yaml", "model.safetensors", "resume.pt")
    }
    page = (ROOT / "docs/how-to/textual_inversion.md").read_text()
    assert all(f"`{name}" in page for name in written - {"sks.pt"}) and "`WORD.pt`" in page
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))
    model = ldm.load(tiny_checkpoint, device="cpu")
    apply_embedding(model, tmp_path / "out" / "learned_embeds.safetensors")
    assert torch.equal(token_embedding(model.cond_stage_model).vectors[0], words[0][0].vectors)


def test_captions_beside_the_images_are_not_ignored_in_silence(tiny_checkpoint, subject, tmp_path, capsys):
    folder = shutil.copytree(subject, tmp_path / "captioned")
    (folder / "0.txt").write_text("a dog")
    run(tiny_checkpoint, folder, tmp_path / "out", "--max_train_steps", 1)
    assert "the images' own captions are not used" in capsys.readouterr().err


def test_the_page_has_a_prompt_that_was_trained_on():
    """The one that the script prints, for the model that ships."""
    tokenizer = ldm.load(device="cpu").cond_stage_model.tokenizer
    vectors = load_yaml(ROOT / "configs" / "finetune" / "textual_inversion.yaml").stage.params.vectors
    (prompt, *_) = captions(tokenizer, "<mine>", vectors)
    assert f'--prompt "{prompt}"' in (ROOT / "docs/how-to/textual_inversion.md").read_text()
    assert f'--prompt "{prompt}"' in script.__doc__


@pytest.mark.smoke
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tiny_checkpoint, subject, tmp_path, monkeypatch):
    run(tiny_checkpoint, subject, tmp_path / "whole")
    loss, calls = TextualInversionStage.loss, []

    def killed(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return loss(self, batch)

    monkeypatch.setattr(TextualInversionStage, "loss", killed)
    with pytest.raises(MemoryError):
        run(tiny_checkpoint, subject, tmp_path / "parts", "--checkpointing_steps", 3)
    assert not (tmp_path / "parts" / "learned_embeds.safetensors").exists()
    monkeypatch.undo()
    run(tiny_checkpoint, subject, tmp_path / "moved", "--resume_from_checkpoint", tmp_path / "parts")
    for name in ("learned_embeds.safetensors", "previews/000006.png"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    refused("already holds a run", run, tiny_checkpoint, subject, tmp_path / "whole")
    run(tiny_checkpoint, subject, tmp_path / "whole", "--resume", "--format", "a1111")  # finished: only written anew
    assert (tmp_path / "whole" / "sks.pt").is_file()


@pytest.mark.parametrize("size", ["", "_large"])
def test_train_gives_what_the_script_gives(tiny_checkpoint, subject, tmp_path, monkeypatch, size):
    """The same vectors from the yaml and `key=value`, by whichever file suits the model's size."""
    monkeypatch.setattr(flags, "SMALL", 0 if size else flags.SMALL)
    run(tiny_checkpoint, subject, tmp_path / "script", "--mixed_precision", "fp32")
    params = {"word": "<sks>", "initial": "five", "ckpt": tiny_checkpoint, "vectors": 2, "previews": 2}
    settings = {f"stage.params.{name}": value for name, value in params.items()}
    settings |= {"data.params.root": subject, "name": "train", "outdir": tmp_path, "loop.precision": "fp32"}
    settings |= {"loop.steps": 6, "loop.batch_size": 2, "loop.report_to": "none"}
    yaml = ROOT / "configs" / "finetune" / f"textual_inversion{size}.yaml"
    load_script("train").main([str(yaml), *(f"{key}={value}" for key, value in settings.items()), "--device=cpu"])
    (ours,) = read_words(tmp_path / "train" / "model.safetensors")
    (theirs,) = read_words(tmp_path / "script" / "learned_embeds.safetensors")
    assert ours.word == theirs.word == "<sks>" and torch.equal(ours.vectors, theirs.vectors)
    with pytest.raises(ValueError, match="textual_inversion.* needs stage.params.initial=..., stage.params.word=..."):
        load_script("train").main([str(yaml)])


def test_what_is_wrong_is_said_before_training(tiny_checkpoint, subject, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused("holds no images", run, tiny_checkpoint, tmp_path / "empty", tmp_path / "out", error=FileNotFoundError)
    (tmp_path / "frames.txt").write_text("a {}\na thing\n")
    with pytest.raises(ValueError, match="'a thing' has no {}"):
        run(tiny_checkpoint, subject, tmp_path / "out", "--templates", tmp_path / "frames.txt")
    refused("keep them apart", run, tiny_checkpoint, subject, subject / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    refused("a.png is not an image", run, tiny_checkpoint, tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Image.new("L", (32, 32)).save(tmp_path / "bad" / "a.png")
    stage_of(tiny_checkpoint).prepare(Folder(tmp_path / "bad", 32, 1, caption=""))
    assert "bad holds a single image" in capsys.readouterr().err


# --- the model that ships


def unusual_sevens(networks: Measuring) -> tuple[Tensor, Tensor]:
    """Five sevens of a hand, and ten more: uint8 (n, 28, 28), of MNIST's first 1,000 test images.

    They are the seven and its 14 nearest neighbours in features that are least like all other sevens, by the ratio of
    mean cosines to these and among themselves. They are crossed, as about a quarter of all sevens.
    """
    reference = load_reference()
    sevens = reference.images[reference.image_labels == 7]
    unit = F.normalize(features_of(networks.features, sevens))
    cosines = unit @ unit.T
    groups = cosines.topk(15, dim=1).indices
    within = torch.stack([(cosines[group][:, group].sum() - 15) / (15 * 14) for group in groups])
    outside = torch.stack([(cosines[group].sum() - cosines[group][:, group].sum()) / (15 * 84) for group in groups])
    group = groups[(outside / within).argmin()]
    return sevens[group[::3]], sevens[torch.cat([group[1::3], group[2::3]])]


@pytest.mark.full
def test_the_shipped_model_learns_a_hand(tmp_path):
    """From the word for another digit, a hundred steps lower the loss on noise that was not trained on, and bring what
    is generated to images that were not trained on."""
    networks = Measuring.load()
    shown, held_out = unusual_sevens(networks)
    for i, image in enumerate(F.pad(shown, (2,) * 4).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    goal = F.normalize(features_of(networks.features, held_out))
    real = (F.normalize(features_of(networks.features, shown)) @ goal.T).mean().item()
    timesteps = {"name": "logit_normal", "mean": 1.0}
    stage = TextualInversionStage("<it>", "one", 32, 0.8, vectors=16, timesteps=timesteps)
    dataset = stage.prepare(Folder(tmp_path, 32, 1, caption=""))
    before = {name: tensor.clone() for name, tensor in stage.latent_diffusion.state_dict().items()}

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        """(loss, similarity to held-out images over that of the five)."""
        torch.manual_seed(1)
        losses = [stage.loss(collate(dataset.__getitems__(list(range(50)))))[1]["loss"].item() for _ in range(4)]
        generated = stage.latent_diffusion.generate(["a handwritten digit <it>"] * 24, steps=10, batch_size=24)
        cosines = F.normalize(features_of(networks.features, from_pil(generated))) @ goal.T
        return sum(losses) / 4, cosines.mean().item() / real

    loss, similarity = measured()
    (optimizer,) = stage.optimizers()
    for step in range(100):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        stage.loss(collate(dataset.__getitems__(torch.randint(500, (8,)).tolist())))[0].backward()
        optimizer.param_groups[0]["lr"] = 0.8 * (1 - step / 100)
        optimizer.step()
    loss_after, similarity_after = measured()
    # Measured: 0.459 -> 0.269, -0.10 -> 0.667. Of 48 images of 20 steps each, with three seeds: 0.459 -> 0.268 to
    # 0.269, -0.12 -> 0.686 to 0.688; of plain "seven" it is 0.66.
    assert loss_after < 0.65 * loss
    assert similarity < 0.1 and similarity_after > 0.55
    state = stage.latent_diffusion.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
