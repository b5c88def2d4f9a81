"""`ldm page`, and its page in a headless Chromium: the images are Python's, and nothing is loaded from elsewhere."""

import json
import os
import shutil
import tarfile
import time
from base64 import b64decode
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import refused
from PIL import Image

import ldm
from ldm.commands import page as command
from ldm.commands.page import ARCHIVE, RUNTIME
from ldm.commands.page import main as write_page
from ldm.commands.txt2img import main as txt2img
from ldm.editing import attention_maps, overlay
from ldm.onnx.export import NEEDED

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
RUNTIME_FILE = os.environ.get("LDM_ONNXRUNTIME_WEB", ARCHIVE)
wanting = [name for name in (*NEEDED, "playwright") if find_spec(name) is None]
wanting += ["chromium"] * (BROWSER is None) + [f"LDM_ONNXRUNTIME_WEB={ARCHIVE}"] * (not Path(RUNTIME_FILE).is_file())
with_browser = pytest.mark.skipif(bool(wanting), reason=f"for the page in a browser there is no {', '.join(wanting)}")
PATIENCE = 120_000  # milliseconds


def served(folder: Path) -> ThreadingHTTPServer:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page"
    examples = ["--example", "a five", "--example", "a (six:1.3)"]
    write_page([str(path), "--ckpt", str(tiny_checkpoint), "--runtime", RUNTIME_FILE, *examples])
    return path


class Visit:
    """A page that is open, and what went wrong on it."""

    def __init__(self, browser, place: Path | str, **options):
        self.server = served(place) if isinstance(place, Path) else None
        self.address = place if self.server is None else f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page(**options)
        self.problems, self.requests = [], []
        self.page.on("console", lambda said: self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self):
        self.page.goto(self.address)
        return self

    def __exit__(self, *error):
        self.page.close()
        if self.server is not None:
            self.server.shutdown()

    def image(self, tmp_path: Path) -> Path:
        """Download the image that is shown, once it is complete."""
        self.page.wait_for_selector("#result[data-complete]", timeout=PATIENCE)
        with self.page.expect_download() as download:
            self.page.click("#download")
        path = tmp_path / "download.png"
        download.value.save_as(path)
        return path


def check_as_from_png(made: Path, ckpt: str, tmp_path: Path) -> None:
    """`ldm txt2img --from-png` makes what the page made."""
    again = tmp_path / "again"
    shutil.rmtree(again, ignore_errors=True)
    txt2img(["--ckpt", ckpt, "--device", "cpu", "--from-png", str(made), "--outdir", str(again)])
    found = np.asarray(Image.open(made).convert("RGB")).astype(int)
    expected = np.asarray(Image.open(again / "samples" / "00000.png").convert("RGB")).astype(int)
    assert expected.std() > 5 and np.abs(found - expected).max() <= 1


@with_browser
def test_the_page_makes_pythons_images(browser, folder, tiny_checkpoint, tmp_path):
    with Visit(browser, folder) as visit:
        page = visit.page
        check_as_from_png(visit.image(tmp_path), str(tiny_checkpoint), tmp_path)
        page.fill("#prompt", "a (six:1.4) caf\u00e9")
        page.fill("#negative", "five")
        page.fill("#seed", "77")
        page.select_option("#sampler", "ddpm")
        page.locator("#scale").fill("3.5")
        page.locator("#steps").fill("6")
        page.click("#generate")
        page.wait_for_selector("#took:has-text('6 steps')", timeout=PATIENCE)
        check_as_from_png(visit.image(tmp_path), str(tiny_checkpoint), tmp_path)
        assert page.locator("#film canvas").count() == 6
        page.locator("#step").fill("1")
        assert "1 of 6, noise level" in page.inner_text("#step-shown")
        page.click("#take")
        page.select_option("#tool", "mark")
        page.locator("#drawing").press("ArrowLeft")
        page.locator("#drawing").press(" ")
        page.click("#change-form button[type=submit]")
        page.wait_for_selector("#changed[width]", timeout=PATIENCE)
        page.click("#between-form button[type=submit]")
        page.wait_for_selector("#play:enabled", timeout=PATIENCE)
        page.click("#compare-form button")
        page.wait_for_selector("#pair canvas[width] >> nth=1", timeout=PATIENCE)
        page.select_option("#axis", "steps")
        page.click("#grid-form button")
        page.wait_for_selector("#cells canvas[width] >> nth=19", timeout=PATIENCE)
        assert visit.problems == []
        assert all(url.startswith((visit.address, "blob:", "data:")) for url in visit.requests)


