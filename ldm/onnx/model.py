"""A model that onnxruntime computes. It generates what its checkpoint does, by the same samplers, without torch.

`ldm convert MODEL FOLDER --format onnx` writes the folder (`ldm/onnx/export.py`):

    model.json    schedule, defaults, sizes, tokenizer with its vocabulary; how far each network differs from torch's
    text.onnx     tokens int64 (b, n) -> c_crossattn (b, n, d) and, if pooled, c_adm (b, p); if there are prompts
    unet.onnx     x (b, z, h, w), t (b,) and the conditions -> output (b, z, h, w) and, with cross-attention,
                  attention (b, n, h', w') to the n tokens (`ldm/onnx/attention.py`), which the page shows
    decoder.onnx  latents (b, z, h, w) -> pixels (b, c, f h, f w)
    encoder.onnx  pixels -> latents, for programs that begin with an image, as the page does; not needed here

Every network takes batches, prompts and images of any size. Nothing in such a folder is executed but ONNX's operations.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.checks import ONNX_INDEX, Width, shorten, unfit
from ldm.conditioning.prompt import encode_prompts
from ldm.conditioning.tokenizer import Tokenizer
from ldm.diffusion.denoiser import Denoise, check_prediction, make_denoiser
from ldm.diffusion.sampling.numpy_noise import NumpyNoise
from ldm.diffusion.schedule import Schedule
from ldm.generation import generate, latent_size
from ldm.settings import of_model

AS_IT_IS = ("None", "False", "[]", "auto", "cpu", "full", "fp32", "float32", "torch.float32")  # of options: no change
NUMBERS = ("channels", "image_channels", "downsampling", "multiple")
Arrays = dict[str, Any]


class NeedsCheckpoint(AttributeError, ValueError):
    """What an ONNX model lacks, in a sentence for a user."""


class Network:
    """A network of onnxruntime: arrays by name -> arrays by name."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # as of torch
        options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0  # every core
        options.log_severity_level = 4  # what is wrong is in the exception, too
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, without a common one
            raise ValueError(f"{str(path)!r} is not a network that onnxruntime reads: {_first_line(error)}") from None
        self.path, self.outputs = path, [output.name for output in self.session.get_outputs()]

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        try:
            found = self.session.run(None, inputs)
        except Exception as error:  # a network that does not fit model.json, or no memory
            raise ValueError(f"{str(self.path)!r} cannot be computed: {_first_line(error)}") from None
        return dict(zip(self.outputs, found, strict=True))


class OnnxText:
    """The text encoder: `ldm.conditioning.prompt` calls it as it calls TextEncoder."""

    null, reads = "", "caption"

    def __init__(self, tokenizer: Tokenizer, network: Network) -> None:
        self.tokenizer, self.network = tokenizer, network

    def __call__(self, tokens: np.ndarray, clip_skip: int = 1) -> Arrays:
        if clip_skip != 1:
            raise ValueError(f"clip_skip {clip_skip} needs the checkpoint: an ONNX model has its own layer alone")
        return self.network(tokens=tokens)


class OnnxModel:
    """A text-to-image or unconditional model. See `LatentDiffusion` for what its attributes and methods are.

    Args:
        path: the folder.
    """

    device, concat, changes, loaded_settings = "cpu", None, (), None
    latent_size, seeded_noise = latent_size, NumpyNoise

    def __init__(self, path: Path) -> None:
        if find_spec("onnxruntime") is None:
            raise ValueError(f"the ONNX model {str(path)!r} needs the package onnxruntime: pip install onnxruntime")
        self.path, self.notes = path, [f"{path}: ONNX, computed by onnxruntime"]
        text = (path / ONNX_INDEX).read_bytes()
        self.hash = hashlib.sha256(text).hexdigest()[:10]
        try:
            self.config: dict[str, Any] = json.loads(text)
            self.defaults = of_model(self.config["defaults"])
            signal: Any = np.array(self.config["alphas_cumprod"], dtype=np.float64)
            self.schedule = Schedule(signal)
            self.prediction, limit = self.config["prediction"], self.config["clip"]
            check_prediction(self.prediction)
            self.clip = None if limit is None else float(limit)
            sizes = [self.config[name] for name in NUMBERS]
            for name, size in zip(NUMBERS, sizes, strict=True):
                if wanted := unfit(size, Width):
                    raise ValueError(f"{name} {shorten(repr(size))} must be {wanted}")
            self.tokenizer = None if self.config["tokenizer"] is None else Tokenizer(**self.config["tokenizer"])
        except (KeyError, OverflowError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(path / ONNX_INDEX)!r} is damaged: {_first_line(error)}") from None
        self.channels, self.image_channels, self.downsampling, self.multiple = sizes
        self.unet, self.decoder = Network(path / "unet.onnx"), Network(path / "decoder.onnx")
        self.cond_stage_model = None
        if self.tokenizer is not None:
            self.cond_stage_model = OnnxText(self.tokenizer, Network(path / "text.onnx"))

    def __getattr__(self, name: str) -> Any:
        raise NeedsCheckpoint(f"this needs the checkpoint: an ONNX model, which only generates images, has no {name}")

    @property
    def null(self) -> str | None:
        return None if self.cond_stage_model is None else self.cond_stage_model.null

    def condition(
        self, prompts: Sequence[Any], chunks: int | None = None, clip_skip: int = 1, plain: bool = False
    ) -> Mapping[str, Any]:
        if self.cond_stage_model is None:
            return {}
        return encode_prompts(self.cond_stage_model, prompts, chunks, clip_skip, plain)

    def denoiser(self, seeds: Sequence[int] | None = None) -> Denoise:
        def network(x: Any, t: Any, cond: Any) -> Any:
            return self.unet(x=x, t=t, **cond)["output"]

        return make_denoiser(network, self.schedule, self.prediction)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        pixels = self.decoder(latents=latents)["pixels"]
        if not np.isfinite(pixels).all():
            raise ValueError("an image is not finite (NaN or infinite pixels): try a lower --scale")
        return pixels

    def generate(self, prompts: Sequence[Any], negative: Any = None, **options: Any) -> list[Image.Image]:
        """Generate as `ldm.generation.generate` does, from noise alone. ValueError for what needs the checkpoint."""
        for name in ("image", "mask", "guide"):
            if options.get(name) is not None:
                raise ValueError(f"{name} needs the checkpoint: an ONNX model generates from noise and prompts alone")
        return generate(self, prompts, negative, **options)


def load_onnx(path: Path, options: Mapping[str, Any]) -> Any:
    """Load an ONNX model. ValueError for options of loading a checkpoint that would change it."""
    for name, value in options.items():
        if name != "path" and str(value) not in AS_IT_IS:
            what = f"{name.replace('_', '-')} {value} needs the checkpoint"
            raise ValueError(f"{what}: {str(path)!r} is an ONNX model, which is computed as it is, on the CPU")
    return OnnxModel(path)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
