"""The text encoder: prompts in, conditioning out; parameter names of Stable Diffusion 1 and 2."""

import copy

import pytest
import torch
from conftest import refused
from test_clip import hugging, open_clip_model

from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import reduce

FIVE = "a handwritten digit five"
PROMPTS = [FIVE, "", FIVE, "the number 7 — “bold”", FIVE]
MERGES = reduce(PROMPTS, cleaning="openclip")
SIZES = {"width": 32, "layers": 3, "heads": 4, "context_length": 16}
CLIP_SIZES = {"vocab_size": 49408, "width": 32, "layers": 3, "heads": 4, "context_length": 77}
SMALL = {**SIZES, "vocab_size": 514 + len(MERGES), "tokenizer": {"merges": MERGES}}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32, features of order 1


def encoder(layout="openclip", **changes):
    torch.manual_seed(0)
    return TextEncoder(layout=layout, activation="gelu", **{**SMALL, **changes}).eval().requires_grad_(False)


@torch.no_grad()
def test_stable_diffusion_1_as_transformers():
    """The last state after the final norm, prompts cleaned and padded as transformers does."""
    theirs, weights = hugging(CLIP_SIZES, "quick_gelu", None)
    ours = TextEncoder("transformers", 32, 3, 4, "quick_gelu", pooled=True)
    ours.transformer.load_state_dict(weights)
    tokens = ours.tokenizer(PROMPTS)
    assert tokens[1].tolist() == [49406] + 76 * [49407]
    want = theirs(input_ids=tokens, output_hidden_states=True)
    cond = ours(PROMPTS)
    torch.testing.assert_close(cond["c_crossattn"], want.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(cond["c_adm"], want.pooler_output, **TOLERANCE)
    norm = next(module for name, module in theirs.named_modules() if name.endswith("final_layer_norm"))
    for skip in (1, 2, 3):  # as diffusers' clip_skip = skip - 1 and A1111's = skip
        cond = ours(PROMPTS, clip_skip=skip)
        torch.testing.assert_close(cond["c_crossattn"], norm(want.hidden_states[-skip]), **TOLERANCE)
        torch.testing.assert_close(cond["c_adm"], want.pooler_output, **TOLERANCE)


@torch.no_grad()
def test_stable_diffusion_2_as_open_clip():
    """The state before the last block after the final norm, prompts cleaned and padded as open_clip does."""
    import open_clip

    theirs, weights = open_clip_model(CLIP_SIZES, embed_dim=24)
    ours = TextEncoder("openclip", 32, 3, 4, "gelu", projection_dim=24, layer="penultimate", pooled=True)
    ours.model.load_state_dict(weights)
    tokens = open_clip.tokenize(PROMPTS)
    for skip in (1, 2):
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[:-skip]:
            x = block(x, attn_mask=theirs.attn_mask)
        cond = ours(PROMPTS, clip_skip=skip)
        torch.testing.assert_close(cond["c_crossattn"], theirs.ln_final(x), **TOLERANCE)
        torch.testing.assert_close(cond["c_adm"], theirs.encode_text(tokens), **TOLERANCE)


@torch.no_grad()
def test_a_small_open_clip_with_a_reduced_vocabulary():
    """What the digits model does: open_clip's class trains, our tower runs, end of text the highest id."""
    ours = encoder(projection_dim=24, pooled=True)
    theirs, weights = open_clip_model({**SIZES, "vocab_size": SMALL["vocab_size"]}, embed_dim=24)
    ours.model.load_state_dict(weights)
    want = theirs.encode_text(ours.tokenizer(PROMPTS))
    torch.testing.assert_close(ours(PROMPTS)["c_adm"], want, **TOLERANCE)


@pytest.mark.parametrize("layout", ["transformers", "openclip"])
@torch.no_grad()
def test_equal_prompts_are_encoded_once(layout):
    model = encoder(layout, pooled=True)
    batches = []
    model.tower.blocks()[0].register_forward_hook(lambda module, args, out: batches.append(len(out)))
    cond = model(PROMPTS)
    assert batches == [3]
    assert cond["c_crossattn"].shape == (5, 16, 32) and cond["c_adm"].shape == (5, 32)
    alone = [model([prompt]) for prompt in PROMPTS]
    for key in ("c_crossattn", "c_adm"):
        torch.testing.assert_close(cond[key], torch.cat([one[key] for one in alone]), **TOLERANCE)
        torch.testing.assert_close(cond[key], model(model.tokenizer(PROMPTS))[key], **TOLERANCE)
    assert batches[-1] == 5  # tokens are taken as they come


@pytest.mark.parametrize("layout", ["transformers", "openclip"])
@torch.no_grad()
def test_layers(layout):
    last = encoder(layout)
    states = last.tower.hidden_states(last.tokenizer(PROMPTS))
    norm = last.tower.final_norm
    assert torch.equal(encoder(layout, layer="last")(last.tokenizer(PROMPTS))["c_crossattn"], norm(states[3]))
    for arguments, want in (
        ({"layer": "last"}, norm(states[3])),
        ({"layer": "penultimate"}, norm(states[2])),
        ({"layer": "hidden", "layer_index": 1}, states[1]),
        ({"layer": "hidden", "layer_index": -2}, states[2]),
        ({"layer": "hidden", "layer_index": -4}, states[0]),
    ):
        for pooled in (False, True):
            cond = encoder(layout, pooled=pooled, **arguments)(PROMPTS)
            torch.testing.assert_close(cond["c_crossattn"], want, **TOLERANCE)
            assert ("c_adm" in cond) == pooled
            if pooled:  # always of the last layer
                pool = last.tower.pool(norm(states[3]), last.tokenizer(PROMPTS), last.tokenizer.eos)
                torch.testing.assert_close(cond["c_adm"], pool, **TOLERANCE)


@torch.no_grad()
def test_clip_skip_counts_from_the_encoders_own_layer():
    model = encoder(layer="hidden", layer_index=-2)
    states = model.tower.hidden_states(model.tokenizer(PROMPTS))
    for skip in (1, 2):
        torch.testing.assert_close(model(PROMPTS, clip_skip=skip)["c_crossattn"], states[3 - skip], **TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "skip", "message"),
    [
        ({"layer": "last"}, 4, "clip_skip 4 does not exist: .* 3 blocks up to its own layer, so it is 1 .* to 3"),
        ({"layer": "penultimate"}, 3, "clip_skip 3 does not exist: .* to 2$"),
        ({"layer": "last"}, 0, "clip_skip 0 does not exist"),
        ({"layer": "hidden", "layer_index": 0}, 2, "to 1$"),
    ],
)
def test_a_clip_skip_that_does_not_exist_is_refused(layer, skip, message):
    refused(message, encoder(**layer), ["a cat"], clip_skip=skip)


