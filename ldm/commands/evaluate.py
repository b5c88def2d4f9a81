"""Measure a model on handwritten digits, or on own images: one JSON (on standard output, or --out FILE) and one sheet.

ldm evaluate model --scale 1.5 --steps 20
ldm evaluate model --wording unseen --out unseen.json
ldm evaluate model --split heldout --scale 1.25   # to choose scale and steps by
ldm evaluate autoencoder --ckpt outputs/autoencoder/model.safetensors
ldm evaluate model --ckpt runs/folder/diffusion/model.safetensors --dataset images
ldm evaluate emoji --ckpt runs/emoji/diffusion/model.safetensors --n 100
ldm evaluate scenes --ckpt runs/scenes/joint/model.safetensors --scale 3
ldm evaluate bits --ckpt runs/pixel/ddpm/model.safetensors --n 100
ldm evaluate statistics --judge FILE --features FILE    # newly trained ones become those that ship
ldm evaluate subjects --outdir subjects    # images to try DreamBooth on: one/train, star/heldout ...
ldm evaluate dreambooth --ckpt outputs/one/model.safetensors --subject subjects/one \\
    --instance-prompt "a sks one" --class-prompt "a handwritten digit one" --digit 1

`model` generates an image for the caption of each real one, or for its class, as the model is conditioned; from an
unconditional model it samples as many. With MNIST at hand (--data, LDM_DATA or ./data) it also searches the training
images for copies, and `autoencoder` measures all test images instead of the 1,000 that ship. On a folder of own images,
half are the reference and half what real images reach: the Frechet distance is between pixels averaged to 8 x 8.
`emoji` asks for seen, held-out and rare icons; the judge of these images trains at first, in some three core-minutes.
`scenes` asks for seen and for held-out combinations of coloured digits, and needs MNIST.
`bits` takes its first images, and for a class-conditional model its sub-folders as the classes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import ALLOW, Parser, check_writable, device_name, int_range
from ldm.inference.options import add_model_options, add_settings

IMAGE = Path("outputs/evaluate.png")
SAMPLING = ("steps", "scale", "sampler", "spacing", "eta", "interval", "rescale")  # not given: the checkpoint's own
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
TEXT: dict[str, Any] = {"metavar": "TEXT", "required": True, "help": "as in training"}
# What several commands take.
SHARED: dict[str, dict[str, Any]] = {
    "--ckpt": FILE | {"help": "the checkpoint (digits, which ships)"},
    "--dataset": {
        **{"default": "mnist", "metavar": "NAME|DIR"},
        "help": "mnist, scikit-learn's digits, or a folder of own images, of which less can be measured (mnist)",
    },
    "--split": {"choices": ("test", "heldout"), "default": "test", "help": "heldout: the last training images (test)"},
    "--n": {"type": int_range(10), "metavar": "N", "help": "images (all: 10,000 of MNIST's test images)"},
    "--batch-size": {"type": int_range(1), "default": 100, "metavar": "N", "help": "images at a time (100)"},
    "--seed": {"type": int_range(0), "default": 0, "metavar": "N", "help": "seed of the first image's noise (0)"},
    "--device": {
        "default": "auto",
        "type": device_name,
        "metavar": "NAME",
        "help": "as of txt2img; figures: on the CPU",
    },
    "--out": FILE | {"help": "write the JSON there (standard output)"},
    "--image": FILE | {"help": f"write the sheet of images there ({IMAGE}, or beside --out)"},
    "--data": {"metavar": "ROOT", "help": "folder that holds MNIST/raw (LDM_DATA, else ./data)"},
    "--judge": FILE | {"help": "classifier (the one that ships)"},
    "--features": FILE | {"help": "feature network (the one that ships)"},
    "--allow": ALLOW,
}
MEASURED, NETWORKS = "--dataset --split --n --batch-size --out --image", "--data --judge --features"
# Command -> what it does, its shared options, and its own ones or what differs in the shared ones.
COMMANDS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "model": (
        "generate images for the captions of real ones, and measure them",
        f"{MEASURED} {NETWORKS} --seed",
        {"--wording": {"choices": ("seen", "unseen"), "default": "seen", "help": "captions as in training, or new"}},
    ),
    "autoencoder": ("measure what a first stage loses", f"--ckpt --device --allow {MEASURED} {NETWORKS}", {}),
    "emoji": (
        "generate images for captions of emoji, seen and held-out, and measure them",
        "--batch-size --seed --out --image",
        {
            "--data": {"metavar": "ROOT", "help": "folder of the emoji's packages (LDM_EMOJI, else ./data/emoji)"},
            "--cache": DIR
            | {
                "default": Path("runs/emoji/icons"),
                "help": "where rendered images and the judge are kept (runs/emoji/icons)",
            },
            "--n": {"default": 300, "help": "images of each kind (300)"},
            "--epochs": {
                "type": int_range(1),
                "default": 6,
                "metavar": "N",
                "help": "how often the judge sees the training images; fewer are quicker, and it errs more (6)",
            },
        },
    ),
    "scenes": (
        "generate scenes of coloured digits for seen and held-out combinations, and judge what is where",
        "--batch-size --seed --out --image --data --judge",
        {"--n": {"default": 200, "help": "images of each kind (200)"}},
    ),
    "bits": (
        "bits per dimension of test images, or of a folder's, under a diffusion model of pixels",
        "--dataset --data --batch-size --seed --device --allow --out",
        {
            "--ckpt": {"required": True, "help": "the model"},
            "--variance": {"metavar": "NAME", "help": "of a step: learned, small or large (the first that it has)"},
            "--n": {"type": int_range(2), "default": 100, "help": "images (100)"},
        },
    ),
    "statistics": (
        "measure MNIST's test images: what ldm/pretrained holds",
        NETWORKS,
        {"--outdir": DIR | {"help": "where the files go (ldm/pretrained)"}},
    ),
    "subjects": (
        "write images of subjects: MNIST's printed ones, and stars",
        NETWORKS,
        {"--outdir": DIR | {"default": Path("subjects"), "help": "where they go (subjects)"}},
    ),
    "dreambooth": (
        "measure what a model learnt of a subject, and what it forgot",
        "--batch-size --device --allow --out --image --judge --features",
        {
            "--ckpt": {"required": True, "help": "the tuned model"},
            "--before": FILE | {"help": "the model that it was (the digits model that ships)"},
            "--without": FILE | {"help": "what the same command gives with --prior_loss_weight 0"},
            "--embedding": {
                **{"action": "append", "default": [], "metavar": "FILE[=WORD]"},
                "help": "learned words of the tuned model; repeatable",
            },
            "--subject": DIR
            | {
                "required": True,
                "help": "folder of heldout/, images of the subject not trained on, "
                "and others/, of anything else (real digits that ship)",
            },
            "--instance-prompt": TEXT,
            "--class-prompt": TEXT,
            "--digit": {"type": int_range(0, 9), "metavar": "N", "help": "which digit the class is (none)"},
            "--n": {"default": 200, "help": "images of each kind (200)"},
        },
    ),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command and its options."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, shared, own) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for option in [*own, *shared.split()]:
            command.add_argument(option, **SHARED.get(option, {}) | own.get(option, {}))
        if "--image" in shared:
            command.add_argument("--picture", dest="image", type=Path, help=argparse.SUPPRESS)
        if name in ("model", "emoji", "scenes"):
            add_settings(command, *SAMPLING)
            add_model_options(command)
        if name == "model":
            text = "image half of the model's own CLIP, as configs/folder/clip.yaml leaves it: agreement with captions"
            command.add_argument("--clip", **FILE, help=f"{text} of DIR")
            command.add_argument("--classifier", **FILE, help="guide to the digits by this classifier of noisy images")
            add_settings(command, "classifier_scale")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = getattr(args, "out", None)
    check_writable(out)  # now, not after minutes of work
    if "image" in args:
        if args.image is None:
            args.image = IMAGE if out is None or (out.exists() and not out.is_file()) else out.with_suffix(".png")
        if out == args.image:
            raise ValueError(f"--out {out} is where the sheet of images would go: name a .json, or another --image")
        check_writable(args.image)
    from ldm.checkpoint.atomic import write_png, write_text
    from ldm.evaluation import commands  # the first to import torch: the options are good
    from ldm.evaluation.report import without_nan

    report, sheet = commands.COMMANDS[args.command](args)
    if sheet is not None:
        write_png(args.image, sheet)
        print(f"image: {args.image}", file=sys.stderr)
    if report is not None:
        text = json.dumps(without_nan(report), indent=2, ensure_ascii=False, allow_nan=False)
        print(text) if out is None else write_text(out, text + "\n")
