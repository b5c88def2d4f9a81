"""PNG files with a text: whole or not there, and read back."""

import pytest
from PIL import Image, PngImagePlugin

from ldm.inference.recipe import read_png_text, save_png

PICTURE = Image.linear_gradient("L").resize((32, 32))


@pytest.mark.parametrize("text", ["a five\nSteps: 20", "an ö", "五 🎨\nSteps: 1", "nul \0 and \r\n", ""])
def test_text_and_pixels_come_back(text, tmp_path):
    save_png(PICTURE, tmp_path / "a.png", text)
    assert read_png_text(tmp_path / "a.png") == text
    assert Image.open(tmp_path / "a.png").tobytes() == PICTURE.tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_web_ui_tools_find_the_text(tmp_path):
    save_png(PICTURE, tmp_path / "a.png", "a five\nSteps: 20")
    assert Image.open(tmp_path / "a.png").info == {"parameters": "a five\nSteps: 20"}
    assert b"tEXtparameters\0a five\nSteps: 20" in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    save_png(PICTURE, tmp_path / "a.png", "old")

    def half(self, file, **options):
        file.write(b"\x89PNG half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(type(error)):
        save_png(PICTURE, tmp_path / "a.png", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert read_png_text(tmp_path / "a.png") == "old"


def test_files_without_a_text_are_refused(tmp_path):
    PICTURE.save(tmp_path / "plain.png")
    PICTURE.save(tmp_path / "a.jpg")
    (tmp_path / "empty.png").touch()
    save_png(PICTURE, tmp_path / "whole.png", "text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, message in [
        ("plain.png", "carries no text chunk 'parameters'"),
        ("a.jpg", "not a PNG image"),
        ("empty.png", "not a PNG image"),
        ("cut.png", "not a PNG image"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_png_text(tmp_path / name)
    with pytest.raises(OSError):
        read_png_text(tmp_path / "missing.png")


def test_compressed_text_of_another_program_reads(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "a 五", zip=True)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)
    assert read_png_text(tmp_path / "a.png") == "a 五"
