"""The command `ldm txt2img` as a file of a clone: see ldm/commands/txt2img.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("txt2img")