def over_the_image(page) -> np.ndarray | None:
    """The attention map over the image, RGBA; None if there is none."""
    if not page.is_visible("#attention"):
        return None
    png = page.locator("#attention").evaluate("(canvas) => canvas.toDataURL().split(',')[1]")
    return np.asarray(Image.open(BytesIO(b64decode(png)))).astype(int)


@pytest.fixture(params=["by the browser", "by the server"])
def place(request):
    """A page, and the address of the same over the checkpoint."""
    if request.param == "by the browser":
        return request.getfixturevalue("folder")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    return f"{request.getfixturevalue('address')}#token=secret"


@with_browser
def test_the_attention_to_each_word(browser, place, tiny_checkpoint, tmp_path):
    """By pointing, by the keyboard, and by a tap; its pixels are those of `overlay`."""
    model = ldm.load(tiny_checkpoint, device="cpu")
    with attention_maps(model, ["a five"]) as maps:
        (image,) = model.generate(["a five"], seed=0)
    expected = {word: np.asarray(overlay(image, maps.of(word))).astype(int) for word in ("a", "five")}
    with Visit(browser, place, viewport={"width": 360, "height": 740}, has_touch=True) as visit:
        page = visit.page
        visit.image(tmp_path)
        assert page.locator("#words button").all_inner_texts() == ["a", "five"]
        assert over_the_image(page) is None and page.inner_text("#attended-where") == ""
        five = page.locator("#words button", has_text="five")
        five.hover()
        assert np.abs(over_the_image(page)[..., :3] - expected["five"]).max() <= 3  # of one more rounding in the image
        said = page.inner_text("#attended-where")
        assert said.startswith("The attention to “five” is highest ") and ", lowest " in said
        assert page.get_attribute("#attention", "aria-label") in said
        page.mouse.move(1, 1)
        assert over_the_image(page) is None
        page.locator("#words button").first.focus()
        assert np.abs(over_the_image(page)[..., :3] - expected["a"]).max() <= 3
        page.keyboard.press("Tab")
        assert np.abs(over_the_image(page)[..., :3] - expected["five"]).max() <= 3
        page.keyboard.press("Tab")
        assert over_the_image(page) is None
        five.hover()
        page.locator("#seed").press("ArrowUp")  # another image is made, and the word has the pointer still
        page.wait_for_selector("#image[aria-label$='seed 1']", timeout=PATIENCE)
        page.mouse.move(1, 1)
        five.hover()
        page.fill("#prompt", "a (five:2000)")
        page.wait_for_selector("#took:has-text('must be from -1000 to 1000')", timeout=PATIENCE)
        assert over_the_image(page) is None
        page.fill("#prompt", "a five")
        page.fill("#seed", "0")
        page.wait_for_selector("#image[aria-label$='seed 0']", timeout=PATIENCE)
        page.mouse.move(1, 1)
        five.tap()
        page.mouse.move(1, 1)
        assert over_the_image(page) is not None and five.get_attribute("aria-pressed") == "true"
        page.fill("#seed", "1")
        page.wait_for_selector("#image[aria-label$='seed 1']", timeout=PATIENCE)
        assert over_the_image(page) is not None and five.get_attribute("aria-pressed") == "true"
        five.press("Escape")
        assert over_the_image(page) is None
        page.fill("#prompt", "")
        page.wait_for_selector("#attended", state="hidden", timeout=PATIENCE)
        assert visit.problems == []


