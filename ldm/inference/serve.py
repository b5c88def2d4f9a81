"""The page over checkpoints: a server whose models make the images of `web/` (`ldm serve`, docs/how-to/page.md).

    GET  /models.json    the models
    POST /run            settings as JSON -> a JSON object a line: {"step": ...} several times, {"image"} or {"failed"}
    POST /stop           {"id": ...}: that run ends before its next step
    GET  /gallery.json   the images that were made: names and recipes
    GET  /gallery/NAME   one of them
    GET  /NAME           a file of the page

One image is made at a time, and the others wait. Nothing in a request is a path: models, images and the page's files
are looked up in lists.
"""

import hmac
import json
import math
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ldm import __version__
from ldm.arrays import cast_like
from ldm.batching import Blend
from ldm.checks import LARGEST_FLOAT
from ldm.diffusion.denoiser import from_vp, to_vp
from ldm.diffusion.sampling import Step
from ldm.editing.maps import AttentionMaps, attention_maps
from ldm.editing.words import Words
from ldm.generation import plan_sampling
from ldm.images import to_pil
from ldm.inference.again import read_image_text
from ldm.inference.generate import default_recipe, generate_run
from ldm.inference.init_image import InitImage
from ldm.inference.recipe import Recipe
from ldm.inference.run import OutputFolder, check_memory
from ldm.input_files import folder_that_ships
from ldm.model_names import model_row
from ldm.settings import ALL_SIGMAS, SEED, Settings, of_model, setting_rows

MAX_BODY = 2**24  # bytes of a request: an image of 1024 x 1024 pixels and its mask as text
MAX_TEXT = 10_000  # letters of a prompt
MAX_SIDE = 1024  # pixels of an image in a request
PREVIEWED = 2**14  # numbers of the latents: larger ones take too long to decode at each step
NEWEST = 60  # images of the gallery, the last ones
MOST_WAITING = 30  # runs; a grid of the page has 20
WAIT = 0.5  # seconds between two looks at whether a visitor is still there
ASKED = ("steps", "scale", "sampler", "strength")
HEADERS = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}


Answer = Callable[[Request], Awaitable[Response]]


class Stopped(Exception):
    """The run was given up by the visitor."""


