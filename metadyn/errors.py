"""Bad input: how it is checked for, and what is said of it."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args


class ConfigError(Exception):
    """Bad input, described in one line that names the field, the value and the fix.

    `field`, `value` and `fix` are kept apart where they are known, so that the command line can
    name the option as it was typed.
    """

    def __init__(self, message: str = "", field: str = "", value: Any = None, fix: str = ""):
        super().__init__(message)
        self.field, self.value, self.fix = field, value, fix


LONGEST = 200
"""Characters of a value, or of another error, that are said of it in a line."""


class ConfigWarning(UserWarning):
    """Input that can be run, but hardly as meant. One line that names the field and the value."""


def check(holds: Any, field: str, value: Any, fix: str) -> None:
    """Raises `ConfigError` naming the field, the value and the fix unless `holds`."""
    if not holds:
        typed = field.startswith("--")
        said = " ".join(str(value).split() if typed else repr(value).split())
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
        raise ConfigError(f"{field}{' ' if typed else ' = '}{said}: {fix}", field, value, fix)


@contextmanager
def error_context(what: str, *kept: type[BaseException]) -> Iterator[None]:
    """Raises whatever goes wrong inside as a `ConfigError`, in one line that begins with `what`.

    For code that is a user's own. A subclass of `ConfigError` stays what it is; errors of the kinds
    `kept` are raised as they are.
    """
    try:
        yield
    except kept:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ConfigError):  # a line already, whose end is the fix
            raise type(error)(f"{what} ({said})") from error
        raise ConfigError(f"{what} ({said[:LONGEST]})") from error


def check_unique(names: Sequence[Any], field: str, fix: str) -> None:
    """Raises `ConfigError` naming the field, the first name that comes twice, and the fix."""
    for name in names:
        check(names.count(name) == 1, field, name, fix)


def check_seed(seed: Any, field: str = "seed") -> None:
    """Raises `ConfigError` unless JAX can make a key of a seed that it makes of no other."""
    right = isinstance(seed, numbers.Integral) and 0 <= int(seed) < 2**32
    check(right, field, seed, f"must be a whole number from 0 to {2**32 - 1}")


def meant(name: str, known: Iterable[str]) -> str:
    """Words a hint at the nearest known name, "; did you mean 'sgd'?", or nothing."""
    near = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_name(name: str, what: str) -> None:
    """Raises `ConfigError` unless a name can be that of a folder of arrays."""
    words = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
    right = words and not re.search(r"\.(part|damaged)", name)
    fix = "must be made of letters, digits, '_', '-' and '.', without '.part' and '.damaged'"
    check(right, f"name of a {what}", name, fix)


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Raises `ConfigError` unless a field's value is one of those of a `Literal` type."""
    check(value in get_args(choices), field, value, f"choose from {', '.join(get_args(choices))}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises `ConfigError` unless each named field of `config` is a number above zero.

    A field of type int takes whole numbers alone, and those that JAX can count to, in 32 bits.
    """
    whole = {field.name for field in dataclasses.fields(config) if field.type in (int, "int")}
    for field in fields:
        value = getattr(config, field)
        if field in whole:
            check(isinstance(value, numbers.Integral), field, value, "must be a whole number")
        check(isinstance(value, numbers.Real), field, value, "must be a number")
        check(0 < value < float("inf"), field, value, "must be positive and finite")
        countable = not isinstance(value, int) or value < 2**31
        check(countable, field, value, f"must be below {2**31}")
