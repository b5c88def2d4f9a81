"""CompVis's encoders: the numbers of transformers, open_clip and the goldens, by CompVis's calls."""

import copy
import json
import socket

import pytest
import torch
from compvis_models import LAYERS, VOCABULARY
from conftest import refused
from golden_fill import fill, load_golden, published_shapes, shapes
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.compvis.encoders import (
    BERTEmbedder,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    SpatialRescaler,
    TransformerEmbedder,
)
from ldm.conditioning import public_clip
from ldm.conditioning.tokenizer import Tokenizer

PROMPTS = ["a photograph of a cat", "", "Dogs, x " * 40]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, features of order 1
PADDED = {"truncation": True, "max_length": 77, "padding": "max_length", "return_tensors": "pt"}


@pytest.fixture(scope="module")
def encoder(clip) -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(version=str(clip))


@pytest.fixture(scope="module")
def theirs(clip) -> tuple[nn.Module, object]:
    """transformers' own model and tokenizer of the same folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = CLIPTextConfig(**json.loads((clip / "config.json").read_text()), eos_token_id=VOCABULARY - 1)
    model = CLIPTextModel(config).eval()
    strip = "" if hasattr(model, "text_model") else "text_model."  # since 5.6
    state = {name.removeprefix(strip): tensor for name, tensor in load_file(clip / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model, CLIPTokenizer.from_pretrained(str(clip), local_files_only=True)


def hidden(model: nn.Module, tokens: torch.Tensor):
    return getattr(model, "text_model", model)(input_ids=tokens, output_hidden_states=True)


# CLIP


@pytest.mark.parametrize(
    "settings",
    [
        PADDED,
        PADDED | {"return_length": True, "return_overflowing_tokens": False},
        {"truncation": False, "add_special_tokens": False},
        {"padding": True, "return_tensors": "pt"},
        {"truncation": True, "max_length": 9},
    ],
)
def test_the_tokenizer_is_called_as_transformers_is(encoder, theirs, settings):
    for text in (PROMPTS, PROMPTS[0]):
        ours, expected = encoder.tokenizer(text, **settings), theirs[1](text, **settings)
        for key in ("input_ids", "attention_mask"):
            assert type(ours[key]) is type(expected[key])
            as_lists = [x.tolist() if isinstance(x, torch.Tensor) else x for x in (ours[key], expected[key])]
            assert as_lists[0] == as_lists[1]
        assert ours["input_ids"] is ours.input_ids


def test_the_tokenizer_s_marks(encoder, theirs):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(encoder.tokenizer, name) == getattr(theirs[1], name)
    assert encoder.tokenizer.model_max_length == 77  # transformers 5.23 does not read it back from a folder, others do
    assert len(encoder.tokenizer) == VOCABULARY and "cat</w>" in encoder.tokenizer.get_vocab()


@torch.no_grad()
def test_the_transformer_is_called_as_transformers_is(encoder, theirs):
    tokens = encoder.tokenizer(PROMPTS, **PADDED)["input_ids"]
    expected = hidden(theirs[0], tokens)
    ours = encoder.transformer(input_ids=tokens, output_hidden_states=True)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, **CLOSE)
    assert len(ours.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for mine, other in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    assert ours[0] is ours.last_hidden_state and ours["pooler_output"] is ours.pooler_output
    assert encoder.transformer(input_ids=tokens).hidden_states is None
    normed = encoder.transformer.text_model.final_layer_norm(ours.hidden_states[-1])
    assert torch.equal(normed, ours.last_hidden_state)
    embeddings = encoder.transformer.text_model.embeddings
    assert torch.equal(embeddings(input_ids=tokens), ours.hidden_states[0])
    reversed_ids = embeddings.position_ids.flip(1)
    moved = embeddings.token_embedding(tokens) + embeddings.position_embedding(reversed_ids)
    assert torch.equal(embeddings(tokens, position_ids=reversed_ids), moved)


@torch.no_grad()
def test_layers(clip, encoder, theirs):
    tokens = theirs[1](PROMPTS, **PADDED)["input_ids"]
    expected = hidden(theirs[0], tokens)
    torch.testing.assert_close(encoder(PROMPTS), expected.last_hidden_state, **CLOSE)
    assert torch.equal(encoder.encode(PROMPTS), encoder(PROMPTS)) and torch.equal(encoder("x"), encoder(["x"]))
    before = FrozenCLIPEmbedder(str(clip), layer="hidden", layer_idx=-2)
    torch.testing.assert_close(before(PROMPTS), expected.hidden_states[-2], **CLOSE)
    pooled = FrozenCLIPEmbedder(str(clip), layer="pooled")
    torch.testing.assert_close(pooled(PROMPTS), expected.pooler_output[:, None], **CLOSE)
    short = FrozenCLIPEmbedder(str(clip), max_length=20)
    assert short(PROMPTS).shape == (3, 20, 16)
    for wrong in ({"layer": "first"}, {"layer": "hidden"}, {"layer_idx": 3}):
        refused("use last, pooled, or hidden", FrozenCLIPEmbedder, str(clip), **wrong)


def test_frozen_where_it_is(clip, encoder):
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    free = FrozenCLIPEmbedder(str(clip), freeze=False)
    assert all(p.requires_grad for p in free.parameters())
    free.device = "cuda"  # of no effect
    assert free.device == torch.device("cpu") and free.to("meta").device == torch.device("meta")
    assert free.half().transformer.text_model.embeddings.position_ids.dtype == torch.int64


def test_the_token_embedding_can_be_wrapped(encoder):
    """As web interfaces put textual inversion's vectors in."""

    class Wrapped(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, tokens):
            return self.wrapped(tokens) * 2

    encoder = copy.deepcopy(encoder)
    embeddings = encoder.transformer.text_model.embeddings
    tokens = encoder.tokenizer(PROMPTS, **PADDED)["input_ids"]
    before = embeddings(tokens)
    plain, twice = embeddings.token_embedding(tokens), encoder(PROMPTS)
    embeddings.token_embedding = Wrapped(embeddings.token_embedding)
    torch.testing.assert_close(embeddings(tokens), before + plain)
    assert not torch.equal(encoder(PROMPTS), twice)


