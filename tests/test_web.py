"""The page's modules compute what Python does: noise, tokens, prompts, noise levels, images and recipes."""

import json
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.batching import Blend
from ldm.conditioning.prompt import cut
from ldm.conditioning.prompt_syntax import parse_prompt
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import CLIP_SPECIAL, Tokenizer
from ldm.diffusion.denoiser import make_denoiser
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.sampling.numpy_noise import NormalGenerator
from ldm.diffusion.schedule import Schedule, make_schedule, sampling_sigmas
from ldm.editing.maps import overlay
from ldm.editing.words import Words
from ldm.generation import generate, latent_size
from ldm.inference.again import recipe_from_text
from ldm.latent_diffusion import LatentDiffusion
from ldm.onnx.model import OnnxModel, OnnxText

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node, which runs the page's modules here, is not installed")
SCRIPT = Path(__file__).with_name("web_functions.mjs")
MERGES = ["i n", "t h", "th e</w>", "a n", "f i", "fi v", "fiv e</w>", "Ã ©", "x", "' s</w>"][:8]
CLIP = {"merges": MERGES, "context_length": 12, "cleaning": "clip", "pad": 3}
OPENCLIP = CLIP | {"cleaning": "openclip", "pad": 0}
TEXTS = [
    *("", " ", "the five in thin", "The  FIVE\tin\nTHIN", "five,five.five!?", "it's the '90s, they'll 'Re", "12 five5"),
    *("caf\u00e9 cafe\u0301", "ΣΑΣ ΟΔΟΣ", "İstanbul Å", "日本語 テスト", "🦊🦊 fox", "a\u00a0b\u2003c", "---***"),
    *("<|startoftext|> the <|endoftext|>", "<start_of_text>the<end_of_text>", "< start_of_text >", "x" * 40),
]
PROMPTS = [
    *("", "a (red) car", "a (red:1.3) car", "((red)) [car]", r"\(red\) \\ \x \[", "a BREAK b", "aBREAK BREAKb BREAK"),
    *("(a [b (c:2) d] e", "a) b] (c", "(a (b] c) d]", "(a:1.2.3) (b:.5) (c:-1e1) (d: +2. )", "a:1.5) (b:1.5"),
    *("(é BREAK ü:2)", "five, " * 9, "five " * 30, "the five in thin, five five five five five BREAK in"),
    "(five:1.5) " * 12,
]
SHARES = {
    "cosine": make_schedule("cosine").alphas_cumprod.tolist(),
    "zero": make_schedule("scaled_linear", zero_terminal_snr=True).alphas_cumprod.tolist(),
    "flow": make_schedule("flow", T=100).alphas_cumprod.tolist(),
}


