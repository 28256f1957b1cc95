"""Objects from configuration, with the constructor's signature as the schema."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf

from mrgen.errors import UserError

__all__ = ["check_arguments", "instantiate", "plain"]


def plain(conf: Any) -> Any:
    """Resolved plain containers, which a checkpoint can hold.

    Raises:
        UserError: a text that would be resolved once more, wherever it is made a config again.
    """
    content = OmegaConf.to_container(conf, resolve=True) if OmegaConf.is_config(conf) else conf
    _refuse_interpolations(content)
    return content


def _refuse_interpolations(node: Any) -> None:
    if isinstance(node, Mapping):
        for pair in node.items():
            _refuse_interpolations(pair)
    elif isinstance(node, list | tuple):
        for value in node:
            _refuse_interpolations(value)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"found {node[:80]!r}, which is left of an interpolation; write the value itself")


def instantiate(conf: DictConfig | Mapping[str, Any], **extra: Any) -> Any:
    """``hydra.utils.instantiate`` that names the valid keys when one is misspelt.

    Args:
        conf: mapping with a ``_target_``.
        **extra: further arguments.

    Raises:
        UserError: an unknown target or key, a missing key, or a value that the constructor refuses.
    """
    conf = plain(conf)
    if conf.get("_partial_"):
        raise UserError(f"{conf.get('_target_')}: _partial_ builds nothing here; leave it out")
    _check(conf)
    try:
        return hydra.utils.instantiate(conf, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, (ValueError, TypeError)):  # the constructor's own check
            raise UserError(f"{conf['_target_']}: {cause}") from error
        raise


def _check_types(target: str, called: Any, given: Mapping[str, Any]) -> None:
    """Compares plain values with the annotations: ``model.lr=abc`` is found here and not inside a library."""
    try:
        hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except Exception:  # annotations that cannot be evaluated say nothing
        return
    for key, value in given.items():
        if key in hints and not _fits(value, hints[key]):
            raise UserError(f"{target}: {key} is {value!r}; expected {' or '.join(_expected(hints[key]))}")


def _expected(hint: Any) -> list[str]:
    """An annotation in a reader's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [*dict.fromkeys(word for argument in arguments for word in _expected(argument))]
    if origin is typing.Literal:
        return [str(value) for value in arguments]
    if origin is not None or not isinstance(hint, type):
        return [str(hint).replace("typing.", "").replace("collections.abc.", "")]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return [words.get(hint, hint.__name__)]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be meant by an annotation; annotations of classes of ours are not looked at."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is type(None) or hint is None:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is collections.abc.Sequence or origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is collections.abc.Mapping or origin is dict:
        return isinstance(value, Mapping)
    return not (hint is Path and not isinstance(value, str | Path))


def check_arguments(target: str, called: Any, given: Mapping[str, Any]) -> None:
    """Compares arguments with a signature.

    Args:
        target: the name of ``called``, for messages.
        called: a class or a function.
        given: plain values by name.

    Raises:
        UserError: a name that it does not have, or a value of another type than its annotation's.
    """
    try:
        parameters = inspect.signature(called).parameters
    except ValueError:  # some of Python's own types have none to show
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    _check_types(target, called, given)
    valid = [name for name in parameters if name != "self"]
    if unknown := [key for key in given if key not in valid]:
        named = ", ".join(name if name.isidentifier() else repr(name) for name in map(str, unknown))
        raise UserError(
            f"{target} has no {named}; " + (f"valid keys: {', '.join(valid)}" if valid else "it takes none")
        )


def _check(node: Any) -> None:
    """Compares the keys of every ``_target_`` below ``node`` with the target's signature."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            target = str(node["_target_"])
            try:
                called = get_class(target) if target.rpartition(".")[2][:1].isupper() else get_method(target)
            except Exception as error:
                said = " ".join(str(error).split())
                raise UserError(f"_target_ {target!r} cannot be imported: {said}") from error
            given = [key for key in node if key not in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")]
            check_arguments(target, called, {key: node[key] for key in given})
        for value in node.values():
            _check(value)
    elif isinstance(node, list):
        for value in node:
            _check(value)
