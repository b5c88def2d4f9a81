"""Teach a model a subject from three to five images, and keep what it knew.

python scripts/dreambooth.py --instance_data_dir images/mine --instance_prompt "a sks five" \\
    --class_prompt "a handwritten digit five" --output_dir outputs/mine
python scripts/txt2img.py --ckpt outputs/mine/model.safetensors --prompt "a sks five"

With --class_prompt, images of the class, which the model draws before it is tuned, keep the class as it is. For
several subjects give --instance_data_dir, --instance_prompt and --class_prompt once for each, in the same order. A
image's own caption (NAME.txt, NAME.caption, metadata.jsonl) goes before --instance_prompt. What is not given is
chosen by the checkpoint's size. Files: OUTPUT_DIR/model.safetensors, contact_sheet.png, previews/, class/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import Parser, real, run, whole
from ldm.inference.options import add_checkpoint_options, loading_arguments

if TYPE_CHECKING:
    from ldm.finetune.dreambooth_run import Subject
    from ldm.latent_diffusion import LatentDiffusion


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those that are left None are chosen by the checkpoint's size."""
    parser = Parser(description=__doc__)
    add_checkpoint_options(parser.add_argument_group("model"), "--pretrained_model_name_or_path")
    add_data(parser.add_argument_group("subjects"))
    add_training(parser.add_argument_group("training"))
    add_memory(parser.add_argument_group("speed and memory"))
    add_output(parser.add_argument_group("output"))
    return parser.parse_args(argv)


def add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--instance_data_dir", type=Path, action="append", default=[], metavar="DIR", help="the subject's images")
    add("--instance_prompt", action="append", default=[], metavar="TEXT", help="what they show: 'a sks dog'")
    add(
        "--class_prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what the subject is one of: 'a dog'; with choices, all of which are kept: 'a {dog|cat} {|in snow}'",
    )
    add(
        "--class_data_dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="images of the class; what is missing to --num_class_images is drawn there (OUTPUT_DIR/class)",
    )
    add(
        "--keep_prompt",
        action="append",
        metavar="TEXT",
        help="what else is to be kept: as many images of all these are drawn as of the class; '': nothing "
        "(the digits, by the model that ships; else nothing)",
    )
    add("--with_prior_preservation", action="store_true", help="implied by --class_prompt")
    add("--prior_loss_weight", type=real(0), default=1.0, metavar="LAMBDA", help="of the class images; 0: none (1)")
    add("--num_class_images", type=whole(1), metavar="N", help="of each subject")
    add("--class_guidance_scale", type=real(0), metavar="SCALE", help="guidance that they are drawn with")
    add("--sample_batch_size", type=whole(1), metavar="N", help="class images drawn at a time")
    add("--resolution", type=whole(1), metavar="PIXELS", help="side of the squares to train on (the model's own)")
    add("--crop", choices=("center", "random"), default="center", help="which part of images that are not square")
    add("--center_crop", dest="crop", action="store_const", const="center", help="the same as --crop center")
    add(
        "--enable_bucket",
        "--buckets",
        dest="buckets",
        action="store_true",
        help="cut the subject's images to the nearest of several shapes of about as many pixels, not to squares",
    )
    add("--random_flip", action="store_true", help="mirror half of the images")


def add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max_train_steps", type=whole(1), metavar="N", help="optimizer steps")
    add("--train_batch_size", type=whole(1), metavar="N", help="pairs of a subject's and a class image at a time")
    add("--learning_rate", type=real(0), metavar="RATE", help="of the UNet")
    add("--lr_scheduler", choices=("constant", "linear", "cosine"), help="how the rates fall, from the start on")
    add("--lr_warmup_steps", type=whole(0), default=0, metavar="N", help="(0)")
    add(
        "--train_text",
        choices=("none", "words", "all"),
        help="of the text encoder: nothing, the vectors of the words that name the subject, or all of it",
    )
    add("--train_text_encoder", dest="train_text", action="store_const", const="all", help="the same as all")
    add("--text_encoder_lr", type=real(0), metavar="RATE", help="learning rate of what --train_text says")
    add(
        "--train_layers",
        default="all",
        metavar="NAME",
        help="of the UNet: all, attention, cross-attention, key-value, or a regular expression for their names (all)",
    )
    add("--rank", type=whole(1), metavar="N", help="LoRA: train small matrices, for OUTPUT_DIR/lora.safetensors")
    add("--lora_alpha", type=real(0), metavar="X", help="their change is multiplied by alpha / rank (the rank)")
    add(
        "--lora_targets",
        nargs="+",
        metavar="NAME",
        help="attention, text, feed_forward, text_feed_forward, projection, convolution, or regular expressions",
    )
    add("--lora_format", choices=("kohya", "peft"), default="kohya", help="how the file names its layers (kohya)")
    add("--snr_gamma", type=real(0), metavar="GAMMA", help="weigh each image's loss by min-SNR; the paper takes 5")
    add("--noise_offset", type=real(0), default=0.0, metavar="X", help="noise that is the same all over a channel (0)")
    add("--offset_noise", dest="noise_offset", action="store_const", const=0.1, help="the same as --noise_offset 0.1")
    add("--use_ema", action="store_true", help="the result is an average of the weights over the last steps")
    add("--ema_decay", type=real(0), default=0.99, metavar="X", help="of that average (0.99)")
    add("--max_grad_norm", type=real(0), default=1.0, metavar="X", help="gradients are clipped to it (1)")
    add("--adam_beta1", type=real(0), default=0.9, metavar="X", help="(0.9)")
    add("--adam_beta2", type=real(0), default=0.999, metavar="X", help="(0.999)")
    add("--adam_weight_decay", type=real(0), default=0.01, metavar="X", help="(0.01)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of everything but the class images (0)")