def asked(*tasks: dict) -> list:
    done = subprocess.run([NODE, SCRIPT], input=json.dumps(tasks), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_noise_is_torchs():
    """Of both orders, of blocks that are not full, and call after call."""
    seeds, counts = [0, 1, 12345, 2**32 - 1, 2**32 + 5, 2**64 - 1], [256, 3, 15, 16, 17, 2, 31, 1, 1000]
    found = asked(*({"name": "noise", "seed": str(seed), "counts": counts} for seed in seeds))
    for seed, calls in zip(seeds, found, strict=True):
        own = NormalGenerator(seed)
        for call, count in zip(calls, counts, strict=True):
            np.testing.assert_allclose(call, own((count,)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [CLIP, OPENCLIP], ids=list(CLIP_SPECIAL))
def test_tokens_are_the_tokenizers(settings):
    (found,) = asked({"name": "tokens", "settings": settings, "texts": TEXTS})
    assert found == [Tokenizer(**settings).encode(text) for text in TEXTS]


def test_prompts_are_read_and_cut_alike():
    pieces = asked(*({"name": "pieces", "prompt": prompt} for prompt in PROMPTS))
    assert pieces == [[[list(piece) for piece in section] for section in parse_prompt(prompt)] for prompt in PROMPTS]
    chunks = asked(*({"name": "chunks", "settings": CLIP, "prompt": prompt} for prompt in PROMPTS))
    tokenizer = Tokenizer(**CLIP)
    assert chunks == [[[c.tokens, c.weights] for c in cut(tokenizer, prompt)] for prompt in PROMPTS]
    heavy, long = asked(
        {"name": "pieces", "prompt": "(a:1e9)"}, {"name": "chunks", "settings": CLIP, "prompt": "a " * 400}
    )
    assert "must be from -1000 to 1000" in heavy["error"] and "more than 32 chunks" in long["error"]


def test_noise_levels_are_those_of_python():
    cases = [
        (name, steps, spacing, last)
        for name in SHARES
        for steps, spacing, last in [
            *((steps, "trailing", "zero") for steps in (1, 3, 7, 20, 64, 100)),
            *((20, spacing, "sigma_min") for spacing in ("leading", "linspace", "karras", "exponential")),
            *((1, "linspace", "zero"), (3, "90,50.5,0", "zero"), (2, "sigmas 9.5 1", "zero")),
        ]
    ]
    found = asked(
        *({"name": "sigmas", "shares": SHARES[n], "steps": s, "spacing": p, "last": z} for n, s, p, z in cases),
        *({"name": "timesteps", "shares": SHARES[n], "sigmas": [1e-9, 0.02, 0.7, 5, 60, 1e9]} for n in SHARES),
    )
    for (name, steps, spacing, last), sigmas in zip(cases, found, strict=False):
        expected = sampling_sigmas(Schedule(np.array(SHARES[name])), steps, spacing, last)
        np.testing.assert_allclose(sigmas, expected, rtol=1e-9, err_msg=f"{name} {steps} {spacing}")
    for name, times in zip(SHARES, found[len(cases) :], strict=True):
        own = Schedule(np.array(SHARES[name]))
        np.testing.assert_allclose(times, [own.t_at(s) for s in (1e-9, 0.02, 0.7, 5, 60, 1e9)], atol=1e-6, rtol=0)
    unknown, many = asked(
        {"name": "sigmas", "shares": SHARES["flow"], "steps": 3, "spacing": "dense"},
        {"name": "sigmas", "shares": SHARES["flow"], "steps": 101},
    )
    assert 'unknown spacing "dense"' in unknown["error"] and "from 1 to 100, got 101" in many["error"]


CONFIG = {
    **{"prediction": "v", "clip": None, "channels": 4, "image_channels": 3, "downsampling": 2, "multiple": 4},
    "defaults": {"height": 8, "width": 12, "steps": 6, "scale": 2.5, "sampler": "ddim", "interval": [0.1, 9.0]},
    **{"tokenizer": CLIP, "alphas_cumprod": SHARES["cosine"]},
}


def python_model(config: dict) -> OnnxModel:
    """An ONNX model whose networks are those of web_functions.mjs."""
    model = object.__new__(OnnxModel)
    model.__dict__ |= {name: config[name] for name in ("prediction", "clip", "channels", "downsampling", "multiple")}
    model.__dict__ |= {"defaults": config["defaults"], "schedule": Schedule(np.array(config["alphas_cumprod"]))}
    model.__dict__ |= {"image_channels": config["image_channels"], "path": Path("model")}

    def text(tokens):
        angle = tokens[..., None] * 0.37 * np.arange(1, 3) + np.arange(tokens.shape[1])[:, None]
        return {"c_crossattn": np.sin(angle).astype(np.float32), "c_adm": np.cos(tokens[:, 1:2]).astype(np.float32)}

    def unet(x, t, c_crossattn, c_adm):
        signs = (np.arange(x[0].size) % 3 - 1).reshape(x.shape[1:])
        own = t / 1000 + c_adm[:, 0] / 2
        mean = c_crossattn.mean((1, 2))[:, None, None, None]
        maps = np.tanh(c_crossattn[:, :, :1] + x.reshape(len(x), 1, -1)[..., :6]).reshape(len(x), -1, 2, 3)
        output = np.tanh(x + own[:, None, None, None] + mean * signs).astype(np.float32)
        return {"output": output, "attention": maps}

    def decoder(latents):
        f = config["downsampling"]
        return {"pixels": np.tanh(latents[:, : config["image_channels"]].repeat(f, 2).repeat(f, 3))}

    tokenizer = None if config["tokenizer"] is None else Tokenizer(**config["tokenizer"])
    model.tokenizer, model.unet, model.decoder = tokenizer, unet, decoder
    model.cond_stage_model = None if tokenizer is None else OnnxText(tokenizer, SimpleNamespace(__call__=text))
    if tokenizer is not None:
        model.cond_stage_model.network = text
    return model


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({}, {}),
        ({}, {"prompt": "the five", "seed": 7}),
        ({}, {"prompt": "(five:1.4) in", "negative": "the [thin]", "sampler": "ddpm"}),
        ({}, {"prompt": "five " * 14, "sampler": "dpmpp_2m", "steps": 9, "width": 16}),
        ({}, {"prompt": "five", "scale": 1, "sampler": "euler_a", "height": 12}),
        ({"prediction": "eps"}, {"prompt": "five", "scale": 0}),
        ({"prediction": "x0", "clip": 1.0, "image_channels": 1}, {"prompt": "thin", "scale": 1.5}),
        ({"prediction": "flow", "alphas_cumprod": SHARES["flow"]}, {"prompt": "five", "steps": 5}),
    ],
)
def test_images_are_those_of_python(config, given):
    """Pixels within 1/255, from the same seed."""
    config = CONFIG | config
    (found,) = asked({"name": "image", "config": config, "given": given})
    settings = given | {"prompt": None, "negative": None}
    settings = {name: value for name, value in settings.items() if value is not None}
    negative = given.get("negative")
    steps, model, seen = [], python_model(config), []
    unet = model.unet
    model.unet = lambda **inputs: seen.append(unet(**inputs)) or seen[-1]
    images = model.generate([given.get("prompt", "")], negative, callback=steps.append, **settings)
    rgba = np.asarray(images[0].convert("RGBA")).astype(int)
    assert np.asarray(images[0]).std() > 5
    assert np.abs(np.array(found["rgba"]).reshape(rgba.shape) - rgba).max() <= 1
    assert found["levels"][1:] == pytest.approx([step.sigma for step in steps[:-1]])
    maps, words = np.mean([outputs["attention"][-1] for outputs in seen], axis=0), words_of(given.get("prompt", ""))
    assert [text for text, _ in found["words"]] == words.texts
    for text, values in found["words"]:
        np.testing.assert_allclose(values, maps[words.places(text)].sum(0).ravel(), atol=1e-5)


