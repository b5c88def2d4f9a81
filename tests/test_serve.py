"""The page's server: its images are `generate`'s, one at a time; what it refuses; what a request cannot reach."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from script_runs import pixels as levels

import ldm
from ldm.commands import serve as command
from ldm.commands.serve import NEEDED
from ldm.commands.serve import main as serve
from ldm.commands.txt2img import main as txt2img
from ldm.editing import attention_maps
from ldm.inference.run import OutputFolder

lacking = [name for name in NEEDED if find_spec(name) is None]
with_extra = pytest.mark.skipif(bool(lacking), reason=f"the extra serve is not installed: no {', '.join(lacking)}")


@pytest.fixture
def app(tiny_checkpoint, tmp_path):
    """Return a client of a new server, and the server. Options are of `make_app`."""
    from starlette.testclient import TestClient

    from ldm.inference.serve import Server, make_app

    model = ldm.load(tiny_checkpoint, device="cpu")
    server = Server({"tiny": model}, ["a five"], OutputFolder(tmp_path / "out"))

    def make(**options):
        return TestClient(make_app(server, ["testserver"], **options)), server

    return make


def events(client, **asked) -> list[dict]:
    answer = client.post("/run", json={"id": 1, "name": "tiny", **asked})
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def stream(port: int, **asked) -> Iterator[dict]:
    """The events of a run of a server at that port, as they come."""
    body, headers = json.dumps(asked).encode(), {"content-type": "application/json"}
    with urlopen(Request(f"http://127.0.0.1:{port}/run", body, headers), timeout=60) as answer:
        yield from map(json.loads, answer)


def image_of(event: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["image"]["png"])))).astype(int)


def text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(np.uint8).tobytes()).decode()


@with_extra
def test_an_image_is_that_of_its_recipe(app, tiny_checkpoint, tmp_path):
    client, server = app()
    settings = {"prompt": "a (five:1.2)", "negative": "six", "seed": 7, "steps": 3, "scale": 2.5, "sampler": "ddpm"}
    *steps, last = events(client, **settings, strip=True)
    assert [event["step"]["index"] for event in steps] == [0, 1, 2]
    sigmas = [event["step"]["sigma"] for event in steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] > 0
    assert all(set(event["step"]) == {"index", "sigma", "seen", "predicted"} for event in steps)
    with attention_maps(server.models["tiny"], [settings["prompt"]]) as maps:
        server.models["tiny"].generate([settings.pop("prompt")], settings.pop("negative"), **settings)
    assert [word["text"] for word in last["image"]["words"]] == maps.words[0].texts == ["a", "five"]
    for word in last["image"]["words"]:
        heat = maps.of(word["text"])
        assert (word["map"]["height"], word["map"]["width"]) == heat.shape
        np.testing.assert_allclose(word["map"]["data"], heat.flatten(), atol=1e-6)
    (name,) = client.get("/gallery.json").json()
    made = tmp_path / "made.png"
    made.write_bytes(client.get(f"/gallery/{name}").content)
    txt2img(["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--from-png", str(made), "--outdir", str(tmp_path)])
    assert (levels(tmp_path / "samples" / "00000.png") == image_of(last)).all()


@with_extra
def test_images_without_maps_are_made(app):
    """Of prompts without words, or shorter than the negative prompt."""
    client, _ = app()
    for prompt, negative in [("", ""), (".", ""), ("five", "five " * 20)]:
        assert events(client, prompt=prompt, negative=negative, strip=True)[-1]["image"]["words"] == []


@with_extra
def test_changed_images_and_those_between(app):
    client, server = app()
    model = server.models["tiny"]
    rng = np.random.default_rng(0)
    size = model.defaults["width"], model.defaults["height"]
    pixels, mask = rng.integers(0, 256, (size[1], size[0], 4)), np.zeros((size[1], size[0]))
    pixels[..., 3], mask[4:12, 4:12] = 255, 1
    asked = {"init": {"width": size[0], "height": size[1], "data": text(pixels)}, "mask": text(mask), "strength": 0.5}
    init = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    anew = Image.fromarray((255 * mask).astype(np.uint8))
    (expected,) = model.generate(["five"], seed=2, image=init, mask=anew, strength=0.5)
    assert (image_of(events(client, prompt="five", seed=2, **asked)[-1]) == np.asarray(expected)).all()
    towards = {"prompt": "six", "seed": 9, "share": 0.5}
    prompts, seeds = ldm.interpolate("five", "six", 3), ldm.interpolate(2, 9, 3)
    (expected,) = model.generate(prompts[1:2], seeds=seeds[1:2])
    assert (image_of(events(client, prompt="five", seed=2, towards=towards)[-1]) == np.asarray(expected)).all()


@with_extra
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "../tiny"}, "unknown model '../tiny'; choose from tiny"),
        ({"prompt": "a" * 10_001}, "at most 10000 letters"),
        ({"prompt": ["a"]}, "a prompt is a text"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": "many"}, "steps 'many' is not an integer"),
        ({"sampler": "fast"}, "unknown sampler 'fast'"),
        ({"init": {"width": 8, "height": 8, "data": text(np.zeros(9))}}, "of four bytes each"),
        ({"init": {"width": 10**9, "height": 10**9, "data": ""}}, "an image has 1024 x 1024 pixels at most"),
        ({"init": {"width": 8, "height": 8, "data": "/etc/passwd"}}, "Incorrect padding|base64"),
        ({"init": 3}, "init is an object with data, height, width"),
        ({"towards": {"prompt": "b"}}, "towards is an object with prompt, seed, share"),
        ({"towards": {"prompt": "b", "seed": 1, "share": 10**400}}, "share must be a number from 0 to 1, got 1000"),
        ({"mask": "AAAA"}, "mask needs init"),
    ],
    ids=str,
)
def test_bad_requests_are_sentences(app, asked, said):
    client, server = app()
    (event,) = events(client, **({"prompt": "five"} | asked))
    with pytest.raises(ValueError, match=said):
        raise ValueError(event["failed"]["message"])
    assert not server.output.path.exists() and not server.jobs
    assert "image" in events(client, prompt="five")[-1]  # it goes on


@with_extra
def test_who_may_ask(app):
    client, server = app(token="secret")
    server.models["tiny"].defaults = server.models["tiny"].defaults | {"interval": (0.3, float("inf"))}
    page = client.get("/")
    assert page.status_code == 200 and "<canvas" in page.text and page.headers["x-frame-options"] == "DENY"
    assert client.get("/models.json").status_code == client.post("/run", json={}).status_code == 401
    own = {"authorization": "Bearer secret"}
    assert client.get("/models.json", headers=own).json()["models"][0]["name"] == "tiny"
    other = client.post("/run", json={}, headers=own | {"origin": "http://elsewhere"})
    assert other.status_code == 403 and "not from http://elsewhere" in other.text
    assert client.post("/run", json={"id": 1}, headers=own | {"origin": "http://testserver"}).status_code == 200
    assert client.post("/run", json={}, headers=own).status_code == 503
    assert client.get("/", headers={"host": "elsewhere"}).status_code == 400
    assert client.post("/run", content=b"x" * (2**24 + 1), headers=own).status_code == 413
    for content in (b"[]", b"{", b"[" * 100_000):
        assert client.post("/run", content=content, headers=own).status_code == 400


@with_extra
def test_nothing_else_can_be_read(app, tmp_path):
    client, server = app()
    events(client, prompt="five")
    Image.new("L", (4, 4)).save(tmp_path / "out" / "other.png")
    (name,) = client.get("/gallery.json").json()
    assert client.get(f"/gallery/{name}").status_code == 200
    for path in (
        "/gallery/..%2fother.png",
        "/gallery/../other.png",
        "/..%2fpyproject.toml",
        "/%2fetc%2fpasswd",
        "/web",
    ):
        assert client.get(path).status_code == 404, path
    Image.new("L", (4, 4)).save(tmp_path / "out" / "samples" / "99999.png")  # another program's
    assert client.get("/gallery.json").json()["99999.png"] == ""


@with_extra
def test_runs_wait_for_each_other_and_can_be_stopped(app):
    client, server = app()
    model, at_work, go = server.models["tiny"], threading.Event(), threading.Event()
    decode = model.decode

    def slow(latents):
        at_work.set()
        go.wait(30)
        return decode(latents)

    model.decode = slow
    assert server.start({"name": "tiny"}) is None  # without an id, anybody's could stop it
    jobs = [server.start({"id": i, "name": "tiny", "prompt": "five", "strip": True}) for i in range(3)]
    assert server.start({"id": 1, "name": "tiny"}) is None
    assert at_work.wait(30) and jobs[1].events.empty()
    client.post("/stop", json={"id": 0})
    client.post("/stop", json={"id": 1})
    client.post("/stop", json={"id": "unknown"})
    go.set()
    found = [list(iter(job.events.get, None)) for job in jobs]
    assert ["image" in "".join(map(str, events)) for events in found] == [False, False, True]
    assert len(found[0]) == 1 and found[1] == []  # the step that was being made


@with_extra
def test_what_the_command_refuses(tiny_checkpoint, monkeypatch):
    refused("--token must be ASCII", serve, ["--token", "\u00e9"])
    refused("--ckpt names one model twice", serve, ["--ckpt", "digits", "digits"])
    refused("--host 0.0.0.0 lets other machines in: give --token", serve, ["--host", "0.0.0.0"])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    refused("the server needs starlette, uvicorn, which the extra serve installs", serve, [])


@with_extra
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_and_stops(tiny_checkpoint, tmp_path, number):
    """In the middle of an image, which ends, and of one that waits; both visitors learn of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--outdir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "ldm", "serve", *options, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"open http://127.0.0.1:{port}/ (Ctrl-C stops)\n"
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 2 and f"port {port} (Address already in use): choose another --port" in again.stderr
        with ThreadPoolExecutor(2) as pool:
            first = stream(port, name=tiny_checkpoint.stem, prompt="a five", steps=1000, sampler="ddpm", id="1")
            assert "step" in next(first)
            waiting = pool.submit(list, stream(port, name=tiny_checkpoint.stem, prompt="a five", id="2"))
            time.sleep(0.5)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            ends = [list(first)[-1], waiting.result()[-1]]
    finally:
        process.kill()  # where something failed
    assert ends == [{"failed": {"message": "the server was stopped"}}] * 2
    assert process.returncode == 0 and said == ""