def test_only_the_blocks_that_count_are_run():
    model = encoder(layer="penultimate")
    ran = []
    for i, block in enumerate(model.model.transformer.resblocks):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    model(["a"])
    assert ran == [0, 1]
    model(["a"], clip_skip=2)
    assert ran == [0, 1, 0]


@torch.no_grad()
def test_padding_is_seen():
    """No mask: what follows the end of text depends on the padding, as in training."""
    eos, zero = (encoder(tokenizer={"merges": MERGES, "pad": pad})(["five"])["c_crossattn"] for pad in ("eos", 0))
    assert torch.equal(eos[:, :3], zero[:, :3]) and not torch.allclose(eos[:, 3:], zero[:, 3:], atol=0.01)


def test_the_cleaning_follows_the_layout():
    cleanings = [encoder(layout).tokenizer for layout in ("transformers", "openclip")]
    assert [(t.cleaning, t.pad == t.eos) for t in cleanings] == [("clip", True), ("openclip", False)]
    assert encoder("openclip", tokenizer={"merges": MERGES, "cleaning": "clip"}).tokenizer.cleaning == "clip"


def test_a_copy_gives_the_same():
    model = encoder()
    assert torch.equal(copy.deepcopy(model)(PROMPTS)["c_crossattn"], model(PROMPTS)["c_crossattn"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "bert"}, "layout 'bert'"),
        ({"layer": "first"}, "layer 'first'"),
        ({"layer": "hidden"}, "layer_index None must be one of -4 .. 3"),
        ({"layer": "hidden", "layer_index": 4}, "layer_index 4 must be one of -4 .. 3"),
        ({"layer_index": 1}, "only for layer 'hidden'"),
        ({"vocab_size": 49408}, "49408 tokens and context 16, its tokenizer"),
        ({"tokenizer": {"merges": MERGES, "context_length": 20}}, "and 20; they must be equal"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    refused(message, encoder, **changes)


def test_one_string_is_refused():
    refused("a list of prompts", encoder(), "a cat")
