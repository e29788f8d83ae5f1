"""``lora-ensemble export``: an ensemble, or one of its members, as a folder to take away."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ensemble.errors import ANY_BASE, Parser, UserError

if TYPE_CHECKING:
    pass

DESCRIPTION = """\
A whole ensemble as a folder that Ensemble.load reads anywhere (--ensemble FILE), or one member (--member NAME --pool
DIR --task T). Each has a model card, README.md."""


def run(argv: Sequence[str]) -> int:
    """Write the folder, and say what is in it; returns the exit code. ``UserError`` for a mistake of the user's."""
    if "--merge" in argv:
        raise UserError(
            "--merge is gone: one model of an ensemble's averaged adapters is not that ensemble; train one on what the "
            "ensemble says (lora-ensemble distill --ensemble FILE), or export the whole ensemble (without --merge)"
        )
    args = _parser().parse_args(list(argv))
    _check(args)
    api = None
    if args.push:
        from lora_ensemble.ensemble import push

        api = push.check(args.push)

    from lora_ensemble.ensemble.folder import whole_folder

    with whole_folder(args.output, overwrite=args.overwrite) as folder:
        said = _member(args, folder) if args.member else _ensemble(args, folder)
    for line in said:
        print(line)
    print(f"saved {args.output} ({sum(f.stat().st_size for f in args.output.rglob('*') if f.is_file()) / 1e6:.1f} MB)")
    if api is not None:
        print(f"pushed to {push.push(api, args.output, args.push, private=args.private)}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lora-ensemble export", description=DESCRIPTION)
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
    for names, wanted, why in (
        (("without_base", "with_examples"), args.ensemble, "is for --ensemble"),
        (("task", "format"), args.member, "is for --member"),
        (("private",), args.push, "is for --push"),
    ):
        for name in names:
            if getattr(args, name) and not wanted:
                raise UserError(f"--{name.replace('_', '-')}: {why}")


def _member(args: argparse.Namespace, folder: Path) -> list[str]:
    from lora_ensemble import pool
    from lora_ensemble.ensemble import card
    from lora_ensemble.ensemble.folder import CARD, find_bases
    from lora_ensemble.ensemble.restored import check_weights
    from lora_ensemble.ensemble.single import known_columns, member_of, plain_model, write_merged, write_peft
    from lora_ensemble.tasks import Task

    r = pool.read_record(args.pool, args.task, args.member)
    if r is None:
        names = [r.name for r in pool.read_records(args.pool, args.task)]
        found = ", ".join(names[:3]) + ", ..." * (len(names) > 3) or "none"
        where = pool.member_folder(args.pool, args.task, args.member)
        raise UserError(f"{where}: no such member; members of this task: {found}")
    check_weights([r], args.pool)
    (base,) = find_bases([r], {}, any_base=args.any_base).values()
    text = known_columns(r.task, r.kind, r.text)
    task = Task(name=r.task, kind=r.kind, text=text or ["text"], label_names=r.labels)
    single = member_of(args.pool, r, task, base, any_base=args.any_base)
    merged = args.format == "merged"
    if merged:
        write_merged(folder, single, plain_model(single))
    else:
        write_peft(folder, single)
    if not r.finished:
        why = "it diverged" if r.diverged else "its training had not ended"
        print(f"lora-ensemble: notice: {r.name} is not finished: {why}", file=sys.stderr)
    page = card.single_card(
        args.output.name,
        task,
        base,
        [r],
        text=text,
        merged_format=merged,
        max_length=single.max_length,
        examples=r.examples.get("dev"),
        about=card.about_member(r),
    )
    (folder / CARD).write_text(page, encoding="utf-8")
    return [f"{r.name}: {'merged into its base model' if merged else 'a PEFT adapter'} over {base.name}"]


def _ensemble(args: argparse.Namespace, folder: Path) -> list[str]:
    from lora_ensemble.dicor.located import chosen_records, locate
    from lora_ensemble.ensemble import bundle, card
    from lora_ensemble.ensemble.folder import CARD, find_bases, read_bases
    from lora_ensemble.ensemble.restored import check_weights, text_columns
    from lora_ensemble.ensemble.single import known_columns

    found = locate(args.ensemble, args.pool)
    chosen, members = found.ensemble, found.pool
    records = chosen_records(chosen, members)
    check_weights(records, members)
    bases = find_bases(records, read_bases(found, records), any_base=args.any_base)
    text = known_columns(chosen.task, chosen.kind, text_columns(records, members))
    bundle.write_ensemble(
        folder,
        chosen,
        members,
        records,
        text=text,
        bases=bases,
        with_base=not args.without_base,
        with_examples=args.with_examples,
        any_base=args.any_base,
    )
    page = card.ensemble_card(
        args.output.name,
        chosen,
        records,
        text=text,
        max_length=min(bundle.longest_of(r, bases) for r in records),
        bases=bases,
        with_base=not args.without_base,
        with_examples=args.with_examples,
    )
    (folder / CARD).write_text(page, encoding="utf-8")
    return [f"{chosen.size} members of {chosen.task}, chosen by {chosen.method}"]
