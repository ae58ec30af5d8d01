"""The log of a run that goes on."""

import json
import tracemalloc

import pytest

from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.report import records
from resist_jax.run import metrics


def write_log(folder, count):
  """Writes the log of a run of that many rounds."""
  folder.mkdir(exist_ok=True)
  with (folder / 'metrics.jsonl').open('w') as file:
    for number in range(1, count + 1):
      row = {
        'round': number,
        'slots': {'chain': [[0, 2], [1, 3]]},
        'test_accuracy': number / count,
      }
      file.write(json.dumps(row) + '\n')
  return (folder / 'metrics.jsonl').read_text()


def test_a_run_goes_on_whose_log_is_too_long_for_a_report(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(records, 'MAX_ROWS', 10)
  text = write_log(tmp_path, 20)
  (tmp_path / 'config.json').write_text('{}')
  with metrics.MetricsLog(tmp_path, 15, 100):
    rows = report.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [*range(1, 16)]
  assert text.startswith((tmp_path / 'metrics.jsonl').read_text())
  with pytest.raises(ConfigError, match='shorten the copy of that file'):
    report.load_runs([tmp_path])


def test_a_long_log_is_not_held_in_memory(tmp_path):
  size = len(write_log(tmp_path, 20_000))
  tracemalloc.start()
  with metrics.MetricsLog(tmp_path, 20_000, 20_000):
    _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 3 * size


def test_a_damaged_log_is_left_as_it_is(tmp_path):
  text = write_log(tmp_path, 3) + 'damaged\n'
  (tmp_path / 'metrics.jsonl').write_text(text)
  with pytest.raises(ConfigError, match='line 4, is not the record of a round'):
    metrics.MetricsLog(tmp_path, 3, 10)
  assert (tmp_path / 'metrics.jsonl').read_text() == text
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
