"""Load OR-Tools and CVXPY, which can clash.

OR-Tools 9.15 and highspy 1.15 each bring a libhighs of their own, and on Linux the one that comes second finds the
first one's symbols and fails to import. CVXPY imports highspy when it is installed. So OR-Tools, when installed, is
loaded first: CVXPY then leaves highspy aside and reaches HiGHS through scipy. In a process where highspy came
first, OR-Tools is refused with one sentence.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from typing import Any

from .errors import SolverError
from .quiet import quiet_stdout


def load_or_tools(module: str) -> Any:
    """Import a module of OR-Tools (typed in part only).

    Raises:
        SolverError: it can't be loaded, most likely because highspy is.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise SolverError(
            f"OR-Tools can't be loaded here ({_short(cause)}); its HiGHS clashes with that of highspy, which CVXPY "
            "imports: use a process of its own for each, or load OR-Tools first"
        ) from cause


def load_cvxpy() -> Any:
    """Import CVXPY, after OR-Tools where that is installed.

    Raises:
        SolverError: it can't be loaded.
    """
    if importlib.util.find_spec("ortools") is not None:
        # where this fails highspy came first, and CVXPY has it
        with contextlib.suppress(SolverError):
            load_or_tools("ortools.linear_solver.python.model_builder")
    try:
        with quiet_cvxpy():
            return importlib.import_module("cvxpy")
    except ImportError as cause:
        raise SolverError(
            f"CVXPY can't be loaded here ({_short(cause)}); repair it or choose another solver"
        ) from cause


@contextlib.contextmanager
def quiet_cvxpy() -> Iterator[None]:
    """Keep CVXPY and its engines from writing to stdout, where it says again and again that it has no highspy."""
    # importing CVXPY sets the level of its logger, so that is no place to silence it
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with quiet_stdout(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _short(cause: ImportError) -> str:
    """The first line of an import error, without the path and the mangled name."""
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return "undefined symbol" if "undefined symbol" in text else text
