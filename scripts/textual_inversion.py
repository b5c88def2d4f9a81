"""Learn a word for a subject from three to five images; the model itself stays as it is.

python scripts/textual_inversion.py --train_data_dir images/mine --placeholder_token "<mine>" \\
    --initializer_token five --output_dir outputs/mine
python scripts/txt2img.py --embedding outputs/mine/learned_embeds.safetensors --prompt "a handwritten digit <mine>"

What is not given is chosen by the checkpoint's size. Files: OUTPUT_DIR/learned_embeds.safetensors or what --format
says, contact_sheet.png, previews/ (above the subject's images, below drawn ones), metrics.jsonl, TensorBoard's file,
config.yaml, and what the run itself goes by: resume.pt until it is finished, then model.safetensors.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli import Parser, real, run, whole
from ldm.inference.options import add_checkpoint_options, loading_arguments

if TYPE_CHECKING:  # it imports torch
    from ldm.latent_diffusion import LatentDiffusion


class Defaults(NamedTuple):
    """What suits a model of some size."""

    steps: int
    batch_size: int
    vectors: int | None  # None: as many as the initial words are tokens
    rate: float  # learning rate, in deviations of the model's own token vectors
    lr_scheduler: str
    timesteps: Mapping[str, Any]
    shown: int  # images in a preview


# Small: measured on the digits model, whose first layer's vectors are small beside what its blocks add to them, so
# that words have far to go. Large: for Stable Diffusion's own encoders 0.3 is about CompVis's rate, 0.005.
DEFAULTS = {
    "small": Defaults(500, 16, 16, 40.0, "linear", {"name": "logit_normal", "mean": 1.0}, 8),
    "large": Defaults(3000, 4, None, 0.3, "constant", {"name": "uniform"}, 4),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those that are left None are chosen by the checkpoint's size."""
    parser = Parser(description=__doc__)
    add_checkpoint_options(parser.add_argument_group("model"), "--pretrained_model_name_or_path")
    add = parser.add_argument_group("subject").add_argument
    add("--train_data_dir", type=Path, required=True, metavar="DIR", help="the subject's images")
    add("--placeholder_token", required=True, metavar="WORD", help="what to call it: '<mine>'")
    add("--initializer_token", required=True, metavar="TEXT", help="what it is like, in words that the model knows")
    add("--num_vectors", type=whole(1), metavar="N", help="tokens that the word is")
    add("--learnable_property", choices=("object", "style"), help="what the images share (object)")
    add("--templates", type=Path, metavar="FILE", help="captions of one's own, one a line, with {} for the word")
    add("--resolution", type=whole(1), metavar="PIXELS", help="side of the squares to train on (the model's own)")
    add = parser.add_argument_group("training").add_argument
    add("--max_train_steps", type=whole(1), metavar="N", help="optimizer steps")
    add("--train_batch_size", type=whole(1), metavar="N", help="images at a time")
    add("--learning_rate", type=real(0), metavar="RATE", help="how far a step moves a vector's numbers")
    add("--lr_scheduler", choices=("constant", "linear", "cosine"), help="how the rate falls")
    add("--lr_warmup_steps", type=whole(0), default=0, metavar="N", help="(0)")
    add("--pull", type=real(0), default=0.0, metavar="X", help="weight of the distance to the initial words (0)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of everything (0)")
    add("--gradient_accumulation_steps", type=whole(1), default=1, metavar="N", help="batches to an optimizer step (1)")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    precisions = ("auto", "fp32", "no", "bf16", "fp16")
    add("--mixed_precision", choices=precisions, default="auto", help="auto: bf16 where it is fast")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("outputs/textual_inversion"), metavar="DIR", help="(outputs/...)")
    add(
        "--format",
        nargs="+",
        choices=("diffusers", "a1111", "compvis"),
        default=["diffusers"],
        help="learned_embeds.safetensors, WORD.pt, embeddings.pt (diffusers, which all of today's programs read)",
    )
    add("--checkpointing_steps", type=whole(1), default=500, metavar="N", help="steps between saved states (500)")
    add("--validation_steps", type=whole(1), default=100, metavar="N", help="steps between previews (100)")
    add("--num_validation_images", type=whole(1), metavar="N", help="in a preview")
    add("--report_to", choices=("tensorboard", "none"), default="tensorboard", help="metrics.jsonl is always written")
    add(
        "--resume_from_checkpoint",
        "--resume",
        nargs="?",
        const="latest",
        metavar="DIR",
        help="go on with the run in OUTPUT_DIR (latest), or with a copy of that in another folder",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    frames = args.learnable_property if args.templates is None else read_templates(args.templates)
    import ldm
    from ldm.finetune.dreambooth_run import check_apart, move_in, notes_on_images
    from ldm.finetune.embeddings import text_encoder
    from ldm.finetune.textual_inversion import captions, check_model
    from ldm.training.loop import loop_settings, train
    from ldm.training.processes import processes

    check_apart(args.train_data_dir, args.output_dir / "previews")
    notes = notes_on_images(args.train_data_dir)
    resume, these = args.resume_from_checkpoint is not None, processes(args.device)
    if resume and these.is_main_process:
        move_in(args.resume_from_checkpoint, args.output_dir)
    these.wait_for_everyone()
    loading = loading_arguments(args)
    model = ldm.load(args.ckpt, device="cpu", **loading)
    check_model(model)
    for note in [*notes, *model.notes]:
        print(f"note: {note}", file=sys.stderr)
    config = make_config(args, model, frames, loading)
    loop_settings(config)  # raises for bad ones
    (prompt, *_) = captions(text_encoder(model).tokenizer, args.placeholder_token, 1, frames)
    del model  # the run has its own
    result = train(config, resume, args.device)
    if these.is_main_process:
        write(result, args, config["loop"]["steps"], prompt)


def make_config(
    args: argparse.Namespace, model: "LatentDiffusion", frames: str | list[str] | None, loading: dict[str, Any]
) -> dict[str, Any]:
    """The run's configuration for `ldm.training.loop.train`."""
    from ldm.finetune.dreambooth_run import SMALL, training_size
    from ldm.finetune.embeddings import deviation, text_encoder
    from ldm.generation import given

    size = "small" if sum(parameter.numel() for parameter in model.model.parameters()) < SMALL else "large"
    default, output, side = DEFAULTS[size], args.output_dir.resolve(), training_size(args, model)
    steps = given(args.max_train_steps, default.steps)
    stage = {
        "word": args.placeholder_token,
        "initial": args.initializer_token,
        "resolution": side,
        "ckpt": None if args.ckpt is None else str(args.ckpt.resolve()),
        "loading": loading,
        "vectors": given(args.num_vectors, default.vectors),
        "learning_rate": given(args.learning_rate, default.rate * deviation(text_encoder(model))),
        "frames": frames,
        "pull": args.pull,
        "timesteps": dict(default.timesteps),
        "gradient_checkpointing": args.gradient_checkpointing,
        "previews": given(args.num_validation_images, default.shown),
        "sheet": str(output / "contact_sheet.png"),
    }
    data = {
        "root": str(args.train_data_dir.resolve()),
        "size": side,
        "channels": model.image_channels,
        "caption": "",
    }
    loop = {
        "steps": steps,
        "batch_size": given(args.train_batch_size, default.batch_size),
        "accumulate": args.gradient_accumulation_steps,
        "precision": "fp32" if args.mixed_precision == "no" else args.mixed_precision,
        "ema": 0.0,
        "lr_schedule": {"name": given(args.lr_scheduler, default.lr_scheduler), "warmup": args.lr_warmup_steps},
        "log_every": min(50, max(1, steps // 10)),
        "preview_every": args.validation_steps,
        "save_every": args.checkpointing_steps,
        "tensorboard": args.report_to == "tensorboard",
    }
    return {
        "name": output.name,
        "outdir": str(output.parent),
        "seed": args.seed,
        "stage": {"target": "ldm.finetune.textual_inversion.TextualInversionStage", "params": stage},
        "data": {"target": "ldm.data.folder.Folder", "params": data},
        "loop": loop,
    }


def write(result: Path, args: argparse.Namespace, steps: int, prompt: str) -> None:
    """Write the word in the formats asked for, and say where it is and how to draw with it."""
    from ldm.checkpoint.tensors import read_tensors
    from ldm.finetune.embedding_files import LearnedWord, write_words

    word = args.placeholder_token
    learned = LearnedWord(word, read_tensors(result).state[word], steps)
    stem = re.sub(r"[^\w.-]", "", word) or "word"  # A1111 calls a word by its file's name, where < and > may not be
    names = {"diffusers": "learned_embeds.safetensors", "a1111": f"{stem}.pt", "compvis": "embeddings.pt"}
    called = {"diffusers": word, "a1111": stem, "compvis": "*"}
    for format in args.format:
        path = args.output_dir / names[format]
        write_words(path, learned, format)
        said = "" if called[format] == word else f", where {format} calls it {called[format]}"
        print(f"{word}: {path} ({len(learned.vectors)} vectors){said}")
    print(f"contact sheet: {args.output_dir / 'contact_sheet.png'}")
    options = [] if args.ckpt is None else ["--ckpt", str(args.ckpt)]
    options += ["--embedding", str(args.output_dir / names[args.format[0]]), "--prompt", prompt]
    print(f"draw with it: python scripts/txt2img.py {shlex.join(options)}")


def read_templates(path: Path) -> list[str]:
    """The lines of a file. FileNotFoundError, or ValueError for a file that is no text."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


if __name__ == "__main__":
    run(main)