def add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gradient_accumulation_steps", type=whole(1), default=1, metavar="N", help="batches to an optimizer step (1)")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    precisions = ("auto", "fp32", "no", "bf16", "fp16")
    add("--mixed_precision", choices=precisions, default="auto", help="auto: bf16 where it is fast")
    add("--optimizer", choices=("adamw", "adamw8bit", "adafactor"), default="adamw", help="the last two are small")
    add("--use_8bit_adam", dest="optimizer", action="store_const", const="adamw8bit", help="--optimizer adamw8bit")
    add("--no_cache", dest="cache", action="store_false", help="encode images and texts anew at every step")
    add("--dataloader_num_workers", type=whole(0), default=0, metavar="N", help="(0)")


def add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", type=Path, default=Path("outputs/dreambooth"), metavar="DIR", help="(outputs/dreambooth)")
    add("--checkpointing_steps", type=whole(1), default=500, metavar="N", help="steps between saved states (500)")
    add(
        "--resume_from_checkpoint",
        "--resume",
        nargs="?",
        const="latest",
        metavar="DIR",
        help="go on with the run in OUTPUT_DIR (latest), or with a copy of that in another folder",
    )
    add("--validation_prompt", action="append", default=[], metavar="TEXT", help="to preview (subjects', classes')")
    add("--num_validation_images", type=whole(1), metavar="N", help="of each prompt")
    add("--validation_steps", type=whole(1), default=100, metavar="N", help="steps between previews (100)")
    add("--report_to", choices=("tensorboard", "none"), default="tensorboard", help="metrics.jsonl is always written")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.mixed_precision == "no":  # accelerate's and diffusers' word
        args.mixed_precision = "fp32"
    import ldm
    from ldm.finetune.dreambooth import check_model
    from ldm.finetune.dreambooth_run import add_class_images, make_config, move_in, notes_on, subjects
    from ldm.training.loop import loop_settings, train
    from ldm.training.processes import processes

    found, resume, these = subjects(args), args.resume_from_checkpoint is not None, processes(args.device)
    if resume and these.is_main_process:
        move_in(args.resume_from_checkpoint, args.output_dir)
    these.wait_for_everyone()
    loading = loading_arguments(args)
    model = ldm.load(args.ckpt, device=args.device, **loading)
    check_model(model)
    for note in [*model.notes, *(note for subject in found for note in notes_on(subject, model))]:
        print(f"note: {note}", file=sys.stderr)
    config = make_config(args, model, found, loading, these.num_processes)
    loop_settings(config)  # raises for bad ones, before the class images are drawn
    with these.main_process_first():  # it draws what the others then find
        add_class_images(config, found, class_images(args, model, found))
    del model  # the run has its own
    train(config, resume, args.device)
    if these.is_main_process:
        names = ["model.safetensors"] if args.rank is None else ["model.safetensors", "lora.safetensors"]
        for path in (args.output_dir / name for name in names):
            print(f"{path.stem}: {path} ({path.stat().st_size:,} bytes)")
        print(f"contact sheet: {args.output_dir / 'contact_sheet.png'}")


def class_images(args: argparse.Namespace, model: "LatentDiffusion", found: "list[Subject]") -> list[dict[str, str]]:
    """Which files of each subject's class folder to train on, with their captions, drawn where they are missing."""
    from ldm.data.dreambooth import choices
    from ldm.finetune.dreambooth_run import class_prompts, defaults_for, training_size
    from ldm.finetune.known import known_prompts
    from ldm.generation import given
    from ldm.inference.class_images import Class, collect

    default, size = defaults_for(model), training_size(args, model)
    scale = given(args.class_guidance_scale, default.class_scale)
    batch_size = given(args.sample_batch_size, default.sample_batch_size)
    keep, known = args.keep_prompt, known_prompts(model.cond_stage_model.tokenizer)
    if keep is not None:
        keep = [prompt for one in keep if one for prompt in choices(one)]
    classes = [
        Class(one.class_dir, class_prompts(one) if args.prior_loss_weight else [], args.num_class_images, keep)
        for one in found
    ]
    return collect(model, classes, default.class_images, size, scale, batch_size, known)


if __name__ == "__main__":
    run(main)
