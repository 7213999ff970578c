"""Checks of user input, and the errors and warnings about bad input."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args


class ConfigError(Exception):
    """Error about bad input. Its one-line message names the field, the value and the hint.

    `field`, `value` and `hint` are also attributes, where they are known, so that the command line
    can name the option as it was typed.
    """

    def __init__(self, message: str = "", field: str = "", value: Any = None, hint: str = ""):
        super().__init__(message)
        self.field, self.value, self.hint = field, value, hint


LONGEST = 200
"""Number of characters at which a message cuts a value, or the text of another error."""


class ConfigWarning(UserWarning):
    """Warning about input that runs, but hardly as intended. It names the field and the value."""


def check(holds: Any, field: str, value: Any, hint: str) -> None:
    """Raises `ConfigError` naming the field, the value and the hint unless `holds` is true."""
    if not holds:
        typed = field.startswith("--")
        text = " ".join(str(value).split() if typed else repr(value).split())
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
        raise ConfigError(f"{field}{' ' if typed else ' = '}{text}: {hint}", field, value, hint)


@contextmanager
def error_context(what: str, *kept: type[BaseException]) -> Iterator[None]:
    """Turns an error raised inside into a `ConfigError`, in one line that begins with `what`.

    Wraps calls of a user's own code. A subclass of `ConfigError` keeps its type. Errors of the
    types `kept` pass unchanged.
    """
    try:
        yield
    except kept:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ConfigError):  # one line already; cutting it would lose the hint
            raise type(error)(f"{what} ({message})") from error
        raise ConfigError(f"{what} ({message[:LONGEST]})") from error


def check_unique(names: Sequence[Any], field: str, hint: str) -> None:
    """Raises `ConfigError` if a name repeats, with the field, the first such name and the hint."""
    for name in names:
        check(names.count(name) == 1, field, name, hint)


def check_seed(seed: Any, field: str = "seed") -> None:
    """Raises `ConfigError` unless a seed is from 0 to 2³² - 1, where each has its own JAX key."""
    valid = isinstance(seed, numbers.Integral) and 0 <= int(seed) < 2**32
    check(valid, field, seed, f"must be a whole number from 0 to {2**32 - 1}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion of the nearest known name, "; did you mean 'sgd'?", or ""."""
    matches = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_name(name: str, what: str) -> None:
    """Raises `ConfigError` unless a stored folder of arrays can have the name."""
    well_formed = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
    valid = well_formed and not re.search(r"\.(part|damaged)", name)
    hint = "must be made of letters, digits, '_', '-' and '.', without '.part' and '.damaged'"
    check(valid, f"name of a {what}", name, hint)


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Raises `ConfigError` unless a field's value is one of the values of a `Literal` type."""
    check(value in get_args(choices), field, value, f"choose from {', '.join(get_args(choices))}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises `ConfigError` unless each named field of `config` is a number above zero.

    A field of type int takes only whole numbers. Integers must be below 2³¹, to fit into 32 bits.
    """
    int_fields = {field.name for field in dataclasses.fields(config) if field.type in (int, "int")}
    for field in fields:
        value = getattr(config, field)
        if field in int_fields:
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            check(whole, field, value, "must be a whole number")
        check(isinstance(value, numbers.Real), field, value, "must be a number")
        check(0 < value < float("inf"), field, value, "must be positive and finite")
        fits_int32 = not isinstance(value, numbers.Integral) or int(value) < 2**31
        check(fits_int32, field, value, f"must be below {2**31}")
