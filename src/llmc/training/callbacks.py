"""What may be given as callbacks: asked before a run begins, because a mistake would show only after hours, or never."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

from llmc.values import did_you_mean

C = TypeVar("C")


def hooks_of(base: type) -> list[str]:
    """Return the names of the methods of a class that a run calls: those that begin with on_."""
    return [name for name in vars(base) if name.startswith("on_")]


def checked_callbacks(given: Iterable[Any], base: type[C]) -> list[C]:
    """Return callbacks of one class, whatever they were given as.

    Args:
        given: objects of a class derived from base, or with some of its methods; and functions, which become the first of them.
        base: the class whose methods do nothing.

    Raises:
        TypeError: if one of them would not be called, or cannot be called with what the run calls it with.
    """
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"callbacks is {_name(given)}, expected a list: callbacks=[...]")
    return [_checked(callback, f"callbacks[{i}]", base) for i, callback in enumerate(given)]


def _checked(callback: Any, place: str, base: type[C]) -> C:
    hooks = hooks_of(base)
    if isinstance(callback, type):
        raise TypeError(f"{place} is the class {callback.__name__}, expected an object of it: {callback.__name__}()")
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in hooks and callable(getattr(type(callback), name)):
            near = did_you_mean(name, hooks)
            raise TypeError(f"{place} has a method {name}, and a run calls {', '.join(hooks)}{near}")
    own = {name: getattr(callback, name) for name in hooks if _has(callback, name, base)}
    if not own and callable(callback):
        own = {hooks[0]: callback}
    if not own:
        raise TypeError(
            f"{place} is {_name(callback)}, expected a function f(trainer, info), or an object with {' or '.join(hooks)}"
        )
    for name, method in own.items():
        _check_arguments(method, f"{place}, {name}", list(inspect.signature(getattr(base, name)).parameters)[1:])
    if isinstance(callback, base):
        return callback
    whole = base()
    for name, method in own.items():
        setattr(whole, name, method)
    return whole


def _has(callback: Any, name: str, base: type) -> bool:
    """Return whether a callback has a method of its own."""
    method = getattr(callback, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, name)


def _check_arguments(method: Any, place: str, names: list[str]) -> None:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # of a function in C, which does not say
        return
    try:
        signature.bind(*names)
    except TypeError as e:
        raise TypeError(f"{place}: {_name(method)} cannot be called with ({', '.join(names)}): {e}") from None


def _name(x: Any) -> str:
    return f"'{x}'" if isinstance(x, str) else getattr(x, "__name__", None) or f"a {type(x).__name__}"