def test_without_weights_nothing_is_asked_of_the_internet(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the internet"))
    with torch.device("meta"), pytest.warns(UserWarning, match="no weights of 'openai/clip-vit-large-patch14'"):
        encoder = FrozenCLIPEmbedder()
    assert shapes(encoder) == published_shapes("sd-v1", "cond_stage_model.")
    assert len(encoder.tokenizer) == 49408 and encoder.tokenizer.pad_token_id == 49407
    ids = encoder.tokenizer(["a cat"], **PADDED)["input_ids"]
    assert torch.equal(ids, Tokenizer()(["a cat"]))


def test_weights_in_the_cache_are_loaded(clip, encoder, monkeypatch, recwarn):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(clip / file))
    cached = FrozenCLIPEmbedder("some/clip")
    assert torch.equal(cached(PROMPTS), encoder(PROMPTS)) and not recwarn.list


def test_a_name_that_is_nothing(monkeypatch):
    for name in ("some/clip", "/no/such/folder"):
        refused("is unknown", FrozenCLIPEmbedder, name)


@torch.no_grad()
def test_transformers_calls(encoder, theirs):
    """Masks, positions, tuples, the text model on its own, and transformers' settings."""
    tokens = theirs[1](PROMPTS[:2], padding=True, return_tensors="pt")
    ours, their = encoder.transformer, getattr(theirs[0], "text_model", theirs[0])
    for settings in (
        dict(tokens),
        {"input_ids": tokens["input_ids"], "position_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2]])},
    ):
        settings["position_ids"] = settings.get("position_ids", torch.arange(99)[None])[
            :, : tokens["input_ids"].shape[1]
        ]
        expected = their(**settings)
        for found in (ours(**settings), ours.text_model(**settings)):
            for name in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(found[name], expected[name], **CLOSE)
        last, pooled, states = ours(**settings, return_dict=False, output_hidden_states=True)
        assert torch.equal(last, found[0]) and torch.equal(pooled, found[1]) and len(states) == LAYERS + 1
    refused("output_attentions is not supported", ours, tokens["input_ids"], output_attentions=True)
    known = theirs[0].config
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "hidden_act", "eos_token_id"):
        assert getattr(ours.config, name) == getattr(known, name)
    assert ours.device.type == "cpu" and ours.dtype == torch.float32


