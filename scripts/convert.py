"""Rewrite a checkpoint, in another precision if asked.

python scripts/convert.py runs/digits/diffusion/model.safetensors digits.safetensors --dtype fp16
python scripts/convert.py model.safetensors other.safetensors --default scale=1.25 --default steps=20
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, run

DTYPES = ("fp32", "fp16", "bf16")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="a checkpoint")
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="where to write; an existing file is replaced at the end"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights in the file (fp32)")
    parser.add_argument(
        "--default", action="append", default=[], metavar="KEY=VALUE", help="change one of the model's own settings"
    )
    args = parser.parse_args(argv)

    import torch

    import ldm

    model = ldm.load(args.input, device="cpu")
    for change in args.default:
        set_default(model.defaults, change)
    ldm.save(model, args.output, {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype])
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


def set_default(defaults: dict, change: str) -> None:
    """Change one setting, `KEY=VALUE` with the value in yaml; ValueError for a key that models do not have."""
    import yaml

    key, equals, value = change.partition("=")
    if key not in defaults or not equals:
        raise ValueError(f"--default {change!r} must be KEY=VALUE with a key of {', '.join(defaults)}")
    try:
        defaults[key] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--default {change!r}: the value is not yaml") from None


if __name__ == "__main__":
    run(main)
