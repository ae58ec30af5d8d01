"""Forms of layers that move less between an accelerator and its memory.

On accelerators, a training step of a residual network is bound by the memory
traffic of its activations, not by arithmetic. The results are those of the
plain forms, up to rounding.
"""

from functools import partial
import math
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

PyTree = Any


def widen(x: jax.Array) -> jax.Array:
  """Returns float64 as it is, and anything else as float32."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def computed_kernels(params: PyTree, dtype: Any) -> PyTree:
  """Casts the kernels of convolutions before a network is cut into blocks.

  A GPU library returns the gradient of a kernel with its axes in another order.
  By default the compiler then computes the optimiser's whole update in that
  order, in float32, and reorders parameters and moments both ways. Here only
  the gradient is reordered, in the compute dtype, and once for all blocks of a
  chain.

  Args:
    params: Parameters of a network or sub-network.
    dtype: The compute dtype.

  Returns:
    The same with kernels of that dtype, `[..., size, size, C, features]`.
  """
  return jax.tree.map(
    lambda x: _in_order(x.astype(dtype)) if x.ndim >= 4 else x, params
  )


@jax.custom_vjp
def _in_order(kernel: jax.Array) -> jax.Array:
  return kernel


def _order_gradient(_, g: jax.Array) -> tuple[jax.Array]:
  g = with_layout_constraint(g, Layout(tuple(range(g.ndim))))
  # Else the compiler would put the optimiser's update before the reordering.
  return (lax.optimization_barrier(g),)


_in_order.defvjp(lambda kernel: (kernel, None), _order_gradient)


def norm_relu(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  dtype: Any,
  axis_name: str | None,
) -> jax.Array:
  """Normalises a batch by its own statistics, and clips it at 0.

  The backward pass keeps nothing but the input, as narrow as it came. It reads
  the input and the gradient twice: for two sums, and for the result. Both times
  it computes again where the ReLU was open.

  Args:
    x: `[..., C]`.
    scale: `[C]`.
    bias: `[C]`.
    epsilon: Added to the variance.
    dtype: Dtype of the result.
    axis_name: The mesh axis that splits the batch into equal parts, if any.

  Returns:
    `[..., C]`.
  """
  arrays = _varying_alike(x, scale, bias)
  return _norm_relu(*arrays, epsilon, dtype, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm_relu(x, scale, bias, epsilon, dtype, axis_name):
  return _forward(x, scale, bias, epsilon, dtype, axis_name)[0]


def _forward(x, scale, bias, epsilon, dtype, axis_name):
  wide, axes = widen(x), tuple(range(x.ndim - 1))
  mean, mean_square = over_parts(
    (wide.mean(axes), jnp.square(wide).mean(axes)), axis_name
  )
  variance = mean_square - jnp.square(mean)
  inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
  factor = scale * inverse
  shift = bias - mean * factor
  y = jnp.maximum(affine(wide, factor, shift), 0.0).astype(dtype)
  varies = (variance > 0).astype(factor.dtype)
  return y, (x, mean, inverse, factor, shift, varies)


def _backward(epsilon, dtype, axis_name, saved, g):
  del epsilon, dtype
  x, mean, inverse, factor, shift, varies = saved
  axes, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
  # Without barriers, compilers store the gradient behind the ReLU, and read
  # that again instead.
  x = lax.optimization_barrier(x)
  wide, open_g = _behind_relu(x, g, factor, shift)
  by_bias, product = open_g.sum(axes), (open_g * wide).sum(axes)
  by_scale = (product - mean * by_bias) * inverse
  # The statistics move with every input.
  by_square = varies * by_scale * inverse * factor / count
  by_mean, by_square = over_parts(
    (by_bias * factor / count, by_square), axis_name
  )
  x, g, by_mean, by_square = lax.optimization_barrier(
    (x, g, by_mean, by_square)
  )
  wide, open_g = _behind_relu(x, g, factor, shift)
  by_x = affine(open_g, factor, mean * by_square - by_mean)
  by_x = by_x - wide * _along(by_square, wide)
  return by_x.astype(x.dtype), by_scale, by_bias


_norm_relu.defvjp(_forward, _backward)


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
  """Lets arrays vary over the same axes of a mesh.

  The rule above gives gradients that vary over all of them. Behind this cast,
  JAX sums those of an array that devices have in common.
  """
  axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
  every = frozenset().union(*axes)
  return [
    lax.pcast(x, tuple(every - its), to='varying')
    for x, its in zip(arrays, axes, strict=True)
  ]


def over_parts(
  pair: tuple[jax.Array, jax.Array], axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
  """Averages two arrays over the parts of a batch.

  Args:
    pair: Two arrays of one shape, of this device's part.
    axis_name: The mesh axis that splits the batch into equal parts; None if
      there is one part.

  Returns:
    Their means, which vary over the axis, so that gradients of them do.
  """
  if axis_name is None:
    return pair
  # Stacked, they take one collective; pcast makes it one in the backward pass
  # too.
  both = lax.pmean(jnp.stack(pair), axis_name)
  first, second = lax.pcast(both, axis_name, to='varying')
  return first, second


def _behind_relu(x, g, factor, shift):
  """Returns the input, wide, and the gradient where the ReLU was open."""
  wide = widen(x)
  # Not a comparison: a GPU's compiler would store its result.
  is_open = jnp.sign(jnp.maximum(affine(wide, factor, shift), 0.0))
  return wide, widen(g) * is_open


def affine(x: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
  """Multiplies channels and adds to them.

  Args:
    x: `[..., C]`.
    factor: `[C]`.
    shift: `[C]`.

  Returns:
    `[..., C]`.
  """
  return x * _along(factor, x) + _along(shift, x)


def _along(values: jax.Array, x: jax.Array) -> jax.Array:
  """Gives values of channels as many axes as an array has."""
  return values.reshape((1,) * (x.ndim - 1) + values.shape)
