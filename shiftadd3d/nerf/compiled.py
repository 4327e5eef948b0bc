"""Frozen networks that render as executables."""

from __future__ import annotations

import warnings

from rich.console import Console

from shiftadd3d._errors import UserError
from shiftadd3d._progress import say_if_slow
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.nn.compiled import compile as compile_model

_WAIT = "Compiling the network. This takes up to some minutes, once: the result is kept"


def compiled_where_it_can_be(network: GNTModel, console: Console) -> GNTModel:
    """A frozen network, compiled in the numerics of the process.

    If that fails, the network itself, and a line says why.
    """
    try:
        with warnings.catch_warnings(), say_if_slow(_WAIT, console):
            warnings.simplefilter("ignore", RuntimeWarning)
            compiled = compile_model(network)
    except UserError as error:
        reason = str(error)
    else:
        if compiled.is_compiled:
            return compiled
        reason = str(compiled.reason)
    console.print(f"not compiled, so it renders as before: {reason}", highlight=False, markup=False, soft_wrap=True)
    return network
