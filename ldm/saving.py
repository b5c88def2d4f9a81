"""Save models: in our own checkpoints, as other programs read single files, and as folders of diffusers or ONNX."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import networks
from ldm.checkpoint.tensors import check_finite
from ldm.checkpoint.writing import save_file
from ldm.checks import as_path
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import fitted
from ldm.util import pick_dtype

MODEL_FORMATS = ("ldm", "compvis", "diffusers", "onnx")


def save(
    model: LatentDiffusion, path: str | Path, dtype: torch.dtype | str | None = None, format: str = "ldm"
) -> list[str]:
    """Write a model, atomically, and return notes on what the format cannot express.

    Args:
        dtype: of the weights in the file; "fp16" or torch.float16, say, makes it smaller.
        format: "ldm", one safetensors file; "compvis", the same with what other programs look for in a single file
            (schedule buffers, marks, modelspec metadata); "diffusers", a folder (needs the package diffusers); "onnx",
            a folder for onnxruntime (needs the extra onnx), with weights in float32 or float16.
    """
    dtype, path = pick_dtype(dtype), as_path("the file to write", path)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"only models, as ldm.load returns, are saved: got {type(model).__name__}")
    if format not in MODEL_FORMATS:
        raise ValueError(f"format {format!r} is unknown: it is one of {', '.join(MODEL_FORMATS)}")
    config, state, metadata = {"target": model.target, "params": model.config}, model.state_dict(), {}
    built, _ = fitted("the model", config, dict(state))  # what cannot be loaded again is not written
    if (type(built.null), built.null) != (type(model.null), model.null):
        hint = f"set cond_stage_model.null back to {built.null!r}, and give the other as the negative prompt"
        raise ValueError(f"the null condition {model.null!r} was set by hand, and files cannot hold it: {hint}")
    words = getattr(getattr(model.cond_stage_model, "tokenizer", None), "words", {})
    notes = vanishing(state, dtype)
    if words:
        notes.append(f"learned words are not part of the file: {' '.join(words)}")
    if format == "onnx":
        from ldm.onnx.export import write_onnx

        return notes + write_onnx(model, path, torch.float32 if dtype is None else dtype)
    if format != "ldm" and model.target != networks.MODEL_TARGET:
        raise ValueError(f"a {type(model).__name__} cannot be written as {format!r}, only as 'ldm'")
    if format == "diffusers":
        from ldm.checkpoint.diffusers_writer import write_pipeline

        check_finite("the model", state, dtype)
        return notes + write_pipeline(path, config, state, dtype)
    if format == "compvis":
        from ldm.checkpoint.compvis import single_file

        state, metadata = single_file(state, config)
        metadata["modelspec.title"] = path.stem
    save_file(path, state, config, dtype, metadata)
    return notes


def vanishing(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[str]:
    """Return a note where more than 1 % of the weights that are not 0 become 0 in `dtype`.

    Of large tensors 16,384 evenly spaced numbers are counted: a count of all takes 2 s/GiB on one core.
    """
    before = after = 0
    for tensor in state.values() if dtype is not None else ():
        if tensor.is_floating_point():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() >> 14)]
            before, after = before + int(some.count_nonzero()), after + int(some.to(dtype).count_nonzero())
    if (before - after) * 100 <= before:
        return []
    return [
        f"{1 - after / before:.1%} of the nonzero weights are too small for {dtype} and are now 0: use another dtype"
    ]
