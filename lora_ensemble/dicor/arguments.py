"""A dataclass as options of a command: a field's type says what the option takes, the text below it is its help."""

from __future__ import annotations

import argparse
import ast
import collections.abc
import inspect
import itertools
import textwrap
from dataclasses import MISSING, fields
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add an option for each field of a dataclass; a name's last underscore is no part of it.

    bool: a flag. Sequence: one value or more, without --name where there is no default. Literal: a choice.
    ``Annotated[type, metavar]``, or ``Annotated[type, metavar, function]`` where the function reads the text.
    """
    hints, texts = get_type_hints(options, include_extras=True), _texts_below(options)
    for field in fields(options):
        hint, required = hints[field.name], field.default is MISSING
        option: dict[str, Any] = {"help": texts[field.name]}
        if NoneType in get_args(hint):
            hint = next(part for part in get_args(hint) if part is not NoneType)
        if get_origin(hint) is collections.abc.Sequence:
            hint, option["nargs"] = get_args(hint)[0], "+"
        if get_origin(hint) is Annotated:
            hint, option["metavar"], *function = get_args(hint)
            hint = function[0] if function else hint
        if hint is bool:
            option["action"] = "store_true"
        elif get_origin(hint) is Literal:
            option["choices"] = get_args(hint)
        else:
            option["type"] = hint
        if required and "nargs" in option:
            parser.add_argument(field.name, **option)
        else:
            option |= {"required": True} if required else {"default": field.default}
            parser.add_argument("--" + field.name.rstrip("_").replace("_", "-"), dest=field.name, **option)


def options_of(given: argparse.Namespace, options: type[T]) -> T:
    """The dataclass with the values that were given for its fields."""
    return options(**{field.name: getattr(given, field.name) for field in fields(options)})  # type: ignore[arg-type]


def _texts_below(options: type) -> dict[str, str]:
    """The text below each field of a dataclass, which Python does not keep."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