@torch.no_grad()
def test_words_added_as_with_transformers(clip, theirs):
    encoder = FrozenCLIPEmbedder(str(clip))
    ids = encoder.tokenizer(PROMPTS[0]).input_ids
    for skip in (False, True):
        own, their = (t.decode(ids, skip_special_tokens=skip).strip() for t in (encoder.tokenizer, theirs[1]))
        assert own == their
    vocabulary = encoder.tokenizer.encoder
    assert vocabulary == theirs[1].get_vocab() and encoder.tokenizer.decoder[ids[1]] == "a</w>"
    before = encoder(["a red dog"])
    assert encoder.tokenizer.add_tokens(["<sks>"]) == 1
    old = encoder.transformer.get_input_embeddings()
    new = encoder.transformer.resize_token_embeddings(len(encoder.tokenizer))
    assert new is encoder.token_embedding and new.weight.shape == (VOCABULARY + 1, 16)
    assert torch.equal(new.weight[:-1], old.weight) and not new.weight.requires_grad
    assert encoder.transformer.config.vocab_size == VOCABULARY + 1 and torch.equal(encoder(["a red dog"]), before)
    new.weight[-1] = new.weight[encoder.word_ids("dog")[0]]
    torch.testing.assert_close(encoder(["a red <sks>"]), before)
    assert encoder.transformer.resize_token_embeddings() is new


def test_seeds_are_left_as_transformers_leaves_them(clip):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    FrozenCLIPEmbedder(str(clip))
    assert torch.equal(torch.get_rng_state(), before)


# OpenCLIP


@torch.no_grad()
def test_open_clip(tmp_path, monkeypatch):
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    vision = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 8, "image_size": 8}
    tiny = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    monkeypatch.setattr(public_clip, "_open_clip_models", lambda: tmp_path)
    theirs = fill(open_clip.CLIP(**tiny), 0)
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "weights.safetensors")
    tokens = open_clip.tokenize(PROMPTS)
    x, states = theirs.token_embedding(tokens) + theirs.positional_embedding, []
    for block in theirs.transformer.resblocks:
        x = block(x, attn_mask=theirs.attn_mask)
        states.append(theirs.ln_final(x))
    for layer, expected in (("last", states[-1]), ("penultimate", states[-2])):
        ours = FrozenOpenCLIPEmbedder("tiny", str(tmp_path / "weights.safetensors"), layer=layer)
        torch.testing.assert_close(ours(PROMPTS), expected, **CLOSE)
        torch.testing.assert_close(ours.encode_with_transformer(tokens), expected, **CLOSE)
        assert torch.equal(ours("x"), ours.encode(["x"])) and not any(p.requires_grad for p in ours.parameters())
    assert len(ours.model.transformer.resblocks) == 3 and ours.model.ln_final.normalized_shape == (32,)
    refused("layer 'hidden'", FrozenOpenCLIPEmbedder, "tiny", str(tmp_path / "weights.safetensors"), layer="hidden")


@torch.no_grad()
def test_open_clip_s_last_blocks_and_architectures(tmp_path):
    """`layer_idx` may be set, `text_transformer_forward` replaced; programs register architectures."""
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    vision = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 8, "image_size": 8}
    (tmp_path / "own-arch.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "own-arch.json")
    with pytest.warns(UserWarning, match="no weights of 'own-arch/none'"):
        encoder = fill(FrozenOpenCLIPEmbedder("own-arch", "none", layer="last"), 0)
    states = encoder.model.hidden_states(encoder.tokenizer(PROMPTS))
    for layer_idx in range(3):
        encoder.layer_idx = layer_idx
        assert torch.equal(encoder(PROMPTS), encoder.model.ln_final(states[3 - layer_idx]))
    assert torch.equal(encoder.model.attn_mask, open_clip.CLIP(24, vision, text).attn_mask)
    encoder.text_transformer_forward = lambda x, attn_mask=None: torch.zeros_like(x)
    assert torch.equal(encoder(["a"]), encoder.model.ln_final(torch.zeros(1, 77, 32)))
    refused("arch 'no-arch' is unknown to open_clip", FrozenOpenCLIPEmbedder, "no-arch", "none")


def test_open_clip_without_weights():
    with torch.device("meta"), pytest.warns(UserWarning, match="no weights of 'ViT-H-14/laion2b_s32b_b79k'"):
        encoder = FrozenOpenCLIPEmbedder(freeze=True, layer="penultimate")
    assert shapes(encoder) == published_shapes("sd-v2", "cond_stage_model.")


# OpenAI's CLIP, whole texts and images


@torch.no_grad()
def test_clip_s_embeddings_of_texts_and_images(tmp_path, monkeypatch):
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    vision = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 8, "image_size": 24}
    tiny = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    monkeypatch.setattr(public_clip, "_open_clip_models", lambda: tmp_path)
    theirs = fill(open_clip.CLIP(**tiny), 0)
    file = str(tmp_path / "weights.safetensors")
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, file)
    expected = theirs.encode_text(open_clip.tokenize(PROMPTS))
    texts = FrozenCLIPTextEmbedder(f"tiny-clip/{file}", n_repeat=3, normalize=False)
    torch.testing.assert_close(texts(PROMPTS), expected, **CLOSE)
    torch.testing.assert_close(texts.encode(PROMPTS), expected[:, None].expand(-1, 3, -1), **CLOSE)
    unit = FrozenCLIPTextEmbedder(f"tiny-clip/{file}")
    torch.testing.assert_close(unit(PROMPTS[0]), torch.nn.functional.normalize(expected[:1]), **CLOSE)

    images = FrozenClipImageEmbedder(f"tiny-clip/{file}")
    corners = torch.zeros(1, 3, 24, 24)
    corners[0, :, 0, 0], corners[0, :, -1, -1] = 1.0, -1.0
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    for x in (corners, torch.nn.functional.interpolate(corners, (47, 70), mode="bilinear", align_corners=True)):
        y = images.preprocess(x)  # of 24 x 24 nothing is resampled; corners stay corners
        assert y.shape == (1, 3, 24, 24)
        torch.testing.assert_close(y[0, :, 0, 0], (1 - mean) / std)
        torch.testing.assert_close(y[0, :, -1, -1], -mean / std)
    normed = (corners + 1) / 2 - mean.view(3, 1, 1)
    torch.testing.assert_close(images(corners), theirs.encode_image(normed / std.view(3, 1, 1)), **CLOSE)
    assert not any(name in ("mean", "std") for name in images.state_dict())


