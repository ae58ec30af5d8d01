"""Nodes of a pytree that files do not have.

Files have dictionaries and lists. A tuple comes back as a list; a NamedTuple as
a dictionary, which sorts its fields; a number as a key comes back as text; and
empty nodes, such as those of `optax.masked`, do not come back.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def names_of_leaves(tree: PyTree) -> list[str]:
  """Returns the path of each leaf, such as `out/w`, whatever its nodes are."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def shapes_by_name(tree: PyTree, axes: int = 0) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each leaf by its path.

  Args:
    tree: Pytree of arrays, or of shapes.
    axes: How many leading axes to leave out.
  """
  shapes = [tuple(x.shape[axes:]) for x in jax.tree.leaves(tree)]
  return dict(zip(names_of_leaves(tree), shapes, strict=True))


def dtypes_by_name(tree: PyTree) -> dict[str, str]:
  """Returns the dtype that JAX gives each leaf, by its path.

  Args:
    tree: Pytree of arrays, or of shapes.
  """
  dtypes = [str(jnp.result_type(x.dtype)) for x in jax.tree.leaves(tree)]
  return dict(zip(names_of_leaves(tree), dtypes, strict=True))


def first_difference(
  one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
  """Returns the first name with another shape, and both; None without one.

  Args:
    one: See `shapes_by_name`.
    other: What it is compared with; None stands for a name that is missing.
  """
  for name in sorted(one.keys() | other.keys()):
    if one.get(name) != other.get(name):
      return name, one.get(name), other.get(name)
  return None


def with_nodes_of(like: PyTree, found: PyTree) -> PyTree:
  """Returns arrays from files in the nodes that they had in memory.

  Args:
    like: Pytree of the form that is wanted.
    found: Pytree from files; returned as it is if its names are others.
  """
  by_name = dict(
    zip(names_of_leaves(found), jax.tree.leaves(found), strict=True)
  )
  names = names_of_leaves(like)
  if len(names) != len(by_name) or set(names) != by_name.keys():
    return found
  return jax.tree.structure(like).unflatten(by_name[name] for name in names)


def described(tree: PyTree) -> Any:
  """Returns a description of the nodes as JSON values; see `form_of`.

  Args:
    tree: Any pytree.

  Returns:
    The description; None if there are other nodes than dictionaries, whose keys
    are text or whole numbers, lists and tuples.
  """

  def describe(node: Any) -> Any:
    if type(node) is dict and all(type(k) in (str, int) for k in node):
      return ['dict', [[key, describe(node[key])] for key in node]]
    if type(node) in (list, tuple):
      return [type(node).__name__, [describe(inner) for inner in node]]
    if node is not leaf:
      raise TypeError
    return 0

  leaf = object()
  try:
    return describe(jax.tree.map(lambda _: leaf, tree))
  except TypeError:
    return None


def form_of(description: Any) -> PyTree:
  """Returns a pytree of the form that was described, with 0 for each leaf.

  >>> form_of(described({'a': (1, {2: 3})}))
  {'a': (0, {2: 0})}
  """
  if description == 0:
    return 0
  kind, inside = description
  if kind == 'dict':
    return {key: form_of(inner) for key, inner in inside}
  found = map(form_of, inside)
  return tuple(found) if kind == 'tuple' else list(found)
