"""Show a web page on this machine, whose images checkpoints make: settings, denoising steps, grids, a gallery.

ldm serve
ldm serve --ckpt runs/digits/diffusion/model.safetensors emoji --example "a red apple"
ldm serve --ckpt sd-v1-5.safetensors --precision bf16 --host 0.0.0.0 --token "a long secret"
"""

import argparse
import copy
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from ldm.checks import SHIPPED_MODELS
from ldm.cli import Parser, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.model_names import model_names

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NEEDED = ("starlette", "uvicorn")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        extra = 'pip install "latent-diffusion-toolkit[serve]"'
        raise ValueError(f"the server needs {', '.join(missing)}, which the extra serve installs: {extra}")
    if args.host not in LOOPBACK and not args.token:
        raise ValueError(f"--host {args.host} lets other machines in: give --token, which they must have")

    if args.token is not None and not args.token.isascii():
        raise ValueError("--token must be ASCII letters, digits and marks, which a browser can send")
    names, listening = model_names(args.ckpt), _listen(args.host, args.port)

    import uvicorn

    from ldm.inference.gateway import Gateway
    from ldm.inference.run import OutputFolder
    from ldm.inference.serve import Server, make_app

    models = {}
    for name, path in zip(names, args.ckpt, strict=True):
        own = copy.copy(args)
        own.ckpt = path
        models[name] = load_model(own)
        if not hasattr(models[name].tokenizer, "encode") and models[name].cond_stage_model is not None:
            raise ValueError(f"the page is for models that read texts, and {str(path)!r} reads something else")
    hosts = ["*"] if args.host in ("0.0.0.0", "::") else [*LOOPBACK, "[::1]", args.host]
    ships = [name for name, path in zip(names, args.ckpt, strict=True) if str(path) in SHIPPED_MODELS]
    server = Server(models, args.example, OutputFolder(args.outdir), ships)
    shown, secret = f"[{args.host}]" if ":" in args.host else args.host, quote(args.token or "", safe="")
    print(f"open http://{shown}:{args.port}/{f'#token={secret}' if secret else ''} (Ctrl-C stops)", flush=True)
    app = make_app(server, hosts, args.token)
    try:
        Gateway(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1), server).run([listening])
    except KeyboardInterrupt:  # as the user wished
        pass
    finally:
        server.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that visitors can call, before the models are loaded, so that a port in use shows at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise OSError(f"cannot serve at {host}, port {port} ({why}): choose another --port or --host") from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--example", action="append", default=[], metavar="TEXT", help="a prompt that the page offers")
    add("--outdir", type=Path, default=Path("outputs/serve"), metavar="DIR", help="of the images (outputs/serve)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="of this machine; beyond it needs --token (127.0.0.1)")
    add("--port", type=int_range(1, 65535), default=7860, metavar="N", help="(7860)")
    add("--token", metavar="TEXT", help="what a visitor must have; it is in the address that is printed")
    add_model_options(parser)
    parser.set_defaults(ckpt=[Path("digits")])
    (ckpt,) = [action for action in parser._actions if action.dest == "ckpt"]
    ckpt.nargs = "+"
    return parser.parse_args(argv)
