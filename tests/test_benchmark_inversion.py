"""The benchmark of inversion: its rows, its table, and that the file of rows goes on where it stopped."""

import json

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from benchmarks import inversion


def test_rows_go_on_where_they_stopped(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    levels = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    images = [Image.fromarray(one) for one in levels]
    monkeypatch.setattr(inversion, "examples", lambda dataset, root, n: (images, ["five", "ab"]))
    out = tmp_path / "rows.jsonl"
    command = ["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--out", str(out), "--n", "2", "--steps", "3"]
    inversion.main([*command, "--kinds", "one correction", "guided"])
    first = out.read_text()
    inversion.main(command)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_text().startswith(first) and [row["kind"] for row in rows][:2] == ["one correction", "guided"]
    assert sorted(row["kind"] for row in rows) == sorted(inversion.KINDS)
    assert len({row["error"] for row in rows}) == 4 and len({row["first_stage"] for row in rows}) == 1
    table = capsys.readouterr().out.splitlines()[-7:]
    assert table[0] == "|  | 3 steps |" and table[2] == f"| one correction | {rows[0]['error']:.4f} |"
    assert table[-1] == f"| first stage alone | {rows[0]['first_stage']:.4f} |"
    refused("rows.jsonl has rows of 2 images each", inversion.main, [*command, "--n", "3"])


def test_examples_are_spaced_evenly(tmp_path, monkeypatch):
    from test_mnist import idx, make_images

    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    data, labels = make_images(20)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(data))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    images, prompts = inversion.examples("mnist", str(tmp_path), 4)
    assert [image.size for image in images] == [(32, 32)] * 4 and all(isinstance(text, str) for text in prompts)
    assert (np.asarray(images[1])[2:30, 2:30] == data[5]).all()
    assert pytest.approx(np.asarray(images[3])[2:30, 2:30]) == data[15]
