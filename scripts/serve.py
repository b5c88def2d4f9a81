"""The command `ldm serve` as a file of a clone: see ldm/commands/serve.py."""

from ldm.__main__ import run_command

if __name__ == "__main__":
    run_command("serve")
