"""Stable Diffusion XL's conditioner: two towers side by side, pooled text, sizes, and zeros for no prompt."""

import pytest
import torch
from conftest import refused
from test_clip import hugging, open_clip_model
from test_text import CLIP_SIZES, FIVE, TOLERANCE

from ldm.checkpoint.xl import REFINER_SIZES
from ldm.conditioning.prompt import encode_prompts
from ldm.conditioning.sized_text import SizedTextEncoder
from ldm.conditioning.sizes import Sizes

HIDDEN = {"width": 32, "layers": 3, "heads": 4, "layer": "hidden", "layer_index": -2}
FIRST = HIDDEN | {"layout": "transformers", "activation": "quick_gelu"}
SECOND = HIDDEN | {"layout": "openclip", "activation": "gelu", "projection_dim": 24, "pooled": True}
PROMPTS = [FIVE, "a photo", FIVE, "the number 7: bold", FIVE]  # which both libraries clean alike
SIZES = Sizes((480, 640), (0, 64), (1024, 768), 5.5)


@pytest.fixture(scope="module")
def encoder() -> SizedTextEncoder:
    """With the weights of transformers' and open_clip's towers, made from the same seed in each test."""
    encoder = SizedTextEncoder([FIRST, SECOND])
    encoder.embedders[0].transformer.load_state_dict(hugging(CLIP_SIZES, "quick_gelu", None)[1])
    encoder.embedders[1].model.load_state_dict(open_clip_model(CLIP_SIZES, embed_dim=24)[1])
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def test_states_are_those_of_transformers_and_open_clip(encoder):
    """Before the last block and without the final norm; each tower has its own padding; pooled text is open_clip's."""
    import open_clip

    first, second = hugging(CLIP_SIZES, "quick_gelu", None)[0], open_clip_model(CLIP_SIZES, embed_dim=24)[0]
    tokens, padded = encoder.tokenizer(PROMPTS), open_clip.tokenize(PROMPTS)
    assert not torch.equal(tokens, padded)
    for skip in (1, 2):
        x = second.token_embedding(padded) + second.positional_embedding
        for block in second.transformer.resblocks[:-skip]:
            x = block(x, attn_mask=second.attn_mask)
        states = first(input_ids=tokens, output_hidden_states=True).hidden_states[-1 - skip]
        for given in (tokens, padded, tokens.numpy()):
            cond = encoder(given, skip)
            torch.testing.assert_close(cond["c_crossattn"], torch.cat([states, x], dim=-1), **TOLERANCE)
            torch.testing.assert_close(cond["c_adm"], second.encode_text(padded), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "numbers"), [(None, [480, 640, 0, 64, 1024, 768]), (REFINER_SIZES, [480, 640, 0, 64, 5.5])]
)
def test_sizes_are_sinusoids_behind_the_pooled_text(encoder, monkeypatch, sizes, numbers):
    from diffusers.models.embeddings import Timesteps

    cond = encode_prompts(encoder, PROMPTS)
    if sizes is not None:
        monkeypatch.setattr(encoder, "sizes", sizes)
    added = encoder.with_sizes(cond, SIZES)
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(numbers)).flatten()
    assert torch.equal(added["c_crossattn"], cond["c_crossattn"])
    assert torch.equal(added["c_adm"][:, :24], cond["c_adm"]) and added["c_adm"].shape == (5, 24 + len(numbers) * 256)
    torch.testing.assert_close(added["c_adm"][:, 24:], expected.expand(5, -1), atol=2e-5, rtol=0)  # sin of 1024


@torch.no_grad()
def test_an_empty_negative_prompt_is_zeros_unless_it_is_to_be_encoded(encoder):
    """Alone and among others; padding of a longer prompt stays, and a positive prompt is encoded."""
    prompts = ["", "a cat", "a cat BREAK a dog"]
    cond = encode_prompts(encoder, prompts)
    assert all(value.any(dim=-1).all() for value in cond.values())
    emptied = encoder.emptied(cond, prompts)
    assert all(not value[0].any() and torch.equal(value[1:], cond[key][1:]) for key, value in emptied.items())
    encoded = SizedTextEncoder([FIRST, SECOND], zeros_for_empty=False)
    assert all(torch.equal(value, cond[key]) for key, value in encoded.emptied(cond, prompts).items())


@torch.no_grad()
def test_a_prompt_may_name_the_end_of_text(encoder):
    """What follows is read, as transformers reads it; only what fills up the context is each tower's own."""
    first = hugging(CLIP_SIZES, "quick_gelu", None)[0]
    tokens = encoder.tokenizer(["a <|endoftext|> b", "a !", "a"])
    padded = tokens.clone()
    for i, end in enumerate((4, 3, 2)):
        padded[i, end + 1 :] = 0
    assert tokens[0, 2] == tokens[0, 4] == encoder.tokenizer.eos
    states = first(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
    for given in (tokens, padded):
        torch.testing.assert_close(encoder(given)["c_crossattn"][..., :32], states, **TOLERANCE)


def test_towers_must_fit_together():
    refused("of 2 text towers the last must be pooled", SizedTextEncoder, [SECOND, FIRST])
    refused("of 0 text towers", SizedTextEncoder, [])
    shorter = FIRST | {"context_length": 24}
    refused("different vocabularies or context lengths", SizedTextEncoder, [shorter, SECOND])
    refused(r"sizes \['score'\] is unknown: choose among original_size, crop", SizedTextEncoder, [SECOND], ["score"])
    refused("text encoder", SizedTextEncoder, [FIRST | {"depth": 3}, SECOND])
