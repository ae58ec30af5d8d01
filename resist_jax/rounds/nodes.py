"""Nodes of a pytree that files do not have.

Files have dictionaries, lists and tuples. A NamedTuple comes back as a
dictionary, which sorts its fields; a number as a key comes back as text; and
empty nodes, such as those of `optax.masked`, do not come back.
"""

from typing import Any

import jax

PyTree = Any


def names_of_leaves(tree: PyTree) -> list[str]:
  """Returns the path of each leaf, such as `out/w`, whatever its nodes are."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


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


def are_in_files(tree: PyTree) -> bool:
  """Returns whether files give back a pytree as it is."""
  like = jax.tree.map(lambda _: 0, tree)

  def plain(node: Any) -> bool:
    if type(node) is dict:
      return all(type(k) is str and plain(v) for k, v in node.items())
    if type(node) in (list, tuple):
      return all(map(plain, node))
    return node == 0 and type(node) is int

  return plain(like)
