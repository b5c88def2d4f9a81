"""The command `ldm page` as a file of a clone: see ldm/commands/page.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("page")
