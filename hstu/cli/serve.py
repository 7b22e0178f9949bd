"""`python -m hstu.cli.serve`: answers of a run over HTTP, with the code of predict.

POST /recommend, /score, /similar and /reload, GET /health, /metrics, /docs, and a page at / to try it. It listens to
this machine alone unless --host says otherwise; with the environment variable HSTU_SERVE_TOKEN every question has to
bring its value (Authorization: Bearer ...). The checkpoint that --checkpoint names is taken up anew by POST /reload
and, with --watch, by itself. Ctrl-C and SIGTERM end it when what was asked is answered, within 10 seconds.
Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, import_modules, underscore_flags
from hstu.cli.predict import add_run_flags

if TYPE_CHECKING:
    from hstu.parallel import Mesh

logger = logging.getLogger("hstu.cli")

TOKEN = "HSTU_SERVE_TOKEN"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: list[str] | None = None) -> int:
    """Serve; 2 for a user's mistake."""
    args = make_parser().parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _serve(args, mesh))


def make_parser() -> argparse.ArgumentParser:
    """Return the flags; hyphens and underscores both work."""
    parser = Parser(
        prog="python -m hstu.cli.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--memory", type=Path, help="directory of python -m hstu.cli.memory to answer from")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free; default: 8000")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look so often for another checkpoint")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered together; default: 64")
    parser.add_argument("--batch_wait", type=float, default=2.0, metavar="MS", help="for others to come; default: 2")
    parser.add_argument("--max_waiting", type=int, default=512, help="questions that wait, then 429; default: 512")
    parser.add_argument("--cache_mib", type=int, default=256, help="of users who had events since; default: 256")
    parser.add_argument("--max_k", type=int, default=1000, help="items returned; default: 1000")
    parser.add_argument("--max_events", type=int, default=10_000, help="of a history; default: 10000")
    parser.add_argument("--max_items", type=int, default=10_000, help="candidates; default: 10000")
    parser.add_argument("--max_body", type=int, default=1 << 20, help="bytes of a request; default: 1 MiB")
    return parser


def _serve(args: argparse.Namespace, mesh: Mesh) -> None:
    try:
        from hstu.serving.app import make_app
        from hstu.serving.server import listen, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"hstu.cli.serve needs {error.name}: pip install 'hstu[serve]'") from None
    from hstu.serving.model import ModelOptions
    from hstu.serving.questions import Limits
    from hstu.serving.service import Service, ServiceOptions

    if mesh.world_size > 1:
        raise ValueError(f"{mesh.world_size} processes: a server is one; start it without torchrun, as often as needed")
    if args.max_body < 1:
        raise ValueError(f"--max_body = {args.max_body}: must be at least 1")
    token = os.environ.get(TOKEN)
    if token == "":
        raise ValueError(f"{TOKEN} is empty; give it a value, or unset it to let anybody ask")
    import_modules(args.imports)
    options = ServiceOptions(
        run_dir=Path(args.run_dir),
        checkpoint=args.checkpoint,
        bindings=tuple(args.gin_bindings),
        model=ModelOptions(
            memory=args.memory,
            cache_bytes=args.cache_mib << 20,
            limits=Limits(k=args.max_k, events=args.max_events, items=args.max_items),
        ),
        batch_size=args.batch_size,
        batch_wait=args.batch_wait / 1000,
        max_waiting=args.max_waiting,
        watch=args.watch,
    )
    with listen(args.host, args.port) as sock:
        service = Service(options, mesh)
        logging.getLogger("hstu.data").setLevel(logging.WARNING)  # what it says of a file would be said of each request
        host, port = sock.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        if token is None and args.host not in _LOOPBACK:
            logger.warning("anybody who reaches %s may ask; set %s, or put a proxy in front", args.host, TOKEN)
        serve(make_app(service, max_body=args.max_body, token=token), service, sock)


if __name__ == "__main__":
    sys.exit(main())
