"""Rewrite a model in another format or precision, with other parts, with LoRAs merged into it; or rewrite a LoRA.

ldm convert runs/digits/diffusion/model.safetensors digits.safetensors --dtype fp16
ldm convert model.ckpt folder/ --format diffusers --vae vae.safetensors
ldm convert digits folder/ --format onnx
ldm convert model.safetensors other.safetensors --lora subject.safetensors:0.8 --lora style.safetensors
ldm convert model.safetensors other.safetensors --default scale=1.25 --default steps=20
ldm convert runs/digits/diffusion other.safetensors --sigma-rel 0.08
ldm convert lora.safetensors small.safetensors --rank 4 --lora-format peft
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import Parser, finite_float, int_range
from ldm.inference.options import LOADING, add_loading_options, loading_arguments
from ldm.settings import of_model

if TYPE_CHECKING:  # it takes a second, which --help has no use for
    import torch

    from ldm.latent_diffusion import LatentDiffusion

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OF_MODELS = (*LOADING, "format", "lora", "default", "sigma_rel")
OF_LORAS = ("rank", "lora_format")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    import torch

    from ldm.finetune.lora_files import holds_lora, rewrite

    if args.format is None and not args.output.suffix and (args.output.is_dir() or not args.output.exists()):
        raise ValueError(
            f"{str(args.output)!r} looks like a folder, and what is written without --format is one file: "
            "give --format diffusers or onnx, or a name that ends in .safetensors"
        )
    dtype = None if args.dtype is None else getattr(torch, DTYPES[args.dtype])
    is_lora = args.input.is_file() and holds_lora(args.input)
    for name in OF_MODELS if is_lora else OF_LORAS:
        if getattr(args, name) not in (None, False, []):
            kinds = ("models", "a LoRA file") if is_lora else ("LoRA files", "none")
            raise ValueError(f"--{name.replace('_', '-')} is for {kinds[0]}, and {str(args.input)!r} is {kinds[1]}")
    if is_lora:
        notes = rewrite(args.input, args.output, args.rank, args.lora_format, dtype)
    else:
        notes = convert_model(args, dtype)
    for note in notes:
        print(note)
    files = [args.output] if args.output.is_file() else [path for path in args.output.rglob("*") if path.is_file()]
    print(f"{args.output}: {sum(path.stat().st_size for path in files):,} bytes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("input", type=Path, metavar="IN", help="a checkpoint, a folder of diffusers, or a LoRA file")
    add("output", type=Path, metavar="OUT", help="where to write; an existing file is replaced at the end")
    add("--dtype", choices=DTYPES, help="of the weights in the file (models: fp32; LoRAs: as they are)")

    group = parser.add_argument_group("if IN is a model")
    add = group.add_argument
    what = "one file; the same with what other programs look for in it; folders, with the extras of these names (ldm)"
    add("--format", choices=("ldm", "compvis", "diffusers", "onnx"), help=what)
    what = "add this LoRA's change, times STRENGTH (1), to the weights; several add up"
    add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help=what)
    add("--default", action="append", default=[], metavar="KEY=VALUE", help="change one of the model's own settings")
    what = "IN is a run with loop.ema_snapshots: average its weights with this relative width (0.05 to 0.25, say)"
    add("--sigma-rel", type=finite_float(0), metavar="WIDTH", help=what)
    add_loading_options(group)

    add = parser.add_argument_group("if IN is a LoRA").add_argument
    what = "a smaller rank: of each layer's change, its N strongest directions"
    add("--rank", type=int_range(1), metavar="N", help=what)
    what = "kohya: what nearly every program reads; peft: diffusers' own (as it is)"
    add("--lora-format", choices=("kohya", "peft"), help=what)
    return parser.parse_args(argv)


def convert_model(args: argparse.Namespace, dtype: "torch.dtype | None") -> list[str]:
    """Write the model that the options describe; return what is to be said about it."""
    import ldm
    from ldm.finetune.lora_files import merge_lora, split_strength
    from ldm.generation import check_defaults

    model = ldm.load(args.input, device="cpu", **loading_arguments(args))
    if args.sigma_rel is not None:
        from ldm.training.snapshots import apply_average

        apply_average(model, args.input, args.sigma_rel)
    for change in args.default:
        set_default(model, change)
    if args.default:
        check_defaults(model)
    for text in args.lora:
        merge_lora(model, *split_strength(text), dtype)
    return model.notes + ldm.save(model, args.output, dtype, "ldm" if args.format is None else args.format)


def set_default(model: "LatentDiffusion", change: str) -> None:
    """Change one setting, `KEY=VALUE` with the value in yaml; ValueError for a key that models do not have."""
    import yaml

    key, equals, value = change.partition("=")
    if key not in model.defaults or not equals:
        raise ValueError(f"--default {change!r} must be KEY=VALUE with a key of {', '.join(model.defaults)}")
    try:
        model.defaults = of_model(model.defaults | {key: yaml.safe_load(value)})
    except yaml.YAMLError:
        raise ValueError(f"--default {change!r}: the value is not yaml") from None
