"""Labelled arrays: how what was measured of a learner is described, and read again.

One learner on one set of tasks is an `xarray.Dataset` with dimensions [seed,] task, [outer_step,]
step and those of each reading. Its attributes are an `About`; those of each array of mode strengths
are the `Modes` that it is of. Several learners make one dataset with a dimension "learner".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from metadyn.base import STRENGTH, LearnerKind, Modes
from metadyn.errors import ConfigError, check
from metadyn.inner import recorded

ORDER = ("learner", "outer_step", "seed", "task", "mode", "step")


@dataclasses.dataclass(frozen=True)
class About:
    """Describes the learner that a measurement is of, and its place among others."""

    learner: str
    """Its name."""
    label: str
    """What figures call it."""
    kind: LearnerKind
    """What it is compared as: an ordinary learner, a meta-learner, Bayes, or a reference."""
    clock: str
    """What its time counts: "observations" or "updates"."""
    loss_floor: float
    """The loss of a learner that knows the task."""
    drawn: bool = True
    """Whether it has a place in figures."""
    place: int = 0
    """Its position among the learners of a figure, from the left, from 0."""
    title: str = ""
    """What figures call the comparison that it is part of."""
    followed: bool = True
    """Whether figures follow it over outer training."""
    seconds: float = 0.0
    """How long it was trained, up to the last outer step: on that machine, compiling left out."""


FIELDS = [field.name for field in dataclasses.fields(About)]


def describe(
    about: About,
    axes: Mapping[str, Sequence[str]],
    coords: Mapping[str, tuple[str, Sequence[float]]],
    modes: Mapping[str, Modes],
) -> dict[str, Any]:
    """Collects what is needed beside the arrays to label them, as JSON.

    Axes of each array, coordinates as {name: (axis, values)}, and modes by name of their strengths.
    """
    return {
        "about": dataclasses.asdict(about),
        "axes": {name: list(names) for name, names in axes.items()},
        "coords": {name: [axis, [float(v) for v in vs]] for name, (axis, vs) in coords.items()},
        "modes": {name: dataclasses.asdict(each) for name, each in modes.items()},
    }


def dataset(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> xr.Dataset:
    """Makes the dataset of arrays and their description."""
    axes, modes = described["axes"], described["modes"]
    data = {name: (axes[name], np.asarray(a), modes.get(name, {})) for name, a in arrays.items()}
    coords = {name: tuple(each) for name, each in described["coords"].items()}
    return xr.Dataset(data, coords, described["about"])


def about(data: xr.Dataset) -> About:
    """Tells whose measurement a dataset of one learner is."""
    attrs = of_one_learner(data).attrs
    return About(**{name: attrs[name] for name in FIELDS if name in attrs})


def probes(data: xr.Dataset) -> list[str]:
    """Names the probes that a measurement is of."""
    return [str(name) for name in data if "coordinate" in data[name].attrs]


def modes(data: xr.Dataset, probe: str = STRENGTH) -> Modes:
    """Returns the modes that a probe read. Raises `ConfigError` if there is no such probe.

    Their values are those of the coordinate, which is selected, sorted and joined as the data is.
    """
    if probe not in (known := probes(data)):
        raise ConfigError(f"probe = {probe!r}: the data has {', '.join(known) or 'none'}")
    attrs = data[probe].attrs
    said = {each.name: attrs[each.name] for each in dataclasses.fields(Modes) if each.name in attrs}
    if (coordinate := recorded(probe, said["coordinate"])) in data.coords:
        values, fix = np.atleast_1d(data[coordinate]), "select one setting, of one set of modes"
        check(values.ndim == 1, "data", dict(data.sizes), fix)
        said["values"] = values.tolist()
    return Modes(**said)


def merge(parts: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Puts several learners into one dataset: learner, outer_step, seed, task, mode, step, ….

    What does not depend on a dimension is repeated along it (Bayes has no outer step); what is
    shorter is padded with NaN, and `time` [learner, step] says what step means to each learner.
    """
    whole: dict[str, np.ndarray] = {}
    sizes = {d: n for part in parts.values() for d, n in part.sizes.items()}
    for part in parts.values():
        for d in {"outer_step", "seed"} & {*part.dims}:
            whole[str(d)] = np.union1d(whole.get(str(d), []), part[d]).astype(int)

    def complete(part: xr.Dataset) -> xr.Dataset:
        part = part.expand_dims({d: of for d, of in whole.items() if d not in part.dims})
        numbered = {d: np.arange(part.sizes.get(d, n)) for d, n in sizes.items()}
        lacking = {d: of for d, of in numbered.items() if d not in part.coords}
        return part.assign_coords(lacking).reset_coords("time")

    merged = concatenate(map(complete, parts.values()), "learner", [*parts]).set_coords("time")
    attributes = [part.attrs for part in parts.values()]
    described = [name for name in FIELDS if name not in ("learner", "seconds")]  # runs differ there
    own = [name for name in described if all(name in attrs for attrs in attributes)]
    merged = merged.assign_coords({n: ("learner", [attrs[n] for attrs in attributes]) for n in own})
    return merged.transpose(*(d for d in ORDER if d in merged.dims), ...)


