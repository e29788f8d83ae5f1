"""``lora-ensemble serve``: its options, and the process that serves."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from lora_ensemble.ensemble.options import Limits, add_options, load_ensemble
from lora_ensemble.errors import Parser, UserError

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble

_GRACE_S = 60  # what is asked when it is stopped is answered for so long
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def run(argv: Sequence[str]) -> int:
    """Serve until a signal says to stop; returns the exit code."""
    args = _parser().parse_args(argv)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve: {' and '.join(missing)} not installed; run: pip install 'lora-ensemble[serve]'")
    with _listen(args.host, args.port) as listening:  # before the members are read: a port in use shows at once
        import uvicorn

        from lora_ensemble.ensemble.serve.app import make_app

        ensemble = load_ensemble(args)
        limits = Limits(**{field.name: getattr(args, f"max_{field.name}") for field in fields(Limits)})
        columns = columns_read(ensemble, args.columns)
        ensemble.logits(["" if len(columns) == 1 else ("", "")])  # what is made once is made before the first client
        address, port, *_ = listening.getsockname()
        host = f"[{address}]" if ":" in address else address
        local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        if not local:
            why = "whoever reaches this machine may ask: no password, no encryption"
            print(f"warning: --host {args.host}: {why}", file=sys.stderr)
        # On loopback, a page of another site could reach it under a name of its own that it lets point here.
        hosts = (*_LOOPBACK, host) if local else ("*",)
        config = uvicorn.Config(
            make_app(ensemble, columns, limits, hosts=hosts),
            log_config=None,  # warnings and errors go to stderr
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=_GRACE_S,
        )
        record = ensemble.record
        print(f"{record.task}, {record.size} members: http://{host}:{port}/ (Ctrl+C stops it)", flush=True)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lora-ensemble serve",
        description="Answer over HTTP what an ensemble decides about new text, with a page to try it.",
        epilog="POST /predict (see /openapi.json); GET / (the page), /ensemble, /health, /health/live, /metrics.",
    )
    add_options(parser)
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="what the members read, two names for a pair; needed where they do not say",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=_port, default=8000, help="0: any that is free (default: %(default)s)")
    for limit in fields(Limits):
        about = f"{limit.metadata['help']} (default: %(default)s)"
        parser.add_argument(f"--max-{limit.name}", type=_positive, default=limit.default, metavar="N", help=about)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; expected 0 to 65535")
    return int(text)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=1024)
    except (OSError, UnicodeError) as e:
        why = str(e.strerror if isinstance(e, OSError) else e).partition(" (")[0]  # the address was said
        raise UserError(f"--host {host} --port {port}: {why}; choose another, or --port 0 for any that is free") from e


def columns_read(ensemble: Ensemble, given: list[str] | None) -> list[str]:
    """What the members read: as they say, else as ``given``, else the preset's. ``UserError`` where it is unclear."""
    from lora_ensemble.ensemble.sources import known_columns

    record = ensemble.record
    columns = known_columns(record.task, record.kind, ensemble.text or given or [])
    if not columns:
        raise UserError("the members do not say what they read; give --columns NAME, or two names for a pair")
    if given not in (None, columns):
        raise UserError(f"--columns {' '.join(given)}: the members read {' '.join(columns)}; leave it out")
    if len(columns) > 2:
        raise UserError(f"--columns has {len(columns)} names; expected one, or two for a pair")
    return columns
