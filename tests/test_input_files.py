"""Files that a user writes: lists of lines, and texts that a configuration gives back."""

import os
from pathlib import Path

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ldm.inference.input_lines import read_lines
from ldm.input_files import escaped


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa five\r\n\r\n   \n  an ö  \n".encode())
    assert read_lines(path, "prompt") == ["a five", "an ö"]
    for content, message in (
        (b"", "prompts.txt holds no prompt"),
        (b"\n \n\t\r\n", "prompts.txt holds no prompt"),
        (b"\xff\xfe\x00a", "not UTF-8 text"),
    ):
        path.write_bytes(content)
        refused(message, read_lines, path, "prompt")
    with pytest.raises(OSError):
        read_lines(tmp_path / "missing.txt", "prompt")


def test_lines_come_from_what_ends(tmp_path):
    """A pipe with a writer is read; one without is not waited for; a device is not read for ever."""
    os.mkfifo(tmp_path / "pipe")
    refused("pipe holds no prompt", read_lines, tmp_path / "pipe", "prompt")
    refused("/dev/zero has more than 256 MiB", read_lines, Path("/dev/zero"), "prompt")
    read, write = os.pipe()
    os.write(write, b"a one\n")
    os.close(write)
    assert read_lines(Path(f"/dev/fd/{read}"), "prompt") == ["a one"]
    os.close(read)


@given(st.text("$}{\\:ab'\" \n", max_size=12))
def test_an_escaped_text_resolves_to_itself(text):
    config = OmegaConf.create({"a": 1, "x": escaped([text, {"y": text}])})
    assert OmegaConf.to_container(config, resolve=True)["x"] == [text, {"y": text}]
    refused("is not UTF-8 text", escaped, [text + "\udcff"])
