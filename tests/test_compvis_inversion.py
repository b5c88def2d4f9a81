"""Textual inversion's own code (Gal et al. 2022): its words, its data set, and training by CompVis's model."""

import importlib
import random

import numpy as np
import pytest
import torch
from compvis_models import a_batch, built, config
from conftest import refused
from ldm.data.personalized import PersonalizedBase, per_img_token_list
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder
from PIL import Image

from ldm.finetune.embedding_files import read_words
from ldm.finetune.textual_inversion import FRAMES
from ldm.util import instantiate_from_config

PROMPT = "a photograph of * x *"


@pytest.fixture(scope="module")
def encoder(clip) -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(str(clip))


def by_hand(encoder, ids: list[list[int]], words: dict[int, torch.Tensor]) -> torch.Tensor:
    """What the text encoder gives for rows of tokens where some have vectors other than its own: (b, 77, d)."""
    tower = encoder.transformer
    embedding, positions = (tower.text_model.embeddings[f"{name}_embedding"].weight for name in ("token", "position"))
    rows = []
    for row in ids:
        row = [encoder.tokenizer.bos_token_id, *row, *[encoder.tokenizer.eos_token_id] * 77]
        rows.append(torch.cat([words.get(i, embedding[i][None]) for i in row])[:77])
    x = torch.stack(rows) + positions
    for block in tower.blocks():
        x = block(x)
    return tower.final_norm(x)


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_words_take_the_place_of_their_token(encoder, count):
    manager = EmbeddingManager(encoder, ["*"], ["dog"], num_vectors_per_token=count).eval()
    (star,), (dog,) = encoder.word_ids("*"), encoder.word_ids("dog")
    weight = encoder.token_embedding.weight
    assert manager.string_to_token_dict["*"] == star
    start = weight[dog] + encoder.transformer.text_model.embeddings.position_embedding.weight[0]
    assert torch.equal(manager.string_to_param_dict["*"], start.repeat(count, 1))
    plain = encoder.encode([PROMPT, "a"])
    manager.string_to_param_dict["*"] += torch.arange(count)[:, None]
    vectors = manager.string_to_param_dict["*"]
    found = encoder.encode([PROMPT, "a"], embedding_manager=manager)
    expected = by_hand(encoder, [encoder.word_ids(PROMPT), encoder.word_ids("a")], {star: vectors})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.encode([PROMPT, "a"]), plain)  # nothing of the manager stays
    assert torch.equal(found[1], plain[1]) and not torch.allclose(found[0], plain[0], atol=1e-3)
    assert torch.allclose(manager.get_embedding_norms_squared(), vectors.square().sum(1))
    step = torch.arange(count).float() * weight.shape[1] ** 0.5
    assert torch.allclose(manager.embedding_to_coarse_loss(), step[:, None] * step, atol=1e-4)


def test_progressive_words_grow(encoder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("ldm.modules.embedding_manager"), "PROGRESSIVE_SCALE", 2)
    manager = EmbeddingManager(encoder, ["*"], num_vectors_per_token=3, progressive_words=True)
    (star,) = encoder.word_ids("*")
    tokens, zero = torch.tensor([[star, 0, 0, 0]]), torch.zeros(1, 4, 16)
    lengths = [int((manager(tokens, zero) != 0).any(2).sum()) for _ in range(7)]
    assert lengths == [1, 2, 2, 3, 3, 3, 3]
    assert int((manager.eval()(tokens, zero) != 0).any(2).sum()) == 3 and manager.progressive_counter == 7


def test_words_of_images_and_bad_words(encoder):
    manager = EmbeddingManager(encoder, ["*"], per_image_tokens=False)
    assert list(manager.string_to_param_dict) == ["*"] and list(manager.initial_embeddings) == []
    assert len(per_img_token_list) == 22 and len(set(per_img_token_list)) == 22
    refused("'a red dog' cannot be a placeholder: it is 3 tokens", EmbeddingManager, encoder, ["a red dog"])


