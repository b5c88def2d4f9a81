"""The command `ldm textual_inversion` as a file of a clone: see ldm/commands/textual_inversion.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("textual_inversion")