class Job:
    """A run that was asked for: its events, None at the end; and whether it is to end."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.asked, self.stopped = asked, Event()
        self.events: SimpleQueue[dict[str, Any] | None] = SimpleQueue()


class Server:
    """The models, and the one thread that computes.

    Args:
        models: by name, as `load_model` returns them.
        examples: prompts that the page offers; with none, those of the models that ship.
        output: where images are saved.
        ships: names of the models that ship.
    """

    def __init__(
        self, models: Mapping[str, Any], examples: list[str], output: OutputFolder, ships: Collection[str] = ()
    ) -> None:
        self.models, self.examples, self.output, self.ships = models, examples, output, ships
        self.thread, self.jobs = ThreadPoolExecutor(1), dict[str, Job]()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of models.json."""
        rows = []
        for name, model in self.models.items():
            low, high = of_model(model.defaults)["interval"] or ALL_SIGMAS
            shown = model_row(name if name in self.ships else "", self.examples)
            own = {"interval": [low, min(high, LARGEST_FLOAT)]}  # JSON has no infinity
            rows.append({"name": name, **shown, "config": {"defaults": model.defaults | own}})
        return rows

    def start(self, asked: Mapping[str, Any]) -> Job | None:
        """Let a run wait for its turn; None where too many wait, or its id is none or another's."""
        key, job = str(asked.get("id", "")), Job(asked)
        if not key or key in self.jobs or len(self.jobs) >= MOST_WAITING:
            return None
        self.jobs[key] = job
        self.thread.submit(self._run, job)
        return job

    def _run(self, job: Job) -> None:
        try:
            if not job.stopped.is_set():
                job.events.put({"image": self._image(job)})
        except Stopped:
            pass
        except Exception as error:  # whatever it is, this visitor gets it as an answer, and the next run is made
            said = str(error).splitlines()[:1] or [type(error).__name__]
            job.events.put({"failed": {"message": said[0]}})
        finally:
            key = str(job.asked.get("id"))
            if self.jobs.get(key) is job:
                del self.jobs[key]
            job.events.put(None)

    def close(self) -> None:
        """End the run that is being made before its next step, and those that wait; their visitors learn of it."""
        for job in list(self.jobs.values()):
            job.stopped.set()
            for event in ({"failed": {"message": "the server was stopped"}}, None):
                job.events.put(event)
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _image(self, job: Job) -> dict[str, Any]:
        """Make the image; return {png, words, seconds}, with its events on the way."""
        asked, began = job.asked, time.monotonic()
        model = self.models.get(str(asked.get("name")))
        if model is None:
            raise ValueError(f"unknown model {asked.get('name')!r}; choose from {', '.join(self.models)}")
        texts = {"prompt": asked.get("prompt", ""), "negative": asked.get("negative", "")}
        towards = asked.get("towards")
        for text in (*texts.values(), "" if towards is None else towards["prompt"]):
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise ValueError(f"a prompt is a text of at most {MAX_TEXT} letters")
        rows = setting_rows(Settings)
        _check_parts(asked)
        given = {name: rows[name].checked(name, asked[name]) for name in ASKED if asked.get(name) is not None}
        given |= texts | {"seed": SEED.checked("seed", asked.get("seed", 0))}
        init = None
        if asked.get("init") is not None:
            init = InitImage(_image_of(asked["init"]), _mask_of(asked))
            given |= {"init_hash": init.init_hash, "mask_hash": init.mask_hash}
            given.setdefault("strength", model.default_strength(init.mask is not None))
        recipe = default_recipe(model, model.path.stem, **given)
        check_memory(recipe, 1, 1)
        callback, words = self._callback(job, model, recipe, init), []
        if towards is None:
            with ExitStack() as hooks:
                maps = _maps(model, recipe, hooks) if asked.get("strip") else None
                (made,) = generate_run(model, [recipe], callback, init)
            words = [] if maps is None else _heat(maps)
            path = self.output.save_sample(made.image, recipe.to_text())
            png = path.read_bytes()
        else:
            share, last = float(towards["share"]), SEED.checked("seed", towards["seed"])
            ends = Blend(recipe.prompt, towards["prompt"], share), Blend(recipe.seed, last, share)
            own = {name: getattr(recipe, name) for name in ASKED if name != "strength"}
            (image,) = model.generate([ends[0]], recipe.negative, seeds=[ends[1]], callback=callback, **own)
            png = _png(image)
        return {"png": b64encode(png).decode(), "words": words, "seconds": time.monotonic() - began}

    def _callback(self, job: Job, model: Any, recipe: Recipe, init: InitImage | None) -> Callable[[Step], None]:
        """Return what sends each step, with what the network saw and predicted where that is quickly decoded."""
        sigmas = plan_sampling(model, recipe.steps, recipe.sampler, recipe.spacing, recipe.final_sigma)[1]
        seen: Any = None  # x before the step
        sigma = sigmas[0]

        def callback(step: Step) -> None:
            nonlocal seen, sigma
            if job.stopped.is_set():
                raise Stopped
            if step.index == 0:
                sigma = sigmas[sigmas.index(step.sigma) - 1]
            if seen is None and init is None:  # sampling starts from it
                seen = from_vp(model.seeded_noise([recipe.seed], step.x.shape[1:])(), sigma)
            event: dict[str, Any] = {"index": step.index, "sigma": sigma}
            if job.asked.get("strip") and math.prod(step.x.shape) <= PREVIEWED:
                shown = {"predicted": step.x0, "seen": step.x0 if seen is None else to_vp(seen, sigma)}
                for name, latents in shown.items():
                    event[name] = b64encode(_png(to_pil(model.decode(cast_like(latents, step.x)))[0])).decode()
            seen, sigma = step.x, step.sigma
            job.events.put({"step": event})

        return callback

    def names(self) -> list[str]:
        """Return the names of the last images, the newest first."""
        folder = self.output.path / "samples"
        return sorted((path.name for path in folder.glob("*.png")) if folder.is_dir() else [], reverse=True)[:NEWEST]

    def gallery(self) -> dict[str, str]:
        """Return the recipes of the last images by name, the newest first."""
        return {name: _text_of(self.output.path / "samples" / name) for name in self.names()}


