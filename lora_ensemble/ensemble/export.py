"""``lora-ensemble export``: an ensemble, or one of its members, as a folder to take away, and on the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ensemble.ensemble.options import ANY_BASE
from lora_ensemble.errors import Parser, UserError
from lora_ensemble.tasks import SCORES

if TYPE_CHECKING:
    from lora_ensemble.ensemble.folder import Contents


def run(argv: Sequence[str]) -> int:
    """Write the folder, and say what is in it; returns the exit code. ``UserError`` for a mistake of the user's."""
    if "--merge" in argv:
        raise UserError(
            "--merge is gone: one model of an ensemble's averaged adapters is not that ensemble; train one on what the "
            "ensemble says (lora-ensemble distill --ensemble FILE), or export the whole ensemble (without --merge)"
        )
    args = _parser().parse_args(list(argv))
    _check(args)
    hub = _hub(args.push) if args.push else None
    from lora_ensemble.ensemble.folder import whole_folder, write_card, write_ensemble
    from lora_ensemble.ensemble.sources import read_source

    with whole_folder(args.output, overwrite=args.overwrite) as folder:
        if args.member:
            contents = _write_member(args, folder)
        else:
            source, base = read_source(args.ensemble, args.pool), not args.without_base
            contents = write_ensemble(
                folder, source, with_base=base, with_examples=args.with_examples, any_base=args.any_base
            )
        write_card(folder, args.output.name, contents)
    if ensemble := contents.ensemble:
        print(f"{ensemble.size} members of {ensemble.task}, chosen by {ensemble.method}")
    else:
        what = "merged into its base model" if contents.form == "merged" else "a PEFT adapter"
        print(f"{args.member}: {what} over {contents.bases[0].name}")
    print(f"saved {args.output} ({sum(f.stat().st_size for f in args.output.rglob('*') if f.is_file()) / 1e6:.1f} MB)")
    if hub is not None:
        print(f"pushed to {_push(hub, args.output, args.push, private=args.private)}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lora-ensemble export",
        description="A whole ensemble as a folder that Ensemble.load reads anywhere (--ensemble FILE), or one member "
        "(--member NAME --pool DIR --task T). Each has a model card, README.md.",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--ensemble", type=Path, metavar="FILE", help="what dicor select wrote, or an exported folder")
    add("--pool", type=Path, metavar="DIR", help="the pool, if not where the record says")
    add("--without-base", action="store_true", help="leave the base model out; it is then taken from the hub")
    add("--with-examples", action="store_true", help="also ids and labels of dev, for dicor apply")
    add("--member", metavar="NAME", help="one member of --pool and --task")
    add("--task", help="the member's task")
    add("--format", choices=("peft", "merged"), help="of a member: PEFT's (default), or a plain transformers model")
    add("--any-base", action="store_true", help=ANY_BASE)
    add("--overwrite", action="store_true", help="replace a folder that this command wrote")
    add("--push", metavar="USER/NAME", help="send the folder to the Hugging Face hub, too")
    add("--private", action="store_true", help="with --push: as a private repository, if it is new")
    return parser


def _check(args: argparse.Namespace) -> None:
    """``UserError`` for options that do not go together."""
    if (args.ensemble is None) == (args.member is None):
        raise UserError("export: expected either --ensemble FILE, or --member NAME with --pool DIR and --task T")
    if args.member and not (args.pool and args.task):
        raise UserError(f"--member {args.member}: also needs --pool DIR and --task T")
    needs = {"without_base": "ensemble", "with_examples": "ensemble", "task": "member", "format": "member"}
    for name, wanted in {**needs, "private": "push"}.items():
        if getattr(args, name) and not getattr(args, wanted):
            raise UserError(f"--{name.replace('_', '-')}: is for --{wanted}")


def _write_member(args: argparse.Namespace, folder: Path) -> Contents:
    from lora_ensemble import pool
    from lora_ensemble.ensemble.single import write_member

    r = pool.read_record(args.pool, args.task, args.member)
    if r is None:
        names = [r.name for r in pool.read_records(args.pool, args.task)]
        members = ", ".join(names[:3]) + ", ..." * (len(names) > 3) or "none"
        where = pool.member_folder(args.pool, args.task, args.member)
        raise UserError(f"{where}: no such member; members of this task: {members}")
    contents = write_member(folder, args.pool, r, merged=args.format == "merged", any_base=args.any_base)
    if not r.finished:
        why = "it diverged" if r.diverged else "its training had not ended"
        print(f"lora-ensemble: notice: {r.name} is not finished: {why}", file=sys.stderr)
    if (score := SCORES[r.scored_by]).offsets:
        what = (
            f"decides for its largest probability: offsets for {score.words} are an ensemble's, and this form has none"
        )
        print(f"lora-ensemble: notice: {r.name} {what}", file=sys.stderr)
    return contents


def _hub(repo: str) -> Any:
    """The hub's client, to be asked for before the work: ``UserError`` for a wrong name, offline or not logged in."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--push {repo!r}: not the name of a repository ({e}); expected USER/NAME") from e
    if constants.is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or push later")
    if get_token() is None:
        raise UserError(f"--push {repo}: not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    return HfApi()


def _push(hub: Any, folder: Path, repo: str, *, private: bool) -> str:
    """Send a folder to ``repo``, made if need be; returns its address. Where the hub refuses, the folder stays."""
    from huggingface_hub.errors import HTTPError

    try:
        # None keeps a repository that is there as visible as it is.
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="lora-ensemble export")
    except (OSError, HTTPError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"--push {repo}: {reason[:300]}; {folder} is written: send it later with `hf upload {repo} {folder}`"
        ) from e
    return str(address)
