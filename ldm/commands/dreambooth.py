"""Teach a model a subject from three to five images, and keep what it knew.

ldm dreambooth --instance_data_dir images/mine --instance_prompt "a sks five" \\
    --class_prompt "a handwritten digit five" --output_dir outputs/mine
ldm txt2img --ckpt outputs/mine/model.safetensors --prompt "a sks five"

With --class_prompt, images of the class, which the model generates before it is tuned, keep the class as it is. For
several subjects give --instance_data_dir, --instance_prompt and --class_prompt once for each, in the same order. An
image's own caption (NAME.txt, NAME.caption, metadata.jsonl) goes before --instance_prompt. Files:
OUTPUT_DIR/model.safetensors, contact_sheet.png, previews/, class/. What is not given is as in
configs/finetune/dreambooth.yaml, or dreambooth_large.yaml for a model of the size of Stable Diffusion.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, absolute_path, finite_float, int_range
from ldm.finetune.flags import (
    MEMORY,
    OBJECTIVE,
    OUTPUT,
    TRAINING,
    add_flags,
    begin,
    check_effects,
    choose,
    const,
    many,
    number,
)
from ldm.inference.options import add_checkpoint_options, loading_arguments

# names, the yaml's key, how they are parsed, help
FLAGS = {
    "subjects": [
        ("--instance_data_dir", "data.params.instance_data_dir", many(absolute_path, "DIR"), "the subject's images"),
        ("--instance_prompt", "data.params.instance_prompt", many(str, "TEXT"), "what they show: 'a sks dog'"),
        ("--class_prompt", "data.params.class_prompt", many(str, "TEXT"),
         "what the subject is one of: 'a dog'; with choices, all of which are kept: 'a {dog|cat} {|in snow}'"),
        ("--class_data_dir", "data.params.class_data_dir", many(absolute_path, "DIR"),
         "images of the class; those missing to --num_class_images are generated there (OUTPUT_DIR/class)"),
        ("--keep_prompt", "data.params.keep_prompt", many(str, "TEXT"),
         "what else is to be kept: as many images of all these are generated as of the class; '': nothing "
         "(the digits, by the model that ships; else nothing)"),
        ("--with_prior_preservation", "prior", const(True), "implied by --class_prompt"),
        ("--prior_loss_weight", "stage.params.prior_weight", number(finite_float(0), "LAMBDA"),
         "of the class images; 0: none (1)"),
        ("--num_class_images", "data.params.num_class_images", number(int_range(1)), "of each subject"),
        ("--class_guidance_scale", "data.params.class_guidance_scale", number(finite_float(0), "SCALE"),
         "of class images"),
        ("--sample_batch_size", "data.params.sample_batch_size", number(int_range(1)),
         "class images generated at a time"),
        ("--crop", "data.params.crop", choose(("center", "random")),
         "which part of images that are not square (center)"),
        ("--center_crop", "data.params.crop", const("center"), "the same as --crop center"),
        ("--enable_bucket --buckets", "data.params.buckets", const(True),
         "cut the subject's images to the nearest of several shapes of about as many pixels, not to squares"),
        ("--random_flip", "data.params.flip", const(True), "mirror half of the images"),
        ("--mask", "data.params.mask", choose(("file", "alpha")),
         "train on parts of the subject's images only: white in NAME.mask.png beside NAME.png, or opaque ones"),
    ],
    "training": [
        *TRAINING,
        ("--train_batch_size", "loop.batch_size", number(int_range(1)),
         "pairs of a subject's and a class image at a time"),
        ("--learning_rate", "stage.params.learning_rate", number(finite_float(0), "RATE"), "of the UNet"),
        ("--train_text", "stage.params.train_text", choose(("none", "words", "all")),
         "of the text encoder: nothing, the vectors of the words that name the subject, or all of it"),
        ("--train_text_encoder", "stage.params.train_text", const("all"), "the same as --train_text all"),
        ("--text_encoder_lr", "stage.params.text_learning_rate", number(finite_float(0), "RATE"),
         "learning rate of what --train_text says"),
        ("--train_layers", "stage.params.layers", {"metavar": "NAME"},
         "of the UNet: all, attention, cross-attention, key-value, or a regular expression for their names (all)"),
        ("--rank", "stage.params.lora.rank", number(int_range(1)),
         "LoRA: train small matrices, for OUTPUT_DIR/lora.safetensors"),
        ("--lora_alpha", "stage.params.lora.alpha", number(finite_float(0), "X"),
         "their change is multiplied by alpha / rank (the rank)"),
        ("--lora_targets", "stage.params.lora.targets", {"nargs": "+", "metavar": "NAME"},
         "attention, text, feed_forward, text_feed_forward, projection, convolution, or regular expressions"),
        ("--merge_lora", "stage.params.merge", choose({"yes": True, "no": False}),
         "write the model too, with the matrices in its weights (yes for models under 50 million weights, else no)"),
        ("--lora_format", "stage.params.lora_format", choose(("kohya", "peft")),
         "how the file names its layers (kohya)"),
        *OBJECTIVE,
        ("--use_ema", "use_ema", const(True), "the result is an average of the weights over the last steps"),
        ("--ema_decay", "loop.ema", number(finite_float(0), "X"), "of that average (0.99)"),
        ("--max_grad_norm", "loop.clip", number(finite_float(0), "X"), "gradients are clipped to it (1)"),
        ("--adam_beta1", "stage.params.betas.0", number(finite_float(0), "X"), "(0.9)"),
        ("--adam_beta2", "stage.params.betas.1", number(finite_float(0), "X"), "(0.999)"),
        ("--adam_weight_decay", "stage.params.weight_decay", number(finite_float(0), "X"), "(0.01)"),
    ],
    "speed and memory": [
        *MEMORY,
        ("--optimizer", "stage.params.optimizer", choose(("adamw", "adamw8bit", "adafactor")),
         "the last two take less memory (adamw)"),
        ("--use_8bit_adam", "stage.params.optimizer", const("adamw8bit"), "the same as --optimizer adamw8bit"),
        ("--no_cache", "stage.params.cache", const(False), "encode images and texts anew at every step"),
        ("--dataloader_num_workers", "loop.workers", number(int_range(0)), "(0)"),
    ],
    "output": [
        *OUTPUT,
        ("--validation_prompt", "stage.params.previews", many(str, "TEXT"), "to preview (subjects', classes')"),
        ("--num_validation_images", "stage.params.preview_columns", number(int_range(1)), "of each prompt"),
    ],
}  # fmt: skip


WEIGHT, PROMPT, RANK = "stage.params.prior_weight", "data.params.class_prompt", "stage.params.lora.rank"
OF_CLASS_IMAGES = ("prior", *(f"data.params.{name}" for name in (
    "class_data_dir", "keep_prompt", "num_class_images", "class_guidance_scale", "sample_batch_size"
)))  # fmt: skip
# What `check_effects` takes: which flags have an effect when, and what is said otherwise.
RULES = [
    ((*OF_CLASS_IMAGES, WEIGHT), lambda given: PROMPT in given,
     "prior preservation needs --class_prompt: what the subject is one of ('a photo of a dog')"),
    (OF_CLASS_IMAGES, lambda given: given.get(WEIGHT) != 0, "--prior_loss_weight 0 uses no class images"),
    ([f"stage.params.{name}" for name in ("lora.alpha", "lora.targets", "lora_format", "merge")],
     lambda given: RANK in given, "LoRA needs --rank"),
    (("stage.params.betas.0", "stage.params.betas.1"),
     lambda given: given.get("stage.params.optimizer") != "adafactor", "--optimizer adafactor has no betas"),
]  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; ValueError for those that do not fit together."""
    parser = Parser(description=__doc__)
    add_checkpoint_options(parser.add_argument_group("model"), "--pretrained_model_name_or_path")
    add_flags(parser, FLAGS, output_dir=Path("outputs/dreambooth"))
    args = parser.parse_args(argv)
    given = vars(args)
    if "use_ema" in given:
        given.setdefault("loop.ema", 0.99)
    check_effects(given, FLAGS, RULES)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from ldm.data.dreambooth import as_list, words_and_prompts
    from ldm.finetune.parts import choose_text
    from ldm.training.loop import train

    config, model, is_main = begin("dreambooth", args, loading_arguments(args))
    stage = config["stage"]["params"]
    words, _ = words_and_prompts(stage["instance_prompt"], stage["class_prompt"])
    text = choose_text(stage["train_text"], words, stage["lora"] is not None)
    if text == "none" and "stage.params.text_learning_rate" in vars(args):
        raise ValueError("--text_encoder_lr is of no use: choose what to train by --train_text words or all")
    train(config, args.resume is not None, args.device, ckpt=model, loading=None)
    if is_main:
        merged = [] if stage["lora"] is not None and not stage["merge"] else ["model.safetensors"]
        names = merged if stage["lora"] is None else [*merged, "lora.safetensors"]
        names += ["resume.pt"] if config["loop"].get("keep_state", True) else []
        for file in (args.output_dir / name for name in names):
            print(f"{file.stem}: {file} ({file.stat().st_size:,} bytes)")
        if not merged:
            options = [] if args.ckpt is None else ["--ckpt", str(args.ckpt)]
            options += [
                "--lora",
                str(args.output_dir / "lora.safetensors"),
                "--prompt",
                as_list(stage["instance_prompt"])[0],
            ]
            print(f"use it: ldm txt2img {shlex.join(options)}")
        print(f"contact sheet: {args.output_dir / 'contact_sheet.png'}")
