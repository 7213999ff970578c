"""Training curves for TensorBoard: an optional extra, `pip install -e '.[tensorboard]'`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from metadyn.errors import ConfigError


def check_installed() -> None:
    """Raises `ConfigError` unless the optional extra is installed."""
    if find_spec("tensorboardX") is None:
        hint = "tensorboardX is not installed; pip install -e '.[tensorboard]'"
        raise ConfigError(f"--tensorboard: {hint}")


@contextmanager
def scalars(folder: Path | None, step: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields `log(outer step, {name: value})`, which writes to `folder`, or nowhere if it is None.

    The run resumes from `step`, so values that an earlier run logged after it are no longer shown.
    """
    if folder is None:
        yield lambda step, values: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log
