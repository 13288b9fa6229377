"""What the import hook of conftest.py checks annotations with: beartype, for those that give the shape of an array.

A NumPy array may stand for one of JAX's, as it may for any jitted function.
"""

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
    return lambda f: (
        decorate(f) if isinstance(f, type) or any(map(has_shape, f.__annotations__.values())) else f
    )


jaxtyping.jaxtyped = jaxtyped_where_shapes_are  # what the import hook decorates with
