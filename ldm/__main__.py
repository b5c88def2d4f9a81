"""The command line: `ldm COMMAND ...`, or `python -m ldm COMMAND ...`. Each command is a module of ldm/commands."""

import sys
from importlib import import_module
from typing import NoReturn

from ldm import __version__
from ldm.cli import Parser
from ldm.program import run

SUMMARIES = {
    "txt2img": "generate images from text",
    "img2img": "generate images from an init image, guided by text",
    "inpaint": "generate parts of an image anew",
    "edit": "edit images by their prompts; show what words attend to",
    "interpolate": "generate images between two prompts or seeds, as a GIF and a grid",
    "sample": "generate images with class-conditional or unconditional models",
    "train": "train the stages that configurations describe",
    "dreambooth": "teach a model a subject from a few images",
    "textual_inversion": "learn a word for a subject from a few images",
    "evaluate": "measure a model",
    "doctor": "examine a run whose samples are noise",
    "convert": "rewrite a model in another format or precision",
    "serve": "show a web page on this machine, over any checkpoints",
    "page": "write a web page on which models run in the browser",
    "shards": "write a folder of images as tar shards",
}
FAST_EXIT = {"txt2img", "img2img", "inpaint", "edit", "interpolate", "sample"}  # these have closed what they opened


def run_command(name: str) -> NoReturn:
    """Run a command with the options of `sys.argv`, and end the process."""
    run(import_module(f"ldm.commands.{name}").main, fast_exit=name in FAST_EXIT)


def main() -> NoReturn:
    """Run the command that the first argument names, with the options that follow it."""
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:{width}}  {text}" for name, text in SUMMARIES.items()]
    parser = Parser(prog="ldm", description="\n".join(["Latent diffusion with text. Commands:", "", *lines]))
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=SUMMARIES, metavar="COMMAND", help="`ldm COMMAND --help` lists its options")
    name = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"ldm {name}", *sys.argv[2:]]  # the name that messages and --help use
    run_command(name)


if __name__ == "__main__":
    main()
