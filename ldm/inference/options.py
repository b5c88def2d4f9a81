"""The options about the model that all drawing scripts share, and the model that they describe.

Imports nothing heavy, so that `--help` and mistakes in options are quick.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import whole

if TYPE_CHECKING:  # it imports torch
    from ldm.latent_diffusion import LatentDiffusion

LOADING = ("config", "vae", "unet", "ema", "prediction", "vocab", "variant")  # those that are arguments of `ldm.load`
PRECISIONS = ("full", "bf16", "fp16", "autocast")  # of ldm/inference/precision.py, which imports torch


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Two groups of options: which model, and how it computes. What is not given is None (a flag: False)."""
    group = parser.add_argument_group("model")
    add_checkpoint_options(group)
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="add this LoRA's change (1); repeatable"
    )
    group.add_argument(
        "--embedding", type=Path, action="append", default=[], metavar="FILE", help="learned words; repeatable"
    )

    add = parser.add_argument_group("speed and memory (images stay the same but for rounding)").add_argument
    add(
        "--precision",
        choices=PRECISIONS,
        help="of UNet and text encoder: float32, bfloat16, float16 (GPU only), or mixed (full)",
    )
    add("--attention", choices=("auto", "sdpa", "xformers", "math"), help="its kernel; math: plain, in float32 (auto)")
    add("--channels-last", action="store_true", help="another memory layout, which convolutions may prefer")
    add("--compile", action="store_true", help="torch.compile the UNet: a minute or more once, then faster steps")
    add("--vae-slicing", action="store_true", help="encode and decode one image at a time")
    add(
        "--vae-tiling",
        type=whole(1),
        nargs="?",
        const=128,
        metavar="SIDE",
        help="encode and decode images of more than SIDE x SIDE (128) pixels in bands, in less memory, seamlessly",
    )
    add(
        "--offload",
        choices=("cpu", "swap"),
        help="text encoder and first stage compute on the CPU, or wait there and are on the GPU only while used",
    )


def add_checkpoint_options(group: argparse._ArgumentGroup, *names: str) -> None:
    """Which checkpoint, how to read it, and where to put it. names: others for --ckpt."""
    add = group.add_argument
    add(
        "--ckpt", *names, type=Path, metavar="FILE", help="checkpoint or diffusers folder (the digits model that ships)"
    )
    add("--config", type=Path, metavar="FILE", help="CompVis's yaml (or ours), in place of what the checkpoint says")
    add("--vae", type=Path, metavar="FILE", help="another first stage than the checkpoint's")
    add("--unet", type=Path, metavar="FILE", help="another UNet than the checkpoint's")
    add("--ema", action="store_true", help="the averaged weights, where the checkpoint has both")
    add("--prediction", choices=("eps", "x0", "v"), help="what the UNet predicts, where the checkpoint does not say")
    add("--vocab", type=Path, metavar="FILE", help="vocab.txt of a text encoder that comes without its words (BERT)")
    add("--variant", metavar="NAME", help="of a diffusers folder's files: fp16, ...")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (auto)")


def loading_arguments(args: argparse.Namespace) -> dict[str, object]:
    """Those of `add_checkpoint_options` that were given, as `ldm.load` takes them; not where and in which dtype.

    They are plain values, which a run's configuration can keep.
    """
    given = {name: getattr(args, name) for name in LOADING if getattr(args, name) not in (None, False)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def load_model(args: argparse.Namespace) -> "LatentDiffusion":
    """The model that the options of `add_model_options` describe, with what had to be assumed about it on stderr.

    Raises FileNotFoundError and ValueError in words for the user.
    """
    import ldm
    from ldm.inference.compile import channels_last, compile_unet
    from ldm.inference.nan_check import check_images
    from ldm.inference.offload import offload
    from ldm.inference.precision import set_precision
    from ldm.inference.tiling import slice_vae, tile_vae
    from ldm.models.kernels import set_attention
    from ldm.util import pick_device

    device = pick_device(args.device)
    set_attention("auto" if args.attention is None else args.attention)
    # first onto the CPU, where a mapped file takes no memory: what goes to the device goes there once, in its precision
    model = ldm.load(args.ckpt, device="cpu", **loading_arguments(args))
    change(model, args.lora, args.embedding)
    for note in model.notes:
        print(note, file=sys.stderr)
    set_precision(model, "full" if args.precision is None else args.precision, device)
    if args.channels_last:
        channels_last(model)
    if args.vae_tiling is not None:
        tile_vae(model, args.vae_tiling)
    elif args.vae_slicing:
        slice_vae(model)
    if args.offload is None or device.type == "cpu":
        model.to(device)
    else:
        offload(model, args.offload, device)
    if args.compile:
        compile_unet(model)
    check_images(model)
    return model


def change(model: "LatentDiffusion", loras: Sequence[str], embeddings: Sequence[Path]) -> None:
    """Put LoRAs (`FILE[:STRENGTH]`) and learned words into the model, and write down that they are there."""
    from ldm.checkpoint.file import file_hash
    from ldm.finetune.embeddings import apply_embedding
    from ldm.finetune.lora_files import merge_lora, split_strength

    for path, strength in map(split_strength, loras):
        merge_lora(model, path, strength)
        model.changes.append(f"lora {path.stem} {file_hash(path)} at {strength:g}")
    for path in embeddings:
        words = apply_embedding(model, path)
        model.changes.append(f"words {' '.join(words)} {file_hash(path)}")
        model.notes.append(f"learned words of {path}: {' '.join(words)}")
