"""Labelled arrays: describes the measurements of a learner, and reads the description back.

The measurements of one learner on one set of tasks are an `xarray.Dataset` with dimensions [seed,]
task, [outer_step,] step and those of each reading. Its attributes are the fields of `About`; the
attributes of each array of mode strengths are the fields of its `Modes`. Several learners make one
dataset with a dimension "learner".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from metadyn.base import STRENGTH, LearnerKind, Modes
from metadyn.errors import ConfigError, check
from metadyn.inner import reading_name

ORDER = ("learner", "outer_step", "seed", "task", "mode", "step")


@dataclasses.dataclass(frozen=True)
class About:
    """Describes the learner of a measurement, and its place in figures."""

    learner: str
    """Its name."""
    label: str
    """Its name in figures."""
    kind: LearnerKind
    """Its part in comparisons: an ordinary learner, a meta-learner, Bayes, or a reference."""
    clock: str
    """What its time counts: "observations" or "updates"."""
    loss_floor: float
    """The loss of a learner that knows the task."""
    drawn: bool = True
    """Whether figures show it."""
    place: int = 0
    """Its position among the learners of a figure, counted from the left, from 0."""
    title: str = ""
    """Title of its comparison in figures."""
    followed: bool = True
    """Whether figures follow it over outer training."""
    seconds: float = 0.0
    """Seconds that its training took up to the last outer step, without compiling, on its machine.
    """


FIELDS = [field.name for field in dataclasses.fields(About)]


def describe(
    about: About,
    axes: Mapping[str, Sequence[str]],
    coords: Mapping[str, tuple[str, Sequence[float]]],
    modes: Mapping[str, Modes],
) -> dict[str, Any]:
    """Collects in JSON form what `dataset` needs to label arrays.

    `axes` maps each array to its axes, `coords` each coordinate to (axis, values), and `modes` each
    array of mode strengths to its modes, whose values are one more coordinate.
    """
    coords = {**coords}
    for name, of_probe in modes.items():
        coordinate, axis = (reading_name(name, n) for n in (of_probe.coordinate, "mode"))
        coords[coordinate] = (axis, of_probe.values)
    return {
        "about": dataclasses.asdict(about),
        "axes": {name: list(names) for name, names in axes.items()},
        "coords": {name: [axis, [float(v) for v in vs]] for name, (axis, vs) in coords.items()},
        "modes": {name: dataclasses.asdict(value) for name, value in modes.items()},
    }


def dataset(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> xr.Dataset:
    """Makes a labelled dataset from arrays and their description (`describe`)."""
    axes, modes = described["axes"], described["modes"]
    data = {name: (axes[name], np.asarray(a), modes.get(name, {})) for name, a in arrays.items()}
    coords = {name: tuple(pair) for name, pair in described["coords"].items()}
    return xr.Dataset(data, coords, described["about"])


def about(data: xr.Dataset) -> About:
    """Returns the description of the learner in a dataset of one learner."""
    attrs = of_one_learner(data).attrs
    return About(**{name: attrs[name] for name in FIELDS if name in attrs})


def probes(data: xr.Dataset) -> list[str]:
    """Lists the names of the probes whose readings a dataset holds."""
    return [str(name) for name in data if "coordinate" in data[name].attrs]


def modes(data: xr.Dataset, probe: str = STRENGTH) -> Modes:
    """Returns the modes that a probe reads. Raises `ConfigError` if the data has no such probe.

    Their values come from the coordinate, which xarray selects, sorts and joins with the data.
    """
    if probe not in (known := probes(data)):
        raise ConfigError(f"probe = {probe!r}: the data has {', '.join(known) or 'none'}")
    attrs = data[probe].attrs
    fields = {f.name: attrs[f.name] for f in dataclasses.fields(Modes) if f.name in attrs}
    coordinate, hint = reading_name(probe, fields["coordinate"]), "which has the modes' values"
    check(coordinate in data.coords, "data", [*data.coords], f"must keep {coordinate!r}, {hint}")
    values, hint = np.atleast_1d(data[coordinate]), "select one setting, with one set of modes"
    check(values.ndim == 1, "data", dict(data.sizes), hint)
    return Modes(**fields | {"values": values.tolist()})


def merge(parts: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Merges the datasets of several learners: learner, outer_step, seed, task, mode, step, ….

    Readings that lack a dimension are repeated along it (Bayes has no outer step), and shorter ones
    are padded with NaN. `time` [learner, step] says what step means to each learner.
    """
    union: dict[str, np.ndarray] = {}
    sizes = {d: n for part in parts.values() for d, n in part.sizes.items()}
    for part in parts.values():
        for d in {"outer_step", "seed"} & {*part.dims}:
            union[str(d)] = np.union1d(union.get(str(d), []), part[d]).astype(int)

    def complete(part: xr.Dataset) -> xr.Dataset:
        """Adds the dimensions and coordinates that a part lacks."""
        part = part.expand_dims({d: index for d, index in union.items() if d not in part.dims})
        indices = {d: np.arange(part.sizes.get(d, n)) for d, n in sizes.items()}
        missing = {d: index for d, index in indices.items() if d not in part.coords}
        return part.assign_coords(missing).reset_coords("time")

    merged = concatenate(map(complete, parts.values()), "learner", [*parts]).set_coords("time")
    attributes = [part.attrs for part in parts.values()]
    fields = [name for name in FIELDS if name not in ("learner", "seconds")]  # these differ by run
    common = [name for name in fields if all(name in attrs for attrs in attributes)]
    labels = {name: ("learner", [attrs[name] for attrs in attributes]) for name in common}
    return merged.assign_coords(labels).transpose(*(d for d in ORDER if d in merged.dims), ...)