def test_older_files_have_no_words():
    found, old = asked(*({"name": "image", "config": CONFIG, "given": {"prompt": "five"}, "old": o} for o in (0, 1)))
    assert found["rgba"] == old["rgba"] and len(found["words"]) == 1 and old["words"] == []


def words_of(prompt: str) -> Words:
    encoder = object.__new__(TextEncoder)
    encoder.__dict__["tokenizer"] = Tokenizer(**CLIP)
    return Words(SimpleNamespace(cond_stage_model=encoder), prompt)


def test_words_have_the_places_of_pythons():
    prompts = [*TEXTS, *PROMPTS, "The five, the FIVE; <a b> <five> it's a-b_c"]
    found = asked(*({"name": "words", "settings": CLIP, "prompt": prompt} for prompt in prompts))
    for prompt, own in zip(prompts, found, strict=True):
        words = words_of(prompt)
        assert own == [[text, words.places(text)] for text in words.texts], prompt


@pytest.mark.parametrize("size", [(5, 7), (2, 2)], ids=str)
def test_overlays_are_those_of_python(size):
    rng = np.random.default_rng(0)
    pixels, heat = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8), rng.random(size, dtype=np.float32)
    expected = np.asarray(overlay(Image.fromarray(pixels), torch.tensor(heat))).astype(int)
    rgba = np.concatenate([pixels, np.full((12, 10, 1), 255)], axis=2)
    image = {"data": rgba.ravel().tolist(), "width": 10, "height": 12}
    given = {"data": heat.ravel().tolist(), "width": size[1], "height": size[0]}
    (found,) = asked({"name": "overlay", "image": image, "map": given})
    assert np.abs(np.array(found).reshape(12, 10, 4)[..., :3] - expected).max() <= 1


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_images_between_two_are_those_of_python(share):
    given = {"prompt": "five", "seed": 3, "towards": {"prompt": "(thin:1.3) " * 4, "seed": 8, "share": share}}
    (found,) = asked({"name": "image", "config": CONFIG, "given": given | {"sampler": "ddpm"}})
    prompt, seed = (Blend(given[name], given["towards"][name], share) for name in ("prompt", "seed"))
    (image,) = python_model(CONFIG).generate([prompt], seeds=[seed], sampler="ddpm")
    rgba = np.asarray(image.convert("RGBA")).astype(int)
    assert np.abs(np.array(found["rgba"]).reshape(rgba.shape) - rgba).max() <= 1


