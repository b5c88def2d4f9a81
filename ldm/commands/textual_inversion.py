"""Learn a word for a subject from three to five images; the model itself stays as it is.

ldm textual_inversion --train_data_dir images/mine --placeholder_token "<mine>" \\
    --initializer_token five --output_dir outputs/mine
ldm txt2img --embedding outputs/mine/learned_embeds.safetensors --prompt "a handwritten digit <mine>"

What is not given is as in configs/finetune/textual_inversion.yaml, or textual_inversion_large.yaml for a model of the
size of Stable Diffusion. Files: OUTPUT_DIR/learned_embeds.safetensors or what --format says, contact_sheet.png,
previews/ (above the subject's images, below generated ones), metrics.jsonl, TensorBoard's file, config.yaml, and those
that the run itself needs: resume.pt and, when it is finished, model.safetensors.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, absolute_path, finite_float, int_range
from ldm.finetune.flags import MEMORY, OBJECTIVE, OUTPUT, TRAINING, add_flags, begin, choose, number
from ldm.inference.input_lines import read_lines
from ldm.inference.options import add_checkpoint_options, loading_arguments

# names, the yaml's key, how they are parsed, help
FLAGS = {
    "subject": [
        ("--train_data_dir", "data.params.root", {"type": absolute_path, "required": True, "metavar": "DIR"},
         "the subject's images"),
        ("--placeholder_token", "stage.params.word", {"required": True, "metavar": "WORD"}, "its name: '<mine>'"),
        ("--initializer_token", "stage.params.initial", {"required": True, "metavar": "TEXT"},
         "what it is like, in words that the model knows"),
        ("--num_vectors", "stage.params.vectors", number(int_range(1)), "tokens of the word"),
        ("--learnable_property", "stage.params.frames", choose(("object", "style")),
         "what the images share (object)"),
        ("--templates", "templates", {"type": Path, "default": None, "metavar": "FILE"},
         "captions of your own, one a line, with {} for the word"),
    ],
    "training": [
        *TRAINING,
        ("--train_batch_size", "loop.batch_size", number(int_range(1)), "images at a time"),
        ("--learning_rate", "stage.params.learning_rate", number(finite_float(0), "RATE"),
         "how far a step moves a vector's numbers"),
        ("--pull", "stage.params.pull", number(finite_float(0), "X"),
         "weight of the distance to the initial words (0)"),
        *OBJECTIVE,
        *MEMORY,
    ],
    "output": [
        ("--format", "format", {"nargs": "+", "choices": ("diffusers", "a1111", "compvis"), "default": ["diffusers"]},
         "learned_embeds.safetensors, WORD.pt, embeddings.pt (diffusers, which all of today's programs read)"),
        *OUTPUT,
        ("--num_validation_images", "stage.params.previews", number(int_range(1)), "in a preview"),
    ],
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options. FileNotFoundError, or ValueError, for templates that cannot be read."""
    parser = Parser(description=__doc__)
    add_checkpoint_options(parser.add_argument_group("model"), "--pretrained_model_name_or_path")
    add_flags(parser, FLAGS, output_dir=Path("outputs/textual_inversion"))
    args = parser.parse_args(argv)
    if args.templates is not None:
        if "stage.params.frames" in vars(args):
            raise ValueError("--learnable_property chooses captions, and --templates has your own: give one of them")
        vars(args)["stage.params.frames"] = read_lines(args.templates, "caption")
    if "stage.params.learning_rate" in vars(args):
        vars(args)["stage.params.relative_learning_rate"] = None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from ldm.finetune.embeddings import text_encoder
    from ldm.finetune.textual_inversion import captions
    from ldm.training.loop import train

    config, model, is_main = begin("textual_inversion", args, loading_arguments(args))
    stage = config["stage"]["params"]
    (prompt, *_) = captions(text_encoder(model).tokenizer, stage["word"], 1, stage["frames"])
    result = train(config, args.resume is not None, args.device, ckpt=model, loading=None)
    if is_main:
        write(result, stage["word"], args, config["loop"]["steps"], prompt)


def write(result: Path, word: str, args: argparse.Namespace, steps: int, prompt: str) -> None:
    """Write the word in the formats asked for, and print where it is and how to use it."""
    from ldm.checkpoint.tensors import read_tensors
    from ldm.finetune.embedding_files import LearnedWord, write_words

    learned = LearnedWord(word, read_tensors(result).state[word], steps)
    stem = re.sub(r"[^\w.-]", "", word) or "word"  # A1111 calls a word by its file's name, where < and > may not be
    names = {"diffusers": "learned_embeds.safetensors", "a1111": f"{stem}.pt", "compvis": "embeddings.pt"}
    called = {"diffusers": word, "a1111": stem, "compvis": "embeddings"}
    for format in args.format:
        path = args.output_dir / names[format]
        write_words(path, learned, format)
        said = "" if called[format] == word else f", which is {called[format]} by the file's name"
        print(f"{word}: {path} ({len(learned.vectors)} vectors){said}")
    print(f"contact sheet: {args.output_dir / 'contact_sheet.png'}")
    options = [] if args.ckpt is None else ["--ckpt", str(args.ckpt)]
    first = args.format[0]
    renamed = "" if called[first] == word else f"={word}"
    options += ["--embedding", f"{args.output_dir / names[first]}{renamed}", "--prompt", prompt]
    print(f"use it: ldm txt2img {shlex.join(options)}")
