"""What the README shows runs, and its results come from committed files."""

import pathlib
import re

import jax.numpy as jnp
import pytest

from experiments import readme

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / 'README.md').read_text()


def test_the_decomposition_example_learns():
  blocks = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  (example,) = [block for block in blocks if 'sample_slots' in block]
  assert sum(map(bool, example.splitlines())) <= 20
  names = {}
  exec(example.split('for r in')[0], names)
  before = names['loss'](names['chain'], 1 / names['S'])
  exec(example, names)
  assert names['loss'](names['chain'], 1 / names['S']) < 0.5 * before
  assert jnp.isfinite(names['chain']['w']).all()


def test_results_come_from_the_files():
  assert readme.with_results(TEXT) == TEXT, 'run python -m experiments.readme'


def test_files_that_are_linked_exist():
  for link in re.findall(r'\]\(([^)#]+)\)', TEXT):
    if not link.startswith('http'):
      assert (ROOT / link).exists(), link


@pytest.mark.parametrize('target', re.findall(r'^    make (\w+)', TEXT, re.M))
def test_make_targets_exist(target):
  assert re.search(f'^{target}:', (ROOT / 'Makefile').read_text(), re.M)