@torch.no_grad()
def test_its_files(encoder, tmp_path):
    manager = EmbeddingManager(encoder, ["*", "x"], ["dog", "cat"], num_vectors_per_token=2)
    manager.string_to_param_dict["x"] += 1
    manager.save(tmp_path / "embeddings.pt")
    words = {one.word: one.vectors for one in read_words(tmp_path / "embeddings.pt")}
    assert torch.equal(words["x"], manager.string_to_param_dict["x"]) and words.keys() == {"embeddings", "x"}
    other = EmbeddingManager(encoder, ["dog"])
    other.load(tmp_path / "embeddings.pt")
    assert list(other.string_to_param_dict) == ["*", "x"] and other.string_to_token_dict == manager.string_to_token_dict
    prompts = [PROMPT, "dog"]
    assert torch.equal(
        encoder.encode(prompts, embedding_manager=other), encoder.encode(prompts, embedding_manager=manager)
    )
    file = torch.load(tmp_path / "embeddings.pt", weights_only=False)  # as its own code reads it
    assert (
        isinstance(file["string_to_param"], torch.nn.ParameterDict)
        and int(file["string_to_token"]["x"]) == encoder.word_ids("x")[0]
    )


@torch.no_grad()
def test_bert_s_words(tmp_path, monkeypatch):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "*"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    monkeypatch.setattr("ldm.compvis.encoders._cached", lambda *names: str(tmp_path))
    encoder = BERTEmbedder(16, 1, vocab_size=8, max_seq_len=6).eval()
    assert encoder.word_ids("a dog") == [5, 6]
    manager = EmbeddingManager(encoder, ["*"], ["dog"])
    found = encoder.encode(["a *", "a *", "a dog"], embedding_manager=manager)
    torch.testing.assert_close(found[0], encoder.encode(["a dog"])[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# in CompVis's model


def test_training_and_drawing(clip, tmp_path):
    words = {"placeholder_strings": ["*"], "initializer_words": ["dog"], "num_vectors_per_token": 2}
    personal = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": words}
    settings = {"unfreeze_model": False, "model_lr": 0.0, "embedding_reg_weight": 0.5, "cond_stage_trainable": True}
    model = built(config(clip, personalization_config=personal, **settings)).train()
    manager = model.embedding_manager
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "embedding_manager.string_to_param_dict.*"
    ]
    batch = a_batch() | {"txt": ["a photograph of *", "x"]}
    model.learning_rate = 0.1
    (optimizer,) = [model.configure_optimizers()]
    assert [p for group in optimizer.param_groups for p in group["params"]] == [manager.string_to_param_dict["*"]]
    torch.manual_seed(0)
    model.training_step(batch).backward()
    assert manager.string_to_param_dict["*"].grad.abs().sum(1).min() > 0
    moved = manager.string_to_param_dict["*"] - manager.initial_embeddings["*"]
    assert model.logged["train/loss_emb_reg"].item() == pytest.approx((moved @ moved.T).mean().item(), rel=1e-5)
    total = model.logged["train/loss_simple"] + 0.5 * model.logged["train/loss_emb_reg"]
    assert model.logged["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)
    before = model.get_learned_conditioning(["a *"])
    expected = model.cond_stage_model.encode(["a *"], embedding_manager=manager)
    assert torch.equal(before, expected)
    optimizer.step()
    manager.save(tmp_path / "embeddings.pt")
    fresh = built(config(clip, personalization_config=personal, **settings))
    fresh.embedding_manager.load(tmp_path / "embeddings.pt")
    after = fresh.get_learned_conditioning(["a *"])
    torch.testing.assert_close(after, model.get_learned_conditioning(["a *"]))
    assert (after - before).abs().max() > 1e-2
    refused("unfreeze_model are not supported", built, config(clip, unfreeze_model=True))


def test_words_start_from_the_weights_of_the_checkpoint(clip, tmp_path):
    """The initializer's vector is read after the checkpoint is loaded; another file replaces the words."""
    model = built(config(clip), seed=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    words = {"placeholder_strings": ["*"], "initializer_words": ["dog"], "num_vectors_per_token": 1}
    personal = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": words}
    settings = {"personalization_config": personal, "ckpt_path": str(tmp_path / "model.ckpt")}
    words["embedding_manager_ckpt"] = ""  # as textual inversion's own program writes
    started = instantiate_from_config(config(clip, **settings))
    (dog,) = started.cond_stage_model.word_ids("dog")
    expected = model.cond_stage_model.transformer.text_model.embeddings(torch.tensor([[dog]]))[0, 0]
    assert torch.equal(started.embedding_manager.string_to_param_dict["*"][0], expected)
    learned = EmbeddingManager(model.cond_stage_model, ["x"])
    learned.save(tmp_path / "words.pt")
    words["embedding_manager_ckpt"] = str(tmp_path / "words.pt")
    resumed = instantiate_from_config(config(clip, **settings)).embedding_manager
    assert torch.equal(resumed.string_to_param_dict["x"], learned.string_to_param_dict["x"])
    assert list(resumed.string_to_param_dict) == ["x"] and resumed.string_to_param_dict["x"].requires_grad


def test_no_setting_of_words_is_ignored(encoder):
    refused("'nonsense'", EmbeddingManager, encoder, ["*"], nonsense=1, error=TypeError)
    refused("shuffle_mode 'all' is not supported", EmbeddingManager, encoder, ["*"], shuffle_mode="all")
    EmbeddingManager(encoder, ["*"], shuffle_mode="off")


# its data set


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images, 6 wide and 4 high, left half one level and right half another; and a note."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        levels = np.full((4, 6, 3), 10 * i, dtype=np.uint8)
        levels[:, 3:] = 200
        Image.fromarray(levels).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_personalized_images(images):
    data = instantiate_from_config(
        {"target": "ldm.data.personalized.PersonalizedBase", "params": {"data_root": str(images), "flip_p": 0.0}}
    )
    assert len(data) == 300 and data[4]["image"].shape == (4, 6, 3) and data[4]["image"].dtype == np.float32
    assert data[4]["image"][0, 0].tolist() == pytest.approx([10 / 127.5 - 1] * 3)
    assert data[4]["image"][0, 5].tolist() == pytest.approx([200 / 127.5 - 1] * 3)
    assert {data[i]["caption"] for i in range(300)} == {frame.format("*") for frame in FRAMES["object"]}
    mirrored = PersonalizedBase(images, flip_p=1.0, set="val")
    assert len(mirrored) == 3 and mirrored[0]["image"][0, 0, 0] == pytest.approx(200 / 127.5 - 1)
    squeezed = PersonalizedBase(images, size=8, flip_p=0.0)[0]["image"]
    cut = PersonalizedBase(images, size=8, flip_p=0.0, center_crop=True)[0]["image"]
    assert squeezed.shape == cut.shape == (8, 8, 3)
    assert squeezed[0, 0, 0] == cut[0, 0, 0] == -1 and cut[0, 2, 0] == -1
    with pytest.raises(IndexError):
        mirrored[3]


def test_personalized_captions(images):
    from ldm.data.personalized_style import PersonalizedBase as Style

    random.seed(0)
    data = PersonalizedBase(images, per_image_tokens=True, mixing_prob=0.5, coarse_class_text="cat")
    captions = [data[1]["caption"] for _ in range(400)]
    named = [caption for caption in captions if per_img_token_list[1] in caption]
    assert all("cat *" in caption for caption in captions) and 160 < len(named) < 240
    assert "style" in Style(images)[0]["caption"] and issubclass(Style, PersonalizedBase)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_root": "no/such/folder"}, "data_root 'no/such/folder' is not a folder with images"),
        ({"interpolation": "linaer"}, "unknown interpolation 'linaer'"),
    ],
)
def test_personalized_refusals(images, settings, message):
    refused(message, PersonalizedBase, **{"data_root": str(images)} | settings)