def concatenate(parts: Iterable[xr.Dataset], along: str, values: Sequence[Any]) -> xr.Dataset:
    """Concatenates datasets along a new dimension; shorter arrays are padded with NaN."""
    parts, coordinates = list(parts), set()
    if len({tuple(part["learner"].values) for part in parts if "learner" in part.dims}) > 1:
        # The learners' labels are padded as data: as coordinates, xarray takes them for a conflict.
        labels = [{str(n) for n in part.coords if n not in part.dims} for part in parts]
        coordinates = {name for names in labels for name in names}
        parts = [p.reset_coords([*names]) for p, names in zip(parts, labels, strict=True)]
    joined = xr.concat(
        parts,
        xr.Variable(along, values),
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
        combine_attrs="drop_conflicts",
    )
    return joined.set_coords(coordinates)


def _is_repeated(array: xr.DataArray) -> bool:
    """Tells whether an array has the same values for all seeds, or no seeds."""
    if "seed" not in array.dims:
        return True
    values = array.transpose("seed", ...).to_numpy()
    return np.array_equal(values[1:], values[:-1], equal_nan=True)


def of_one_learner(data: xr.Dataset) -> xr.Dataset:
    """Returns the dataset of one learner, without the padding and repetition of `merge`.

    The learner may be selected by `data.sel(learner="lstm")`. Raises `ConfigError` for several.
    """
    if "learner" not in data.coords:
        return data
    parts = split(data)
    check(len(parts) == 1, "data", [*parts], "select one learner: data.sel(learner=…)")
    return next(iter(parts.values()))


def split(data: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Splits a dataset into its learners, by name; the inverse of `merge`."""
    if not isinstance(data, xr.Dataset):
        return dict(data)
    if "learner" in data.coords and "learner" not in data.dims:  # one was selected
        data = data.expand_dims("learner")
    if "learner" not in data.dims:
        return {str(data.attrs["learner"]): data}
    parts = {}
    for name in data["learner"].values:
        part = data.sel(learner=name)
        if not np.isfinite(part["time"]).any():  # it has only other settings of a sweep
            continue
        part = part.isel(step=np.flatnonzero(np.isfinite(part["time"].to_numpy())))
        for dim in ("task", "seed"):
            if dim in part.dims and "loss" in part:
                present = part["loss"].notnull().any([d for d in part["loss"].dims if d != dim])
                indices = np.flatnonzero(present.to_numpy())  # padding follows the last, if any
                part = part.isel({dim: slice(indices[-1] + 1 if len(indices) else None)})
        attrs = {field: part[field].item() for field in FIELDS if field in part.coords}
        if attrs.get("kind", "meta") != "meta":  # not trained: `merge` repeated its readings
            part = part.isel(outer_step=0, drop=True, missing_dims="ignore")
            if "seed" in part.dims and all(map(_is_repeated, part.data_vars.values())):
                part = part.isel(seed=0, drop=True)
        if "closed_form" in part:  # it does not depend on seed and task
            curve = part["closed_form"]
            part["closed_form"] = curve.isel(
                {dim: 0 for dim in curve.dims if dim not in ("step", "mode")}, drop=True
            )
        # Arrays of other learners. Every learner has loss and modes, all NaN where it diverged.
        optional = set(part) - {"loss", *probes(part)}
        empty = [v for v in optional if part[v].isnull().all()]
        part = part.drop_vars([*attrs, *empty])
        parts[str(name)] = part.assign_attrs(attrs)
    return parts
