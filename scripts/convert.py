"""The command `ldm convert` as a file of a clone: see ldm/commands/convert.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("convert")
