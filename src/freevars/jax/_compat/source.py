"""The user's source lines, tracebacks, and JAX's own frames in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from freevars.jax._compat.params import JAXPR_TYPES
from freevars.jax._compat.private import config, source_info_util, traceback_util
from freevars.jax._compat.programs import ClosedJaxpr, separate_constants

__all__ = [
    "filter_traceback",
    "is_rule_machinery",
    "is_users",
    "programs_in",
    "unfiltered_tracebacks",
    "user_line",
]


def user_line(source_info: Any) -> tuple[str, int] | None:
    """The innermost line outside JAX and this library that `source_info` was recorded on."""
    for frame in source_info_util.user_frames(source_info.traceback):
        if not frame.file_name.startswith(_OWN_FILES):
            return (frame.file_name, frame.start_line)
    return None


_OWN_FILES = str(Path(__file__).parent.parent.parent) + os.sep


def programs_in(frame: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    """The programs among the local variables of one of JAX's frames, open, each with the values of
    its leading inputs."""
    found = [
        separate_constants(x)
        for x in frame.values()
        if isinstance(x, ClosedJaxpr) and getattr(x, "consts", None)
    ]
    params = getattr(frame.get("p"), "params", None)  # of a call of `jit` that is being made
    if isinstance(params, dict) and isinstance(frame.get("args_flat"), (list, tuple)):
        jaxpr = params.get("jaxpr")
        if isinstance(jaxpr, JAXPR_TYPES):
            found.append((getattr(jaxpr, "jaxpr", jaxpr), list(frame["args_flat"])))
    return found


def unfiltered_tracebacks() -> Any:
    """A context, of this thread, in which JAX leaves its own frames in tracebacks."""
    return config.traceback_filtering("off")


def filter_traceback(error: BaseException) -> None:
    """Take JAX's frames out of an error's traceback, as it does itself unless told otherwise."""
    if config.traceback_filtering.value != "off" and error.__traceback__ is not None:
        error.__traceback__ = traceback_util.filter_traceback(error.__traceback__)


def is_users(file: str) -> bool:
    """Whether a file is neither JAX's nor Python's nor this library's own."""
    return source_info_util.is_user_filename(file) and not file.startswith(_OWN_FILES)


def is_rule_machinery(file: str) -> bool:
    """Whether a file of JAX's is one of those that call custom derivative rules."""
    return not is_users(file) and Path(file).name in ("custom_derivatives.py", "hijax.py")
