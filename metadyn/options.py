"""Options: the settings of a study as typed on the command line, such as --domain.sigma 0.2."""

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

from metadyn.errors import ConfigError, did_you_mean, error_context

_REWORDINGS = {
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
"""Patterns of tyro's messages about bad values, and our clearer wording of each."""


def configured(default: Any, overrides: Sequence[str], beside: Sequence[str] = ()) -> Any:
    """Applies command-line overrides, such as ["--domain.sigma", "0.2"], to `default`.

    Returns None if only help was asked for (and printed). Raises `ConfigError` for values that do
    not parse and for unknown options, and suggests an option of `default` or one in `beside`.
    """
    import tyro

    stderr, context = io.StringIO(), "the study's configuration cannot take these options"
    passed_on = ConfigError, SystemExit, BrokenPipeError  # the last: nobody reads the help
    try:  # a user's own configuration may raise anything
        with contextlib.redirect_stderr(stderr), error_context(context, *passed_on):
            config = tyro.cli(
                type(default),
                prog="metadyn run STUDY",
                default=default,
                args=list(overrides),
                config=(tyro.conf.FlagConversionOff,),
                registry=_matrix_registry(),
            )
        sys.stderr.write(stderr.getvalue())  # our own warnings
        return config
    except ConfigError as error:
        raise as_typed(error, default, overrides) from None
    except SystemExit as stop:
        if not stop.code:
            return None
        text = re.sub(r"\x1b\[[0-9;]*m|[─━╭╮╰╯│┃┏┓┗┛]|-{3,}", " ", stderr.getvalue())
        headings = r"^\s*(Value error|Parsing error|Missing argument|Unrecognized options)\s"
        text = re.sub(headings, "", text)
        text = re.split(r"For full helptext|Argument helptext|Perhaps you meant", text)[0]
        message, suggestion, defaults = " ".join(text.split()), "", dict(options_of(default))
        for pattern, wording in _REWORDINGS.items():
            message = re.sub(pattern, wording, message)
        stray = re.match(r"Unrecognized options: ([^\s,]+)", message)
        for option, values in _typed(overrides).items():
            first, *rest = values.split() or [""]
            nested = [name for name in defaults if name.startswith(f"{option}.")]
            if nested:  # --lstm hidden lacks a dot
                suggestion = suggestion or did_you_mean(f"{option}.{first}", nested)
            elif option not in defaults:
                suggestion = suggestion or did_you_mean(option, [*defaults, *beside])
            elif stray and stray[1] in rest and not isinstance(defaults[option], tuple):
                hint = "takes one value; several, unquoted, are for `metadyn sweep`"
                message = f"{option} {values}: {hint}"
        raise ConfigError(message + suggestion) from None


def _matrix_registry() -> Any:
    """Returns the registry by which tyro reads a matrix as JSON: [[1, 0], [0, 2]], or null."""
    import tyro

    from metadyn.domains.linear import Matrix

    registry = tyro.constructors.ConstructorRegistry()

    def parse(texts: list[str]) -> Any:
        try:
            rows = json.loads(texts[0])
            return None if rows is None else tuple(tuple(map(float, row)) for row in rows)
        except (ValueError, TypeError, RecursionError):
            message = f"give rows such as [[1, 0], [0, 2]], not {texts[0]!r}"
            raise ValueError(message) from None

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

    If none was typed, the error names the option that sets the value. Errors that concern no option
    are returned unchanged.
    """
    ending = error.field.removeprefix("--").replace("_", "-")
    values = {o: v for o, v in options_of(config) if ending and f".{o[2:]}".endswith(f".{ending}")}
    typed = _typed(overrides)

    group = lambda option: option.rpartition(".")[0]
    typed_groups = {*map(group, typed)}

    def evidence(option: str) -> tuple[bool, bool, bool, bool]:
        """Returns signs, best first, that the error is about this option, not one ending alike."""
        text = typed.get(option)
        matches = text is not None and _denotes(text, error.value)
        in_config = values[option] == error.value
        return matches, in_config, text is not None, group(option) in typed_groups

    best = max(values, key=evidence, default=None)
    if best is None or not (any(evidence(best)[:3]) or error.value is None):
        return error
    return ConfigError(f"{best} {typed.get(best, values[best])}: {error.hint}")


def _typed(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the text typed after each option, keyed by option."""
    words = [part for word in overrides for part in word.split("=", int(word.startswith("--")))]
    starts = [i for i, word in enumerate(words) if re.match("--|[–—]|-(?!inf|nan)[a-z]", word)]
    return {
        words[i].replace("_", "-"): " ".join(words[i + 1 : end])
        for i, end in pairwise([*starts, len(words)])
    }


def _denotes(text: str, value: Any) -> bool:
    """Tells whether an option's text denotes a value."""
    with contextlib.suppress(ValueError):
        return text == str(value) or float(text) == value
    return False


def options_of(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yields every option of a configuration, a dataclass or its JSON, with its value."""
    names = [*config] if isinstance(config, dict) else [f.name for f in dataclasses.fields(config)]
    for name in names:  # `asdict` would copy values, and some of a user's may not be copied
        value = config[name] if isinstance(config, dict) else getattr(config, name)
        option = prefix + str(name).replace("_", "-")
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            yield from options_of(value, f"{option}.")
        else:
            yield option, value
