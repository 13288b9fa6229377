"""What the import hook of conftest.py checks annotations with: beartype, for those that give the shape of an array.

A NumPy array may stand for one of JAX's, as it may for any jitted function. A call is checked once for each set of
shapes: checking all of them took a sixth of some files' time. A result whose shape depends on values is checked once.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, get_args

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

jaxtyping.Array = jax.Array | np.ndarray  # before the package imports it
jaxtyped = jaxtyping.jaxtyped


def has_shape(hint: Any) -> bool:
    """Whether an annotation is one of jaxtyping's, or is made of some."""
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(has_shape, get_args(hint)))


def typechecked(f):
    """`f`, checked where its annotations have shapes; doubles may stand for anything else."""
    f.__annotations__ = {name: hint for name, hint in f.__annotations__.items() if has_shape(hint)}
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(f)


def jaxtyped_where_shapes_are(typechecker):
    """jaxtyping's decorator, for functions whose annotations have shapes; others it would only slow down."""
    decorate = jaxtyped(typechecker=typechecker)

    def decorated(f):
        if isinstance(f, type):
            return decorate(f)
        return once_per_shapes(f, decorate(f)) if any(map(has_shape, f.__annotations__.values())) else f

    return decorated


def once_per_shapes(f: Callable, checked: Callable) -> Callable:
    """`checked`, or `f` itself for arguments like those of a call that it passed."""
    passed = set()

    @functools.wraps(f)
    def call(*args, **kwargs):
        if (key := shapes_of(args, kwargs)) in passed:
            return f(*args, **kwargs)
        result = checked(*args, **kwargs)
        passed.add(key)
        return result

    return call


def shapes_of(args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """Structure, shapes and dtypes of arrays, the value of a number or string, the type and name of anything else."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    return structure, *map(_shape_of, leaves)


def _shape_of(x: Any) -> Hashable:
    if isinstance(x, int | float | str):
        return type(x), x
    return type(x), *(getattr(x, name, None) for name in ("shape", "dtype", "__qualname__"))


jaxtyping.jaxtyped = jaxtyped_where_shapes_are  # what the import hook decorates with
