"""The command `ldm img2img` as a file of a clone: see ldm/commands/img2img.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("img2img")
