"""Which cases `make test` runs; `make test-every` runs every one.

Many cases that test one theorem differ in what is compiled, and that takes the
time. A few stay. A test of which none stays has a quicker one beside it.
"""

import itertools

import pytest


def rest_is_slow(cases, quick):
  """Returns parameters; cases that are not among `quick` are marked slow."""
  unknown = [case for case in quick if case not in cases]
  assert not unknown, unknown
  return [_parameter(case, case not in quick) for case in cases]


def checkerboard(*axes):
  """Returns a product as parameters; every other case is marked slow."""
  numbered = [list(enumerate(axis)) for axis in axes]
  return [
    _parameter(tuple(value for _, value in case), sum(i for i, _ in case) % 2)
    for case in itertools.product(*numbered)
  ]


def _parameter(case, slow):
  values = case if isinstance(case, tuple) else (case,)
  return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])
