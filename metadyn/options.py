"""Options: the settings of a study as they are typed, such as --domain.sigma 0.2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from metadyn.errors import ConfigError, error_context, meant

_CLEARER = {
    r".*invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\s*\.": (
        r"\2 \1: choose from \3"
    ),
    r"Missing value for argument '(.*)'\. Expected .*": r"\1: give it a value",
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'": (
        r"\1 \2: must be a whole number"
    ),
    r"Error parsing (\S+): no type matching \{None\}\|FLOAT could .* from \['(.*?)'\]\..*": (
        r"\1 \2: must be a number, or None"
    ),
    r"Error parsing (\S+): could not convert string to float: '(.*)'": r"\1 \2: must be a number",
}
"""What tyro says of bad values, and how we say it."""


def configured(default: Any, overrides: Sequence[str], beside: Sequence[str] = ()) -> Any:
    """Applies command-line overrides, such as ["--domain.sigma", "0.2"], to `default`.

    None when only help was asked for (and printed). Raises `ConfigError` for values that do not
    parse and for unknown names, with a hint at a known one or at one that is `beside` them.
    """
    import tyro

    errors, what = io.StringIO(), "the study's configuration takes no such options"
    try:  # a configuration of the user's own may go wrong in any way
        with contextlib.redirect_stderr(errors), error_context(what, ConfigError, SystemExit):
            found = tyro.cli(
                type(default),
                prog="metadyn run STUDY",
                default=default,
                args=list(overrides),
                config=(tyro.conf.FlagConversionOff,),
                registry=_matrices(),
            )
        sys.stderr.write(errors.getvalue())  # our own warnings
        return found
    except ConfigError as error:
        raise as_typed(error, default, overrides) from None
    except SystemExit as stop:
        if not stop.code:
            return None
        text = re.sub(r"\x1b\[[0-9;]*m|[─━╭╮╰╯│┃┏┓┗┛]|-{3,}", " ", errors.getvalue())
        headings = r"^\s*(Value error|Parsing error|Missing argument|Unrecognized options)\s"
        text = re.sub(headings, "", text)
        text = re.split(r"For full helptext|Argument helptext|Perhaps you meant", text)[0]
        said, hint, known = " ".join(text.split()), "", dict(options_of(default))
        for form, clearer in _CLEARER.items():
            said = re.sub(form, clearer, said)
        stray = re.match(r"Unrecognized options: ([^\s,]+)", said)
        for option, values in _typed(overrides).items():
            first, *others = values.split() or [""]
            inside = [name for name in known if name.startswith(f"{option}.")]
            if inside:  # --lstm hidden lacks a dot
                hint = hint or meant(f"{option}.{first}", inside)
            elif option not in known:
                hint = hint or meant(option, [*known, *beside])
            elif stray and stray[1] in others and not isinstance(known[option], tuple):
                fix = "takes one value; several, unquoted, are for `metadyn sweep`"
                said = f"{option} {values}: {fix}"
        raise ConfigError(said + hint) from None


def _matrices() -> Any:
    """How matrices are given on the command line: as JSON, [[1, 0], [0, 2]], or null."""
    import tyro

    from metadyn.domains.linear import Matrix

    registry = tyro.constructors.ConstructorRegistry()

    def parse(texts: list[str]) -> Any:
        try:
            rows = json.loads(texts[0])
            return None if rows is None else tuple(tuple(map(float, row)) for row in rows)
        except (ValueError, TypeError, RecursionError):
            said = f"give rows such as [[1, 0], [0, 2]], not {texts[0]!r}"
            raise ValueError(said) from None

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if info.type != Matrix:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="[[ROW],[ROW],...]",
            instance_from_str=parse,
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def as_typed(error: ConfigError, config: Any, overrides: Sequence[str]) -> ConfigError:
    """Rewords an error so that it names the option as typed: --domain.sigma -1: must be positive.

    If it was not typed, it names the option that would set it. Errors about anything else remain.
    """
    ending = error.field.removeprefix("--").replace("_", "-")
    values = {o: v for o, v in options_of(config) if ending and f".{o[2:]}".endswith(f".{ending}")}
    typed = _typed(overrides)

    group = lambda option: option.rpartition(".")[0]
    groups = {*map(group, typed)}

    def likely(option: str) -> tuple[bool, bool, bool, bool]:
        """Reckons how surely this is the option complained of, of several that end alike."""
        text = typed.get(option)
        meant = text is not None and _reads_as(text, error.value)
        return meant, values[option] == error.value, text is not None, group(option) in groups

    best = max(values, key=likely, default=None)
    if best is None or not (any(likely(best)[:3]) or error.value is None):
        return error
    return ConfigError(f"{best} {typed.get(best, values[best])}: {error.fix}")


def _typed(overrides: Sequence[str]) -> dict[str, str]:
    """The value of each option, as it was typed."""
    words = [part for word in overrides for part in word.split("=", int(word.startswith("--")))]
    starts = [i for i, word in enumerate(words) if re.match("--|[–—]|-(?!inf|nan)[a-z]", word)]
    return {
        words[i].replace("_", "-"): " ".join(words[i + 1 : end])
        for i, end in pairwise([*starts, len(words)])
    }


def _reads_as(text: str, value: Any) -> bool:
    """Whether an option's text is that of a value."""
    with contextlib.suppress(ValueError):
        return text == str(value) or float(text) == value
    return False


def options_of(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Lists every option of a configuration, a dataclass or as JSON, with its value."""
    names = [*config] if isinstance(config, dict) else [f.name for f in dataclasses.fields(config)]
    for name in names:
        value = config[name] if isinstance(config, dict) else getattr(config, name)
        option = prefix + str(name).replace("_", "-")
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            yield from options_of(value, f"{option}.")
        else:
            yield option, value
