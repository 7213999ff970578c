"""Completion for shells: what tyro makes of all commands, studies and their options."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import operator
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import tyro

from metadyn.study import known, load_study


def script(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Writes the completion script of bash, zsh or tcsh for commands and the options of studies.

    After `run` come the options of each study's quick preset. To be put where the shell looks for
    scripts, or sourced.
    """
    kinds = []
    for name, command in commands.items():
        if name == "run":
            studies = reduce(operator.or_, (_study(study, command) for study in known()))
            fields: list[Any] = [("study", studies)]
        else:
            fields = [_field(action) for action in command._actions if action.dest != "help"]
        kinds.append(_subcommand(name, fields))
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(
            reduce(operator.or_, kinds),
            prog="metadyn",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
        )
    return written.getvalue()


def _study(name: str, run: argparse.ArgumentParser) -> Any:
    """A study as a command of its own, with the options of `metadyn run` and its configuration."""
    quick = load_study(name).presets["quick"]
    config: Any = type(quick)
    own = Annotated[config, tyro.conf.arg(name="")]
    general = [_field(each) for each in run._actions if each.dest not in ("help", "study")]
    return _subcommand(name, [*general, ("config", own, quick)])


def _field(action: argparse.Action) -> tuple[Any, ...]:
    """An argument of a command as the field of a dataclass; those without a flag are paths."""
    if action.option_strings:
        return action.dest, str, ""
    return action.dest, tyro.conf.Positional[Path], Path()


def _subcommand(name: str, fields: list[Any]) -> Any:
    made = dataclasses.make_dataclass(name, fields, frozen=True)
    return Annotated[made, tyro.conf.subcommand(name)]
