"""The text towers against transformers' CLIPTextModel and open_clip's CLIP, with random weights, in float32.

The states are of order 1 and a tower of a few layers adds up a few hundred roundings of 6e-8: 1e-5 is ample and small.
"""

import pytest
import torch
from conftest import refused
from torch import nn

from ldm.checkpoint.diffusers_text import CLIP_KEYS
from ldm.models.clip import OpenCLIPTextModel
from ldm.models.clip_transformers import CLIPTextModel

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TINY = {"vocab_size": 99, "width": 32, "layers": 3, "heads": 4, "context_length": 16}
# ViT-L's and ViT-H's text towers, but for vocabulary and depth
VIT_L = {"vocab_size": 1000, "width": 768, "layers": 2, "heads": 12, "context_length": 77}
VIT_H = {"vocab_size": 1000, "width": 1024, "layers": 2, "heads": 16, "context_length": 77}


def scramble(model: nn.Module) -> None:
    """Weights far from any initialisation, so that biases, norms and activations all count."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 2:
            p.data = noise * (0.5 if "embedding" in name else p.shape[1] ** -0.5)
        else:
            p.data = 0.2 * noise + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)


def tokens_with_eos(vocab_size: int, context_length: int, pad: int) -> torch.Tensor:
    """Prompts of several lengths: start, words, end, padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((4, context_length), pad)
    for row, length in zip(tokens, (0, 1, context_length // 2, context_length - 2), strict=True):
        row[: length + 2] = torch.randint(1, vocab_size - 2, (length + 2,), generator=generator)
        row[0], row[length + 1] = vocab_size - 2, vocab_size - 1
    return tokens


def hugging(sizes: dict, activation: str, projection_dim: int | None):
    """transformers' text model, and its weights under the public files' names, whatever this version calls them."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # every size: transformers' config fills what is left out with CLIP-B's
    settings = {theirs: sizes[ours] for ours, theirs in CLIP_KEYS.items() if ours in sizes}
    end = sizes["vocab_size"] - 1
    settings |= {"intermediate_size": 4 * sizes["width"], "projection_dim": projection_dim or 512}
    settings |= {"hidden_act": activation, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    kind = CLIPTextModel if projection_dim is None else CLIPTextModelWithProjection
    model = kind(CLIPTextConfig(**settings)).eval()
    scramble(model)
    weights = {}
    for key, value in model.state_dict().items():
        if key.endswith("position_ids"):
            continue
        # transformers 5.6 flattened CLIPTextModel; should the one with a projection follow, the prefix is put back
        known = key.startswith(("text_model.", "text_projection."))
        weights[key if known else "text_model." + key] = value
    return model, weights


def open_clip_model(sizes: dict, embed_dim: int, quick_gelu: bool = False):
    """open_clip's CLIP with an image tower as small as it gets, and its text tower's weights."""
    from open_clip import CLIP

    text = {key: sizes[key] for key in ("vocab_size", "width", "layers", "heads", "context_length")}
    vision = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 8, "image_size": 8}
    model = CLIP(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()
    scramble(model)
    return model, {key: value for key, value in model.state_dict().items() if not key.startswith("visual.")}


@pytest.mark.parametrize("activation, projection_dim", [("quick_gelu", 24), ("gelu", 24), ("quick_gelu", None)])
@pytest.mark.parametrize("sizes", [TINY, VIT_L], ids=["tiny", "vit-l"])
@torch.no_grad()
def test_equals_transformers(sizes, activation, projection_dim):
    theirs, weights = hugging(sizes, activation, projection_dim)
    ours = CLIPTextModel(**sizes, activation=activation, projection_dim=projection_dim)
    ours.load_state_dict(weights)
    eos = sizes["vocab_size"] - 1
    tokens = tokens_with_eos(sizes["vocab_size"], sizes["context_length"], pad=eos)
    want = theirs(input_ids=tokens, output_hidden_states=True)
    states = ours.hidden_states(tokens)
    assert len(states) == len(want.hidden_states) == sizes["layers"] + 1
    for state, expected in zip(states, want.hidden_states, strict=True):
        torch.testing.assert_close(state, expected, **TOLERANCE)
    last = ours.final_norm(states[-1])
    torch.testing.assert_close(last, want.last_hidden_state, **TOLERANCE)
    pooled = want.pooler_output if projection_dim is None else want.text_embeds
    torch.testing.assert_close(ours.pool(last, tokens, eos), pooled, **TOLERANCE)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("sizes", [TINY, VIT_H], ids=["tiny", "vit-h"])
@torch.no_grad()
def test_equals_open_clip(sizes, quick_gelu):
    theirs, weights = open_clip_model(sizes, embed_dim=24, quick_gelu=quick_gelu)
    ours = OpenCLIPTextModel(**sizes, activation="quick_gelu" if quick_gelu else "gelu", projection_dim=24)
    ours.load_state_dict(weights)
    tokens = tokens_with_eos(sizes["vocab_size"], sizes["context_length"], pad=0)
    x = theirs.token_embedding(tokens) + theirs.positional_embedding
    want = [x]
    for block in theirs.transformer.resblocks:
        want.append(block(want[-1], attn_mask=theirs.attn_mask))
    states = ours.hidden_states(tokens)
    for state, expected in zip(states, want, strict=True):
        torch.testing.assert_close(state, expected, **TOLERANCE)
    # Stable Diffusion 2's context: all but the last block, then the final norm
    torch.testing.assert_close(ours.final_norm(states[-2]), theirs.ln_final(want[-2]), **TOLERANCE)
    pooled = ours.pool(ours.final_norm(states[-1]), tokens, sizes["vocab_size"] - 1)
    torch.testing.assert_close(pooled, theirs.encode_text(tokens), **TOLERANCE)


@pytest.mark.parametrize("tower", [CLIPTextModel, OpenCLIPTextModel])
@torch.no_grad()
def test_fewer_blocks_and_fewer_tokens_change_nothing_before_them(tower):
    model = tower(**TINY, activation="gelu")
    scramble(model)
    tokens = tokens_with_eos(99, 16, pad=0)
    states = model.hidden_states(tokens)
    part = model.hidden_states(tokens[:, :5], depth=2)  # causal: later tokens cannot be seen
    assert len(part) == 3
    for short, long in zip(part, states, strict=False):
        torch.testing.assert_close(short, long[:, :5], **TOLERANCE)


@torch.no_grad()
def test_pooling_takes_the_first_end_of_text():
    model = CLIPTextModel(**TINY, activation="gelu")
    x = torch.arange(16.0).expand(2, 16)[..., None].repeat(1, 1, 32)  # feature = position
    tokens = torch.tensor([[97, 3, 98] + [98] * 13, [97] + [5] * 14 + [98]])
    assert model.pool(x, tokens, eos=98)[:, 0].tolist() == [2.0, 15.0]
    tokens[0, 1] = 97  # a token added above the end of text, as textual inversion does, is not mistaken for it
    tokens[tokens == 98] = 90
    assert model.pool(x, tokens, eos=90)[:, 0].tolist() == [2.0, 15.0]


@torch.no_grad()
def test_both_layouts_are_one_model():
    theirs = OpenCLIPTextModel(**TINY, activation="gelu", projection_dim=24)
    scramble(theirs)
    source = theirs.state_dict()
    weights = {
        "text_model.embeddings.token_embedding.weight": source["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": source["positional_embedding"],
        "text_model.final_layer_norm.weight": source["ln_final.weight"],
        "text_model.final_layer_norm.bias": source["ln_final.bias"],
        "text_projection.weight": source["text_projection"].T,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(TINY["layers"]):
        old, new = f"transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for theirs_name, our_name in names.items():
                weights[f"{new}{our_name}.{kind}"] = source[f"{old}{theirs_name}.{kind}"]
            stacked = source[f"{old}attn.in_proj_{kind}"].chunk(3)
            weights |= {f"{new}self_attn.{n}_proj.{kind}": w for n, w in zip("qkv", stacked, strict=True)}
    ours = CLIPTextModel(**TINY, activation="gelu", projection_dim=24)
    ours.load_state_dict(weights)
    tokens = tokens_with_eos(99, 16, pad=0)
    for one, other in zip(ours.hidden_states(tokens), theirs.hidden_states(tokens), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("tower", [CLIPTextModel, OpenCLIPTextModel])
@torch.no_grad()
def test_bfloat16_stays_close_to_float32(tower):
    model = tower(**TINY, activation="gelu")
    scramble(model)
    tokens = tokens_with_eos(99, 16, pad=0)
    exact = model.final_norm(model.hidden_states(tokens)[-1])
    rough = model.bfloat16().final_norm(model.hidden_states(tokens)[-1])
    assert rough.dtype == torch.bfloat16
    # 8 bits of mantissa over three layers of unit-variance features: a relative error of a few times 2^-8
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("tower", [CLIPTextModel, OpenCLIPTextModel])
def test_a_new_tower_is_initialised_and_trains(tower):
    torch.manual_seed(0)
    model = tower(**TINY, activation="gelu", projection_dim=24)
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in model.parameters())
    tokens = tokens_with_eos(99, 16, pad=0)
    model.pool(model.final_norm(model.hidden_states(tokens)[-1]), tokens, 98).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == ({"logit_scale"} if tower is OpenCLIPTextModel else set())


def test_bad_arguments_are_named():
    refused("'relu' is unknown: it is one of gelu, quick_gelu", CLIPTextModel, **TINY, activation="relu")
    refused("width 32 does not split into 5 heads", OpenCLIPTextModel, **{**TINY, "heads": 5}, activation="gelu")