def make_app(server: Server, hosts: list[str], token: str | None = None) -> Starlette:
    """Return the application.

    Args:
        hosts: names and addresses by which visitors may call this server.
        token: what a request must bring as `Authorization: Bearer TOKEN`, other than for the page's own files.
    """
    page = {path.name: path for path in folder_that_ships("web").iterdir() if path.is_file()}
    guarded = partial(_guarded, token)

    async def models(request: Request) -> Response:
        return JSONResponse({"served": True, "version": f"ldm {__version__}", "models": server.rows()})

    async def run(request: Request) -> Response:
        asked = await _body(request)
        if isinstance(asked, Response):
            return asked
        job = server.start(asked)
        if job is None:
            return _refused(503, f"a run needs an id of its own, and at most {MOST_WAITING} wait: try again later")
        return StreamingResponse(_lines(request, job), media_type="application/x-ndjson")

    async def stop(request: Request) -> Response:
        asked = await _body(request)
        if isinstance(asked, Response):
            return asked
        job = server.jobs.get(str(asked.get("id")))
        if job is not None:
            job.stopped.set()
        return JSONResponse({})

    async def gallery(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(server.gallery))

    async def image(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in await run_in_threadpool(server.names):
            return _refused(404, "there is no such image")
        return FileResponse(server.output.path / "samples" / name, headers=HEADERS)

    async def file(request: Request) -> Response:
        path = page.get(request.path_params.get("name", "index.html"))
        return _refused(404, "there is no such file") if path is None else FileResponse(path, headers=HEADERS)

    routes = [
        Route("/models.json", guarded(models)),
        Route("/run", guarded(run), methods=["POST"]),
        Route("/stop", guarded(stop), methods=["POST"]),
        Route("/gallery.json", guarded(gallery)),
        Route("/gallery/{name}", guarded(image)),
        Route("/", file),
        Route("/{name}", file),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def _guarded(token: str | None, answer: Answer) -> Answer:
    """Return the answer to requests that bring the token, and come from this server's own page or no page."""

    async def guard(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            return _refused(401, "this server needs its token: open the address that it printed")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return _refused(403, f"requests come from this server's own page, not from {origin}")
        return await answer(request)

    return guard


async def _lines(request: Request, job: Job) -> AsyncIterator[str]:
    """Yield the events of a run as they come. It ends with the visitor."""
    try:
        while True:
            try:
                event = await run_in_threadpool(job.events.get, True, WAIT)
            except Empty:
                if await request.is_disconnected():
                    return
                continue
            if event is None:
                return
            yield json.dumps(event) + "\n"
    finally:
        job.stopped.set()


async def _body(request: Request) -> Any:
    """Return a request's JSON object, or the answer to one that is too large or something else."""
    data = b""
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                return _refused(413, f"a request has at most {MAX_BODY} bytes")
        asked = json.loads(data)
    except (ValueError, RecursionError, ClientDisconnect):
        asked = None
    return asked if isinstance(asked, dict) else _refused(400, "a request is a JSON object")


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"failed": {"message": message}}, status, headers=HEADERS)


def _maps(model: Any, recipe: Recipe, hooks: ExitStack) -> AttentionMaps | None:
    """Collect the attention to the words of a prompt; return None where this model or prompt does not let it."""
    if math.prod(model.latent_size(recipe.height, recipe.width)) > PREVIEWED:
        return None
    try:
        prompt, negative = (Words(model, text or "") for text in (recipe.prompt, recipe.negative))
        fits = negative.size <= prompt.size  # a longer one pads the prompt with tokens that the maps do not expect
        return hooks.enter_context(attention_maps(model, [recipe.prompt])) if fits else None
    except ValueError:  # there are no words, or nothing that attends to them
        return None


def _heat(maps: AttentionMaps) -> list[dict[str, Any]]:
    """Return the words of the first image, each with its map, as the page has them."""
    found = []
    for word in maps.words[0].texts:
        heat = maps.of(word)
        data = [round(value, 6) for value in heat.flatten().tolist()]
        found.append({"text": word, "map": {"data": data, "width": heat.shape[1], "height": heat.shape[0]}})
    return found


def _check_parts(asked: Mapping[str, Any]) -> None:
    """Raise ValueError for a request whose parts do not fit each other, or lack parts of their own."""
    wanted = {"init": {"width", "height", "data"}, "towards": {"prompt", "seed", "share"}}
    for name, parts in wanted.items():
        value = asked.get(name)
        if value is not None and not (isinstance(value, dict) and parts <= set(value)):
            raise ValueError(f"{name} is an object with {', '.join(sorted(parts))}")
    if asked.get("mask") is not None and asked.get("init") is None:
        raise ValueError("mask needs init, the image of which it marks a part")
    if asked.get("init") is not None and asked.get("towards") is not None:
        raise ValueError("init and towards are not for one image: leave one of them out")
    for part in (asked.get("mask"), (asked.get("init") or {"data": ""})["data"]):
        if part is not None and not isinstance(part, str):
            raise ValueError("images and masks are text, their bytes in base64")
    share = None if asked.get("towards") is None else asked["towards"]["share"]
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        raise ValueError(f"share must be a number from 0 to 1, got {str(share)[:40]}")


def _image_of(asked: Mapping[str, Any]) -> Image.Image:
    """Return an image of a request, its RGBA bytes in base64."""
    width, height = asked["width"], asked["height"]
    sides = [side for side in (width, height) if isinstance(side, int) and 1 <= side <= MAX_SIDE]
    data = b64decode(asked["data"], validate=True)
    if len(sides) < 2 or len(data) != 4 * width * height:
        raise ValueError(f"an image has {MAX_SIDE} x {MAX_SIDE} pixels at most, of four bytes each")
    return Image.frombytes("RGBA", (width, height), data).convert("RGB")


def _mask_of(asked: Mapping[str, Any]) -> Image.Image | None:
    """Return the mask of a request, a byte a pixel in base64: 1 where the image is made anew."""
    if asked.get("mask") is None:
        return None
    size, data = (asked["init"]["width"], asked["init"]["height"]), b64decode(asked["mask"], validate=True)
    if len(data) != size[0] * size[1]:
        raise ValueError(f"the mask has {len(data)} bytes, and the image {size[0]} x {size[1]} pixels")
    return Image.frombytes("L", size, data).point(lambda value: 255 if value else 0)


def _text_of(path: Path) -> str:
    """Return what a PNG says of itself, "" for another program's."""
    try:
        return read_image_text(path)
    except (ValueError, OSError, Image.DecompressionBombError):
        return ""


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