def test_clip_s_names_of_its_models(monkeypatch):
    asked = []
    monkeypatch.setattr("ldm.compvis.encoders.read_text_encoder", lambda name: asked.append(name) or 1 / 0)
    for name in ("ViT-L/14", "ViT-B/32"):
        with pytest.raises(ZeroDivisionError):
            FrozenCLIPTextEmbedder(name)
    assert asked == ["ViT-L-14/openai", "ViT-B-32/openai"]


# the others


def test_bert_gives_the_golden_numbers():
    params, seed, tensors = load_golden("bert_embedder")
    tokens, expected = tensors["in/tokens"], tensors["out/embedding"]
    for cls, settings in ((BERTEmbedder, {"use_tokenizer": False}), (TransformerEmbedder, {})):
        encoder = fill(cls(**params, **settings, device="cuda"), seed)
        torch.testing.assert_close(encoder(tokens), expected, rtol=0, atol=1e-5)
        assert torch.equal(encoder.encode(tokens), encoder(tokens))


def test_bert_s_vocabulary_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    asked = []
    find = lambda repository, file: asked.append((repository, file)) or str(tmp_path / file)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", find)
    encoder = BERTEmbedder(16, 1, vocab_size=7, max_seq_len=5)
    assert asked == [("bert-base-uncased", "vocab.txt")]
    tokens = torch.tensor([[2, 5, 6, 3, 0]])
    assert torch.equal(encoder(["a cat"]), encoder(tokens)) and encoder(tokens).shape == (1, 5, 16)


def test_classes():
    encoder = fill(ClassEmbedder(8, n_classes=5, key="label"), 0)
    batch = {"label": torch.tensor([3, 0]), "other": torch.tensor([1, 1]), "image": None}
    table = encoder.embedding.weight
    assert torch.equal(encoder(batch), table[[3, 0], None]) and torch.equal(encoder.encode(batch), encoder(batch))
    assert torch.equal(encoder(batch, key="other"), table[[1, 1], None]) and encoder(batch).shape == (2, 1, 8)
    assert torch.equal(encoder(encoder.get_unconditional_conditioning(2)), table[[4, 4], None])


def test_classes_are_dropped_in_training_alone():
    encoder, n = fill(ClassEmbedder(8, n_classes=5, ucg_rate=0.25), 0), 4000
    batch = {"class": torch.zeros(n, dtype=torch.long)}
    assert torch.equal(encoder(batch), encoder.embedding.weight[[0] * n, None])
    encoder.train()
    share = (encoder(batch)[:, 0] == encoder.embedding.weight[4]).all(1).float().mean()
    assert abs(float(share) - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    assert torch.equal(encoder(batch, disable_dropout=True), encoder.embedding.weight[[0] * n, None])


def test_the_rescaler_gives_the_golden_numbers():
    params, seed, tensors = load_golden("spatial_rescaler")
    encoder = fill(SpatialRescaler(**params), seed)
    torch.testing.assert_close(encoder(tensors["in/x"]), tensors["out/y"], rtol=0, atol=1e-5)
    assert torch.equal(encoder.encode(tensors["in/x"]), encoder(tensors["in/x"]))