@with_browser
def test_bad_values_are_named_and_the_page_goes_on(browser, folder, tmp_path):
    with Visit(browser, folder) as visit:
        visit.image(tmp_path)
        visit.page.fill("#prompt", "a (five:2000)")
        visit.page.wait_for_selector("#took:has-text('must be from -1000 to 1000')", timeout=PATIENCE)
        visit.page.fill("#prompt", "a five")
        visit.page.wait_for_selector("#took:has-text('steps in')", timeout=PATIENCE)
        visit.page.fill("#seed", "")
        visit.page.wait_for_selector("#took:has-text('fill out this field')", timeout=PATIENCE)
        assert not visit.page.is_visible("#download")  # of the image before
        for form in ("compare", "change", "between", "grid"):
            visit.page.click(f"#{form}-form button[type=submit]")
            visit.page.wait_for_selector(f"#{form}-fault:has-text('Seed: ')", timeout=PATIENCE)
        assert visit.page.inner_text("#changed-took") == visit.page.inner_text("#pair") == ""
        visit.page.fill("#seed", str(2**32 - 1))
        visit.page.click("#grid-form button")
        visit.page.wait_for_selector("#cells canvas[width] >> nth=19", timeout=PATIENCE)
        assert visit.page.locator("#cells th[scope=row]").last.inner_text() == f"seed {2**32 - 1}"
        assert visit.page.inner_text("#grid-fault") == ""
        visit.page.fill("#seed", "2")
        visit.page.wait_for_selector("#took:has-text('steps in')", timeout=PATIENCE)
        assert visit.problems == []


@with_browser
@pytest.mark.parametrize("lost", ["models.json", "{}/unet.onnx.gz", f"onnxruntime/{RUNTIME[1]}.gz"])
def test_a_file_that_is_missing_is_named(browser, folder, tmp_path, lost):
    copy = tmp_path / "page"
    shutil.copytree(folder, copy)
    (name,) = (row["name"] for row in json.loads((folder / "models.json").read_text())["models"])
    (copy / lost.format(name)).rename(tmp_path / "kept")
    with Visit(browser, copy) as visit:
        visit.page.wait_for_selector("#status:has-text('cannot be fetched: 404')", timeout=PATIENCE)
        (tmp_path / "kept").rename(copy / lost.format(name))
        if lost != "models.json":
            visit.page.check("#models input")
            visit.image(tmp_path)


@with_browser
def test_models_that_are_chosen_while_one_loads(browser, folder, tmp_path):
    """They need the runtime once; and their names may have marks that addresses have, too."""
    copy, name = tmp_path / "page", "50% #1?"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "models.json").read_text())
    (row,) = index["models"]
    shutil.copytree(copy / row["folder"], copy / name)
    index["models"].append(row | {"name": name, "folder": name})
    (copy / "models.json").write_text(json.dumps(index))
    with Visit(browser, copy) as visit:
        visit.page.locator("#models input").nth(1).check()
        visit.image(tmp_path)
        for form, made in (
            ("change", "#changed[width]"),
            ("compare", "#pair canvas[width]"),
            ("between", "#loop[width]"),
        ):
            visit.page.click(f"#{form}-form button[type=submit]")
            visit.page.wait_for_selector(made, timeout=PATIENCE)
        visit.page.locator("#models input").nth(0).check()
        visit.image(tmp_path)
        assert visit.page.locator("#changed[width], #pair canvas, #loop[width], #play:enabled").count() == 0
        assert visit.page.inner_text("#status") == "" and visit.problems == []
        assert sum(url.endswith(".wasm.gz") for url in visit.requests) == 1


@with_browser
def test_it_fits_a_phone(browser, folder, tmp_path):
    with Visit(browser, folder, viewport={"width": 360, "height": 740}) as visit:
        visit.image(tmp_path)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.fixture
def address(tiny_checkpoint, tmp_path):
    """The address of `ldm serve` with the tiny model, without its token, which is `secret`."""
    import uvicorn

    from ldm.inference.run import OutputFolder
    from ldm.inference.serve import Server, make_app

    models = {"tiny": ldm.load(tiny_checkpoint, device="cpu")}
    app = make_app(Server(models, ["a five"], OutputFolder(tmp_path / "out")), ["127.0.0.1"], "secret")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True


