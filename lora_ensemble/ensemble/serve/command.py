"""``lora-ensemble serve``: its options, and the process that serves."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
import sys
from collections.abc import Sequence

from lora_ensemble.ensemble.serve.limits import Limits
from lora_ensemble.errors import ANY_BASE, Parser, UserError

_GRACE_S = 60  # what is asked when it is stopped is answered for so long
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def run(argv: Sequence[str]) -> int:
    """Serve until a signal says to stop; returns the exit code."""
    args = _parser().parse_args(argv)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve: {' and '.join(missing)} not installed; run: pip install 'lora-ensemble[serve]'")
    with _listen(args.host, args.port) as listening:  # before the members are read: a port in use shows at once
        import uvicorn

        from lora_ensemble.bank.precision import advice
        from lora_ensemble.ensemble.restored import Ensemble
        from lora_ensemble.ensemble.serve.app import make_app

        limits = Limits(
            texts=args.max_texts,
            chars=args.max_chars,
            bytes=args.max_bytes,
            batch=args.max_batch,
            waiting=args.max_waiting,
        )
        ensemble = Ensemble.load(
            args.ensemble, pool=args.pool, device=args.device, precision=args.precision, any_base=args.any_base
        )
        if note := advice(args.precision, ensemble.device.type, instead="--precision 32"):
            print(note, file=sys.stderr)
        columns = _columns(ensemble.text, args.columns, ensemble.record.task, ensemble.record.kind)
        ensemble.logits(["" if len(columns) == 1 else ("", "")])  # what is made once is made before the first client
        address = listening.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if not local:
            print(
                f"warning: --host {args.host}: whoever reaches this machine may ask: no password, no encryption",
                file=sys.stderr,
            )
        # On loopback, a page of another site could reach it under a name of its own that it lets point here.
        hosts = (*_LOOPBACK, host) if local else ("*",)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(ensemble, columns, limits, hosts=hosts),
                log_config=None,  # warnings and errors go to stderr
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        print(
            f"{ensemble.record.task}, {ensemble.record.size} members: http://{host}:{address[1]}/ (Ctrl+C stops it)",
            flush=True,
        )
        server.run(sockets=[listening])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lora-ensemble serve",
        description="Answer over HTTP what an ensemble decides about new text, with a page to try it.",
        epilog="POST /predict (see /openapi.json); GET / (the page), /ensemble, /health, /health/live, /metrics.",
    )
    parser.add_argument("--ensemble", required=True, metavar="FILE", help="what dicor select --output wrote")
    parser.add_argument("--pool", metavar="DIR", help="where the members are, if no longer where the file says")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="what the members read, two names for a pair; needed where they do not say",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=_port, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (default): a GPU where there is one"
    )
    parser.add_argument("--precision", default="32", help="32 (default) or bf16")
    parser.add_argument("--any-base", action="store_true", help=ANY_BASE)
    for name, about in (
        ("texts", "texts of a request"),
        ("chars", "characters of a text"),
        ("bytes", "bytes of a request"),
        ("batch", "texts of several requests that are answered in one call; 1: none are put together"),
        ("waiting", "texts that may wait; beyond, requests are told to come again"),
    ):
        default = getattr(Limits, name)
        parser.add_argument(
            f"--max-{name}", type=_positive, default=default, metavar="N", help=f"{about} (default: %(default)s)"
        )
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


def _columns(said: list[str], given: list[str] | None, task: str, kind: str) -> list[str]:
    """Names of what the members read: as they say, else as given, else those of the preset of this name."""
    from lora_ensemble.tasks import PRESETS

    preset = PRESETS.get(task)
    known = said or given or (preset.text if preset is not None and preset.kind == kind else [])
    if not known:
        raise UserError("the members do not say what they read; give --columns NAME, or two names for a pair")
    if given not in (None, known):
        raise UserError(f"--columns {' '.join(given)}: the members read {' '.join(known)}; leave it out")
    if len(known) > 2:
        raise UserError(f"--columns has {len(known)} names; expected one, or two for a pair")
    return known
