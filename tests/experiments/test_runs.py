"""What commands that measure record, and what they refuse."""

import subprocess
import sys

import pytest
from several import ROOT

from experiments import runs


@pytest.mark.parametrize(
  ('words', 'wanted'),
  [
    (['--calm', '--out', '/somewhere/r.json', '--seed=1'], '--calm --seed=1'),
    (['--out=/some where/r.json', '--only', 'a b'], "--only 'a b'"),
    (['--outer=2'], '--outer=2'),
    ([], ''),
  ],
)
def test_a_record_holds_the_command_without_its_place(
  words, wanted, monkeypatch
):
  monkeypatch.setattr(sys, 'argv', ['storm.py', *words])
  assert runs.command('experiments.storm') == (
    f'python -m experiments.storm {wanted}'.strip()
  )


@pytest.mark.parametrize(
  'words',
  [
    ['experiments.bench', '--steps=2'],
    ['experiments.memory', '--budget=1'],
    ['experiments.checkpoint_cost', '--rounds=1'],
    ['experiments.storm', '--gap=1'],
  ],
)
def test_another_measurement_does_not_replace_a_committed_result(words):
  ran = subprocess.run(
    [sys.executable, '-m', *words], cwd=ROOT, capture_output=True, text=True
  )
  assert ran.returncode == 2
  (line,) = ran.stderr.splitlines()
  assert words[1].partition('=')[0] in line
  assert 'name a file with --out' in line