def test_the_last_encoded_prompts_are_kept():
    prompts = [f"five {i}" for i in range(70)]
    (found,) = asked({"name": "encoded", "config": CONFIG, "prompts": prompts})
    assert found == prompts[-64:]


class WithEncoder:
    """The same model on tensors, which init images need."""

    concat, device, clip = None, "cpu", None
    latent_size, seeded_noise, default_strength = latent_size, SeededNoise, LatentDiffusion.default_strength

    def __init__(self, config: dict):
        self.arrays = python_model(config)
        for name in ("prediction", "channels", "image_channels", "downsampling", "multiple", "defaults", "tokenizer"):
            setattr(self, name, getattr(self.arrays, name))
        self.schedule, self.cond_stage_model, self.null = self.arrays.schedule, self.arrays.cond_stage_model, ""

    def condition(self, *given, **options):
        return {name: torch.tensor(value) for name, value in self.arrays.condition(*given, **options).items()}

    def denoiser(self, seeds=None):
        def network(x, t, cond):
            return torch.tensor(
                self.arrays.unet(x.numpy(), t.numpy(), **{k: v.numpy() for k, v in cond.items()})["output"]
            )

        return make_denoiser(network, self.schedule, self.prediction)

    def encode(self, pixels, mode):
        own = pixels[..., :: self.downsampling, :: self.downsampling]
        return torch.stack([own[:, k % self.image_channels] * (k + 1) for k in range(4)], dim=1)

    def decode(self, latents):
        return torch.tensor(self.arrays.decode(latents.numpy()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("strength", "masked"), [(None, False), (0.34, False), (1.0, False), (None, True), (0.5, True)]
)
def test_changed_images_are_those_of_python(channels, strength, masked):
    config = CONFIG | {"image_channels": channels}
    rng = np.random.default_rng(0)
    init = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    given = {"prompt": "five", "seed": 4, "sampler": "ddpm"} | ({} if strength is None else {"strength": strength})
    rgba = np.asarray(init.convert("RGBA"))
    asking = given | {"init": {"data": rgba.ravel().tolist(), "width": 12, "height": 8}}
    mask = None
    if masked:
        levels = np.zeros((8, 12), dtype=np.uint8)
        levels[1:5, 3:9] = 255
        mask, asking = Image.fromarray(levels), asking | {"mask": (levels // 255).ravel().tolist()}
    (found,) = asked({"name": "image", "config": config, "given": asking})
    prompt = given.pop("prompt")
    (image,) = generate(WithEncoder(config), [prompt], image=init, mask=mask, **given)
    expected = np.asarray(image.convert("RGBA")).astype(int)
    assert np.abs(np.array(found["rgba"]).reshape(expected.shape) - expected).max() <= 1
    if masked:
        assert (expected[6:] == rgba[6:]).all() and (expected[1:5, 3:9] != rgba[1:5, 3:9]).any()


@pytest.mark.parametrize("prompt", ["a five, (red:1.2)", "caf\u00e9", "日本語\nline", ""])
def test_recipes_are_read_by_python(prompt):
    """What the page writes into a PNG says the same as what `ldm txt2img` would write."""
    given = {"prompt": prompt, "negative": "blurry", "seed": 5, "steps": 7, "scale": 1.25, "sampler": "ddpm"}
    source = {"name": "digits", "hash": "0123456789"}
    (text,) = asked({"name": "recipe", "config": CONFIG, "given": given, "source": source})
    buffer = BytesIO()
    Image.new("L", (4, 4)).save(buffer, "png")
    (png,) = asked({"name": "png", "bytes": list(buffer.getvalue()), "text": text})
    image = Image.open(BytesIO(bytes(png)))
    image.load()
    recipe = recipe_from_text(image.info["parameters"])
    assert (recipe.model_name, recipe.model_hash) == ("digits", "0123456789")
    assert {name: getattr(recipe, name) for name in given} == given
    assert (recipe.width, recipe.height, recipe.interval) == (12, 8, (0.1, 9.0))
    assert (recipe.spacing, recipe.eta, recipe.final_sigma) == ("trailing", 1.0, "zero")
