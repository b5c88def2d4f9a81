"""Write a model as a folder of ONNX files (`ldm/onnx/model.py`), by torch.onnx, and compare each with torch."""

import json
import warnings
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.checkpoint.atomic_folder import atomic_folder
from ldm.checks import ONNX_INDEX
from ldm.conditioning.text import TextEncoder
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention_layers import attention_layers
from ldm.onnx.attention import WithAttention
from ldm.onnx.model import NUMBERS, Network

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# of a network's outputs, relative to the largest of them; with float32 weights they differ by about 1e-6
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2}
HALVED = 256  # numbers: a smaller weight would save nothing in half precision


class _Text(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(tokens).values())


class _Decoder(nn.Module):
    def __init__(self, first_stage: Any, scale_factor: float) -> None:
        super().__init__()
        self.first_stage, self.scale_factor = first_stage, scale_factor

    def forward(self, latents: Tensor) -> Tensor:
        return self.first_stage.decode(latents / self.scale_factor)


class _Encoder(nn.Module):
    def __init__(self, first_stage: Any, scale_factor: float) -> None:
        super().__init__()
        self.first_stage, self.scale_factor = first_stage, scale_factor

    def forward(self, pixels: Tensor) -> Tensor:
        code = self.first_stage.encode(pixels)  # a posterior, or the code itself
        return (code if isinstance(code, Tensor) else code.mode()) * self.scale_factor


def write_onnx(model: LatentDiffusion, path: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write a model, atomically; return notes on how far each network differs from torch's.

    Args:
        dtype: of the weights in the files, float32 or float16; all is computed in float32.
    Raises:
        ValueError: for a model that ONNX files cannot hold, without the extra `onnx`, or where a network differs.
    """
    _check(model, path)
    if dtype not in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"format 'onnx' has weights in float32 or float16, not in {name}")
    size = model.latent_size(model.defaults["height"], model.defaults["width"])
    x, conditions, networks = torch.randn(2, *size), {}, {}
    if model.cond_stage_model is not None:
        tokens = torch.from_numpy(model.tokenizer.frame([[], [1, 2]]))
        conditions = {name: value.clone() for name, value in model.cond_stage_model(tokens).items()}
        networks["text"] = _Text(model.cond_stage_model), {"tokens": tokens}, list(conditions)
    attends = bool(conditions and attention_layers(model))
    unet, outputs = (WithAttention(model), ["output", "attention"]) if attends else (model.model, ["output"])
    networks["unet"] = unet, {"x": x, "t": torch.tensor([3.0, 5.0]), **conditions}, outputs
    first_stage, sides = (model.first_stage_model, model.scale_factor), [side * model.downsampling for side in size[1:]]
    networks["decoder"] = _Decoder(*first_stage), {"latents": x}, ["pixels"]
    networks["encoder"] = _Encoder(*first_stage), {"pixels": torch.randn(2, model.image_channels, *sides)}, ["latents"]
    differences = {}
    with atomic_folder(path) as folder, torch.no_grad():
        for name, (network, inputs, outputs) in networks.items():
            file = folder / f"{name}.onnx"
            _export(network, inputs, outputs, file)
            if dtype == torch.float16:
                _halve(file)
            more = model.multiple // (1 if name == "encoder" else model.downsampling)
            found = _difference(network, inputs, Network(file), more)
            if not found <= TOLERANCE[dtype]:
                raise ValueError(f"the network {name} would differ from torch's by {found:.1e}: nothing is written")
            differences[name] = found
        (folder / ONNX_INDEX).write_text(json.dumps(_index(model, differences)))
    return [f"{name}.onnx: within {found:.1e} of torch, of its largest output" for name, found in differences.items()]


def _check(model: LatentDiffusion, path: Path) -> None:
    """Raise ValueError for what cannot be written there, or without the packages that write it."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        extra = 'pip install "latent-diffusion-toolkit[onnx]"'
        raise ValueError(f"format 'onnx' needs {', '.join(missing)}, which the extra onnx installs: {extra}")
    if path.exists() and not (path.is_dir() and ((path / ONNX_INDEX).is_file() or not any(path.iterdir()))):
        raise ValueError(f"{str(path)!r} is not an empty folder, nor that of an ONNX model: nothing there is replaced")
    encoder, what = model.cond_stage_model, "an ONNX model is conditioned on texts by CLIP's encoder, or on nothing"
    if encoder is not None and not isinstance(encoder, TextEncoder):
        raise ValueError(f"{what}: this one has a {type(encoder).__name__}")
    if model.concat is not None:
        raise ValueError(f"{what}: this one takes an init image beside the noise (concat {model.concat})")
    for name in ("random_x0", "learned_variance", "self_condition"):
        if getattr(model, name, False):
            raise ValueError(f"an ONNX model's network predicts from noise and time alone: this one has {name}")
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        raise ValueError("an ONNX model computes in float32: load this one with dtype float32")
    if words := getattr(model.tokenizer, "words", None):
        raise ValueError(f"an ONNX model has no learned words: load this one without {' '.join(words)}")


def _index(model: LatentDiffusion, errors: dict[str, float]) -> dict[str, Any]:
    tokenizer, own = model.tokenizer, ("merges", "context_length", "cleaning", "pad")
    return {
        "prediction": model.prediction,
        "clip": model.clip,
        "defaults": model.defaults,
        **{name: getattr(model, name) for name in NUMBERS},
        "tokenizer": None if tokenizer is None else {name: getattr(tokenizer, name) for name in own},
        "alphas_cumprod": model.schedule.alphas_cumprod.tolist(),
        "differences": errors,
        "source": {"name": "" if model.path is None else model.path.stem, "hash": model.hash},
        "version": f"ldm {__version__}",
    }


def _export(network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    """Write a network with dynamic batch, image size and number of chunks of the prompt."""
    dynamic = {"x": "bchw", "latents": "bchw", "pixels": "bchw", "c_crossattn": "bnd"}
    axes = {n: {i: a for i, a in enumerate(dynamic.get(n, "b")) if a in "bhwn"} for n in inputs}
    options: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs, "dynamic_shapes": axes}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # the exporter's, of progress and of names of axes
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(network, kwargs=inputs, dynamo=True, verbose=False, **options)
        except Exception as error:  # it may fail in any way for modules that a user wrote
            raise ValueError(f"torch.onnx cannot write {path.name}: {str(error).splitlines()[0]}") from error
        assert program is not None
        for node in program.model.graph:
            node.metadata_props.clear()  # where on this machine the node comes from: a tenth of the file
        program.save(path)


def _halve(path: Path) -> None:
    """Write the weights of a network in half precision, which each reader widens to float32 when it loads them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph, casts = model.graph, []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) >= HALVED:
            name, values = weight.name, numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        graph.node.insert(0, node)
    onnx.save(model, path)


def _difference(network: nn.Module, inputs: dict[str, Tensor], written: Network, multiple: int) -> float:
    """Return the largest difference on other sizes than those exported, relative to the largest output."""
    other = {}
    for name, value in inputs.items():
        value = torch.cat([value, value[:1]])  # three of a batch
        if value.ndim == 4:
            value = nn.functional.pad(value, (0, multiple, 0, 2 * multiple))
        other[name] = torch.cat([value, value], dim=1) if name == "c_crossattn" else value
    expected = network(**other)
    found = written(**{name: value.numpy() for name, value in other.items()}).values()
    pairs = zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True)
    errors = [float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max()) for theirs, ours in pairs]
    return float(np.max(errors))  # NaN if one of them is
