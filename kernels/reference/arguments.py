"""The arguments of an op, which its twin has, too: a named tuple states both signatures, once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

Size = Annotated[int, "SymInt"]
"""A size that `torch.compile` may leave open."""

Taken = ParamSpec("Taken")
Given = TypeVar("Given", bound=tuple)
Outcome = TypeVar("Outcome")


def takes(
    arguments: Callable[Taken, Given],
) -> Callable[[Callable[[Given], Outcome]], Callable[Taken, Outcome]]:
    """Have a function of a named tuple take the tuple's fields one by one, in order or by name."""

    def decorate(function: Callable[[Given], Outcome]) -> Callable[Taken, Outcome]:
        @functools.wraps(function)
        def call(*args: Taken.args, **kwargs: Taken.kwargs) -> Outcome:
            return function(arguments(*args, **kwargs))

        vars(call)["__signature__"] = inspect.signature(arguments)
        return call

    return decorate
