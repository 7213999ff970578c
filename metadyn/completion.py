"""Shell completion scripts, which tyro makes from all commands, studies and their options."""

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

from metadyn.study import load_study, study_names


def script(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Returns the completion script of bash or zsh for commands and the options of studies.

    After `run` it offers the options of each study's quick preset. The user sources the script, or
    puts it where the shell looks for completion scripts.
    """
    subcommands = []
    for name, command in commands.items():
        if name == "run":
            studies = reduce(operator.or_, (_study(study, command) for study in study_names()))
            fields: list[Any] = [("study", studies)]
        else:
            fields = [_field(action) for action in command._actions if action.dest != "help"]
        subcommands.append(_subcommand(name, fields))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(
            reduce(operator.or_, subcommands),
            prog="metadyn",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
        )
    return output.getvalue()


def _study(name: str, run: argparse.ArgumentParser) -> Any:
    """Returns a subcommand for a study, with the options of `metadyn run` and of the study."""
    quick = load_study(name).presets["quick"]
    config: Any = type(quick)
    unprefixed = Annotated[config, tyro.conf.arg(name="")]
    fields = [_field(action) for action in run._actions if action.dest not in ("help", "study")]
    return _subcommand(name, [*fields, ("config", unprefixed, quick)])


def _field(action: argparse.Action) -> tuple[Any, ...]:
    """Returns a command's argument as a dataclass field. One without a flag becomes a path."""
    if action.option_strings:
        return action.dest, str, ""
    return action.dest, tyro.conf.Positional[Path], Path()


def _subcommand(name: str, fields: list[Any]) -> Any:
    arguments = dataclasses.make_dataclass(name, fields, frozen=True)
    return Annotated[arguments, tyro.conf.subcommand(name)]
