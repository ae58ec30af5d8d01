"""The command line as a person meets it: subprocesses, exit codes, one line."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import tfds_sets

ROOT = pathlib.Path(__file__).parents[2]
CARD = ROOT / 'experiments' / 'configs' / 'digits.py'
TINY = (
  '--config.model.stage_sizes=(1,5)',
  '--config.model.widths=(8,8)',
  '--config.partition=(2,)',
  '--config.batch_size=8',
  '--config.num_workers=2',
  '--config.evaluation.statistics_images=100',
)


def command(workdir, *flags, card=f'{CARD}:smoke'):
  args = [sys.executable, '-m', 'resist_jax', f'--config={card}']
  return [*args, f'--workdir={workdir}', *flags]


def run(*args, **kwargs):
  return subprocess.run(
    command(*args, **kwargs),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=240,
  )


BAD = [
  (
    ['--config.num_wrokers=3'],
    'unknown config field num_wrokers. Did you mean num_workers',
  ),
  (['--config.data.nam=x'], 'unknown config field nam. Did you mean name'),
  (['--config.num_workers=many'], "invalid literal .*'many'"),
  (['--confg.seed=1'], "Unknown command line flag 'confg.seed'"),
  (['more'], "unexpected argument 'more'"),
  (['--config.num_workers=0'], 'must be at least 1'),
  (['--config.num_workers=4', '--config.num_devices=3'], 'not a multiple'),
  (['--config.num_workers=13'], '13 workers cannot share 12 blocks'),
  (['--config.min_depth=13'], 'a chain of 12 blocks'),
  (['--config.batch_size=2000'], 'sees only 1437 training images'),
  (
    ['--config.batch_size=400', '--config.data.sharded=True'],
    'sees only 359 training images',
  ),
  (['--config.data.name=no_such_set'], "unknown data set 'no_such_set'"),
  (['--config.data.name=mnist'], 'is not prepared in .*pip install'),
  (['--config.data.name=imdb_reviews'], 'not one of images'),
]


@pytest.mark.parametrize(('flags', 'says'), BAD, ids=[b[1][:25] for b in BAD])
def test_bad_input_is_one_line_and_2_and_writes_nothing(flags, says, tmp_path):
  workdir = tmp_path / 'run'
  data_dir = f'--config.data.dir={tmp_path / "none"}'
  check_refusal(run(workdir, data_dir, *flags), says)
  assert not list(tmp_path.iterdir())


def check_refusal(result, says):
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: ')
  assert result.stdout == ''
  assert re.search(says, line), line


@pytest.mark.parametrize(
  ('card', 'says'),
  [
    ('no_such_card.py', '--config cannot be loaded.*no_such_card.py'),
    (f'{CARD}:huge', "unknown scale 'huge'"),
  ],
)
def test_a_bad_card(card, says, tmp_path):
  check_refusal(run(tmp_path / 'run', card=card), says)


def test_a_card_of_another_program(tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    '  return ml_collections.ConfigDict({"num_workers": 2})\n'
  )
  check_refusal(run(tmp_path / 'run', card=card), 'lacks the field batch_size')


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('import nothing_of_the_kind', 'ModuleNotFoundError'),
    ('def get_config(:', 'SyntaxError'),
    ('def get_config():\n  return {}["x"]', "cannot be loaded: KeyError: 'x'"),
  ],
)
def test_a_broken_card(text, says, tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(text)
  check_refusal(run(tmp_path / 'run', card=card), says)


def test_missing_flags():
  args = [sys.executable, '-m', 'resist_jax']
  result = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
  check_refusal(result, '--config is missing')


def test_workdirs_that_cannot_be(tmp_path):
  file = tmp_path / 'file'
  file.write_text('not a folder')
  check_refusal(run(file / 'run'), 'is not a folder')
  check_refusal(run('/proc/no/such'), 'cannot be written')
  assert file.read_text() == 'not a folder'


@pytest.mark.filterwarnings('ignore')  # TFDS's own, while it writes a set.
def test_labels_out_of_range(tmp_path):
  """A set whose own description of its classes is wrong."""
  tfds_sets.write(tmp_path, 'my_set', classes=10)
  (features,) = (tmp_path / 'my_set').rglob('features.json')
  text = features.read_text()
  assert '"numClasses": "10"' in text
  features.write_text(text.replace('"numClasses": "10"', '"numClasses": "4"'))
  flags = ('--config.data.name=my_set', f'--config.data.dir={tmp_path}')
  says = r'has the label \d, but the set declares 4 classes, 0 to 3'
  check_refusal(run(tmp_path / 'run', *flags), says)


@pytest.mark.filterwarnings('ignore')
def test_the_digits_card_works_for_any_small_set(tmp_path):
  tfds_sets.write(tmp_path / 'sets', 'cifar10')
  result = run(
    tmp_path / 'run',
    *TINY,
    '--config.data.name=cifar10',
    f'--config.data.dir={tmp_path / "sets"}',
  )
  assert result.returncode == 0, result.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['dataset'] == 'cifar10'
  assert summary['num_devices'] == 2  # Virtual ones, made by the program.
  assert 'test accuracy' in result.stdout
  assert 'report.html' in result.stdout


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_and_ends_bit_equal(signum, tmp_path):
  flags = (*TINY, '--config.num_rounds=30')
  whole = run(tmp_path / 'whole', *flags)
  assert whole.returncode == 0, whole.stderr

  log = tmp_path / 'log'
  with log.open('w') as stderr:
    killed = subprocess.Popen(
      command(tmp_path / 'killed', *flags), cwd=ROOT, stderr=stderr
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / 'killed' / 'checkpoints' / '2').exists():
      assert killed.poll() is None, log.read_text()
      assert time.monotonic() < deadline
      time.sleep(0.01)
    killed.send_signal(signum)
    code = killed.wait(timeout=120)
  if signum == signal.SIGTERM:
    assert code == 128 + signum
    assert 'the same command goes on from there' in log.read_text()
  else:
    assert code == -signum
  assert not (tmp_path / 'killed' / 'summary.json').exists()

  again = run(tmp_path / 'killed', *flags)
  assert again.returncode == 0, again.stderr
  summaries = [
    json.loads((tmp_path / name / 'summary.json').read_text())
    for name in ('whole', 'killed')
  ]
  for name in ('params_hash', 'bytes_total', 'rounds', 'test_accuracy'):
    assert summaries[0][name] == summaries[1][name]
