"""benchmarks/emoji_sheet.py: starred prompts are of held-out icons, and the sheet is drawn."""

from PIL import Image

from benchmarks import emoji_sheet
from ldm.data.emoji import HELD_OUT_NAMES
from ldm.data.emoji_captions import STYLES, TONES


def test_starred_prompts_name_held_out_icons():
    held_out = HELD_OUT_NAMES.read_text().split()
    starred = {prompt: name for prompt, name in emoji_sheet.PROMPTS.items() if name is not None}
    assert len(starred) >= 6 and {*starred.values()} <= {*held_out}
    for prompt, name in starred.items():
        package, icon = name.split(":")
        words = prompt.replace(" skin", "").replace("with ", "").split()
        assert STYLES[package] in words and {*words} & {*TONES}
        said = icon.removesuffix("-skin-tone")
        tone = next(tone for tone in sorted(TONES, key=len, reverse=True) if said.endswith(f"-{tone}"))
        assert tone in words and " ".join(said.removesuffix(f"-{tone}").split("-")) in prompt


def test_the_sheet(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    emoji_sheet.main(["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--steps", "1", "--out", str(out)])
    columns = emoji_sheet.COLUMNS
    with Image.open(out) as sheet:
        side = sheet.width // columns
        assert sheet.width >= columns * 64 and sheet.height >= len(emoji_sheet.PROMPTS) / columns * side / 2
    assert capsys.readouterr().out.strip() == str(out)
