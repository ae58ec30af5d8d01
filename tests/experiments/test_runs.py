"""What commands that measure record, and what they refuse."""

import json
import shutil
import subprocess
import sys

import pytest
from several import ROOT

from experiments import protocols_report, runs, slow_report
from resist_jax.errors import ConfigError
from resist_jax.run.lock import locked


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


A = {
  'commit': 'a', 'device': '8 x cpu', 'processor': 'P', 'cores': 2,
  'versions': {'jax': '1'}, 'environment': {},
}  # fmt: skip


@pytest.mark.parametrize(
  ('starts', 'busy', 'recorded'),
  [
    ([A], False, {}),
    ([A, A], False, {}),
    ([A, {**A, 'commit': 'b'}], False, 2),
    ([A, {**A, 'processor': 'Q'}, A], True, 3),
    ([A, {**A, 'versions': {'jax': '2'}}], True, 2),
    ([A, {**A, 'environment': {'XLA_FLAGS': '1'}}], True, 2),
  ],
)
def test_seconds_of_several_machines_do_not_count(
  starts, busy, recorded, tmp_path, monkeypatch
):
  for here in starts:
    monkeypatch.setattr(runs, 'here', lambda here=here: here)
    runs.begin_run(tmp_path / 'run', busy=False)
    (tmp_path / 'run' / 'config.json').write_text('{}')
  found = runs.history(tmp_path / 'run')
  assert found.get('busy', False) == busy
  assert len(found.get('begun', ())) == (recorded or 0)
  assert found['commit'] == starts[-1]['commit']


def test_a_start_that_was_refused_is_no_beginning(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, 'here', lambda: {**A, 'processor': 'Q'})
  runs.begin_run(tmp_path, busy=True)
  monkeypatch.setattr(runs, 'here', lambda: A)
  runs.begin_run(tmp_path, busy=False)
  assert runs.history(tmp_path) == {'commit': 'a'}


def test_a_second_copy_of_a_command_is_no_beginning(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, 'here', lambda: A)
  runs.begin_run(tmp_path, busy=False)
  monkeypatch.setattr(runs, 'here', lambda: {**A, 'commit': 'b'})
  with locked(tmp_path), pytest.raises(ConfigError, match='is in use by'):
    runs.begin_run(tmp_path, busy=True)
  assert runs.history(tmp_path) == {'commit': 'a'}


def test_seconds_of_an_unknown_beginning_do_not_count(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, 'here', lambda: A)
  (tmp_path / 'config.json').write_text('{}')  # Of an older version.
  runs.begin_run(tmp_path, busy=False)
  assert runs.history(tmp_path) == {'commit': 'a', 'busy': True}
  assert json.loads((tmp_path / 'begun.json').read_text()) == [A]


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['slow_network', '--only=typo'], "--only is 'typo'"),
    (['torch_peer', '--torch=/no/python'], '--torch=/no/pyth'),
    (['torch_peer', f'--torch={sys.executable}', '--precision=x'], 'precision'),
    (['slow_report', '--results=/no/folder'], '--results=/no/folder is no'),
  ],
)
def test_a_wrong_option_is_one_line(words, said, tmp_path):
  ran = subprocess.run(
    [sys.executable, '-m', f'experiments.{words[0]}', *words[1:]],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert ran.returncode == 2
  (line,) = ran.stderr.splitlines()
  assert said in line


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


@pytest.mark.parametrize(
  ('report', 'name'),
  [(slow_report, 'slow_network'), (protocols_report, 'language')],
)
def test_a_report_shows_the_results_of_another_folder(
  report, name, tmp_path, monkeypatch, capsys
):
  only_json = shutil.ignore_patterns('*.png')
  shutil.copytree(runs.RESULTS / name, tmp_path / name, ignore=only_json)
  monkeypatch.setattr(sys, 'argv', ['report', f'--results={tmp_path}'])
  assert report.main() == 0
  assert 'ResIST' in capsys.readouterr().out
  drawn, kept = (
    {path.name for path in root.rglob('*.png')}
    for root in (tmp_path, runs.RESULTS / name)
  )
  assert drawn == kept != set()
  damaged = next(tmp_path.rglob('*.json'))
  damaged.write_text('{')
  assert report.main() == 2
  assert str(damaged) in capsys.readouterr().err
  shutil.rmtree(tmp_path / name)
  assert report.main() == 0
  assert 'no table yet' in capsys.readouterr().out
