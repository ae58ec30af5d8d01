"""Attacks judge what they see, and the page shows what they have counted."""

import json
import pathlib
import random
import time

from covering import rest_is_slow
import pytest

from experiments.attack import __main__ as program
from experiments.attack import damages, judged
from resist_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ('code', 'out', 'err', 'outcome'),
  [
    (2, '', 'error: lr is 0; it must be more.\n', judged.REFUSED),
    (None, '', 'error: lr is 0.\n', judged.HANG),
    (1, '', 'error: lr is 0.\n', judged.WRONG),
    (2, '', 'error: seed is 0.\n', judged.WRONG),
    (2, '', 'warning: lr is 0.\n', judged.WRONG),
    (0, '', '', judged.SEVERAL),
    (2, 'table', 'error: lr is 0.\n', judged.SEVERAL),
    (2, '', 'usage:\nerror: lr is 0.\n', judged.SEVERAL),
    (1, '', 'Traceback (most recent call last):\nKeyError', judged.TRACEBACK),
  ],
)
def test_only_one_line_that_names_the_mistake_is_a_refusal(
  code, out, err, outcome
):
  assert judged.refusal(code, out, err, says='lr is')[0] == outcome


def raising(error):
  def call():
    raise error

  return call


@pytest.mark.parametrize(
  ('call', 'outcome'),
  [
    (lambda: 3, ''),
    (raising(ConfigError('lr is 0.')), judged.REFUSED),
    (raising(ConfigError('lr\nis 0.')), judged.SEVERAL),
    (raising(KeyError('lr')), judged.TRACEBACK),
    (raising(UnicodeDecodeError('utf-8', b'', 0, 1, '')), judged.TRACEBACK),
    (lambda: time.sleep(60), judged.HANG),
  ],
)
def test_an_error_is_judged_by_its_kind(call, outcome):
  limit = 0.2 if outcome == judged.HANG else 60  # Seconds.
  found = judged.answer(call, limit, (ValueError,))
  assert found.outcome == outcome
  assert found.value == (None if outcome else 3)


@pytest.mark.parametrize('damage', damages.DAMAGES)
def test_every_damage_damages(damage, tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  first.write_bytes(b'one')
  second.write_bytes(b'two')
  damages.DAMAGES[damage](first, [first, second], random.Random(0))
  assert not first.is_file() or first.read_bytes() != b'one'


def line(record, name):
  """A row of the page's table."""
  outcomes = record['outcomes']
  bad = sum(outcomes.get(outcome, 0) for outcome in judged.BAD)
  counts = [record['count'], *(outcomes.get(x, 0) for x in COLUMNS), bad]
  assert sum(counts[1:]) == counts[0]
  return f'| {name} | {" | ".join(map(str, counts))} |'


COLUMNS = judged.SAME, judged.REFUSED, judged.AS_WRITTEN, judged.WARNED
NAMES = {
  'damages': 'damaged files',
  'pairs': 'pairs of processes that differ',
  'inputs': 'bad inputs',
  'kills': 'kills while saving',
  'order': 'starts in any order, or too late',
}


@pytest.mark.parametrize('kind', [p.stem for p in program.FOLDER.iterdir()])
def test_the_page_shows_the_committed_counts(kind):
  record = json.loads((program.FOLDER / f'{kind}.json').read_text())
  page = (ROOT / 'docs' / 'faults.md').read_text()
  assert line(record, NAMES[kind]) in page
  assert record['provenance']['commit'] != 'unknown'


def test_a_part_does_not_replace_the_whole_result(capsys):
  with pytest.raises(SystemExit, match='2'):
    program.main(['--only=inputs', '--share=0.5'])
  assert 'name a folder with --results' in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
  'kind', rest_is_slow(list(program.KINDS), ['inputs', 'pairs'])
)
def test_a_few_attacks_of_each_kind_end_well(kind, tmp_path):
  args = [f'--only={kind}', '--share=0.02', '--seed=1']
  assert program.main([*args, f'--results={tmp_path}']) == 0
  record = json.loads((tmp_path / f'{kind}.json').read_text())
  assert record['count'] == sum(record['outcomes'].values()) > 0