@with_browser
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="the extra serve is not installed")
def test_the_same_page_over_a_checkpoint(browser, address, tiny_checkpoint, tmp_path):
    with Visit(browser, f"{address}#token=secret") as visit:
        check_as_from_png(visit.image(tmp_path), str(tiny_checkpoint), tmp_path)
        assert visit.page.locator("#film canvas").count() == 4
        visit.page.click("#gallery-form button")
        visit.page.wait_for_selector("#images img", timeout=PATIENCE)
        assert "a five Steps: 4" in visit.page.inner_text("#images")
        assert visit.problems == []
    with Visit(browser, address) as visit:
        visit.page.wait_for_selector("#status:has-text('this server needs its token')", timeout=PATIENCE)


@with_browser
@pytest.mark.full
def test_the_models_that_ship_within_3_seconds_and_15_megabytes(browser, tmp_path):
    folder = tmp_path / "page"
    write_page([str(folder), "--runtime", RUNTIME_FILE])
    rows = json.loads((folder / "models.json").read_text())
    first = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert first + rows["runtime"] + rows["models"][0]["bytes"] <= 15e6
    with Visit(browser, folder) as visit:
        began = time.monotonic()
        visit.page.wait_for_selector("#result[data-complete]", timeout=PATIENCE)
        took = time.monotonic() - began
        check_as_from_png(visit.image(tmp_path), "digits", tmp_path)
        assert not any("emoji" in url for url in visit.requests)
        assert took <= 3
        visit.page.click("input[value=emoji]")
        assert visit.page.input_value("#prompt") == "a red apple"
        check_as_from_png(visit.image(tmp_path), "emoji", tmp_path)
        assert visit.problems == []


def archive(path: Path, *names: str) -> Path:
    """An archive as npm packs it, with files of those names."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            source = path.with_name("source")
            source.write_bytes(b"code")
            tar.add(source, f"package/dist/{name}")
    return path


def test_what_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    """Nothing is written, and nothing that was there is lost."""

    def save(model, folder, dtype, format):
        folder.mkdir()
        (folder / "unet.onnx").write_bytes(b"network")
        return []

    monkeypatch.setattr(ldm, "save", save)
    monkeypatch.chdir(tmp_path)
    ckpt, out = ["--ckpt", str(tiny_checkpoint)], tmp_path / "page"
    good = archive(tmp_path / "good.tgz", *RUNTIME)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("mine")
    (mine / "models.json").write_text("{}")  # of another program
    refused("is not an empty folder, nor a page", write_page, [str(mine), *ckpt])
    refused("--example is for one model", write_page, [str(out), "--example", "a five"])
    refused("--ckpt names one model twice", write_page, [str(out), "--ckpt", "digits", "digits"])
    refused("is not npm's onnxruntime-web", write_page, [str(out), *ckpt, "--runtime", str(mine / "letter.txt")])
    with pytest.raises(FileNotFoundError, match="archive of onnxruntime-web 'missing.tgz' does not exist"):
        write_page([str(out), *ckpt, "--runtime", "missing.tgz"])
    part = archive(tmp_path / "part.tgz", RUNTIME[0])
    refused("is not npm's onnxruntime-web", write_page, [str(out), *ckpt, "--runtime", str(part)])
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    refused("there is no npm here: give --runtime onnxruntime-web-", write_page, [str(out), *ckpt])
    assert not out.exists()
    for _ in range(2):  # a page is replaced
        write_page([str(out), *ckpt, "--runtime", str(good)])
    rows = json.loads((out / "models.json").read_text())
    (row,) = rows["models"]
    assert row["bytes"] == (out / row["folder"] / "unet.onnx.gz").stat().st_size and row["examples"] == ["", ""]
    assert {path.name for path in (out / "onnxruntime").iterdir()} == {RUNTIME[0], f"{RUNTIME[1]}.gz"}