def concatenate(parts: Iterable[xr.Dataset], along: str, values: Sequence[Any]) -> xr.Dataset:
    """Puts datasets side by side along a new dimension: what is shorter is padded with NaN."""
    parts, own = list(parts), set()
    if len({tuple(part["learner"].values) for part in parts if "learner" in part.dims}) > 1:
        # What is said of each learner is padded as data is: xarray takes it for a conflict.
        said = [{str(n) for n in part.coords if n not in part.dims} for part in parts]
        own = {name for names in said for name in names}
        parts = [p.reset_coords([*names]) for p, names in zip(parts, said, strict=True)]
    whole = xr.concat(
        parts,
        xr.Variable(along, values),
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
        combine_attrs="drop_conflicts",
    )
    return whole.set_coords(own)


def _repeated(array: xr.DataArray) -> bool:
    """Whether all seeds of an array, if it has any, are alike."""
    if "seed" not in array.dims:
        return True
    each = array.transpose("seed", ...).to_numpy()
    return np.array_equal(each[1:], each[:-1], equal_nan=True)


def of_one_learner(data: xr.Dataset) -> xr.Dataset:
    """Returns a dataset of one learner, without what `merge` padded and repeated.

    For one that was selected, `data.sel(learner="lstm")`. Raises `ConfigError` for several.
    """
    if "learner" not in data.coords:
        return data
    parts = split(data)
    check(len(parts) == 1, "data", [*parts], "select one learner: data.sel(learner=…)")
    return next(iter(parts.values()))


def split(data: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Takes the learners of a dataset apart, by name: what `merge` made of them is undone."""
    if not isinstance(data, xr.Dataset):
        return dict(data)
    if "learner" in data.coords and "learner" not in data.dims:  # one was selected
        data = data.expand_dims("learner")
    if "learner" not in data.dims:
        return {str(data.attrs["learner"]): data}
    parts = {}
    for name in data["learner"].values:
        part = data.sel(learner=name)
        if not np.isfinite(part["time"]).any():  # of other settings of a sweep
            continue
        part = part.isel(step=np.flatnonzero(np.isfinite(part["time"].to_numpy())))
        for dim in ("task", "seed"):
            if dim in part.dims and "loss" in part:
                there = part["loss"].notnull().any([d for d in part["loss"].dims if d != dim])
                found = np.flatnonzero(there.to_numpy())  # after the last is padding, if any is
                part = part.isel({dim: slice(found[-1] + 1 if len(found) else None)})
        attrs = {each: part[each].item() for each in FIELDS if each in part.coords}
        if attrs.get("kind", "meta") != "meta":  # `merge` repeated what has none of its own
            part = part.isel(outer_step=0, drop=True, missing_dims="ignore")
            if "seed" in part.dims and all(map(_repeated, part.data_vars.values())):
                part = part.isel(seed=0, drop=True)
        if "closed_form" in part:  # of no seed and no task
            curve = part["closed_form"]
            part["closed_form"] = curve.isel(
                {dim: 0 for dim in curve.dims if dim not in ("step", "mode")}, drop=True
            )
        # What a learner lacks. Its loss and modes it has: they are NaN where it diverged.
        lacking = set(part) - {"loss", *probes(part)}
        empty = [v for v in lacking if part[v].isnull().all()]
        part = part.drop_vars([*attrs, *empty])
        parts[str(name)] = part.assign_attrs(attrs)
    return parts
