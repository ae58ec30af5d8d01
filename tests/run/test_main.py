"""The command line as a person meets it: exit codes, and one line.

A refusal is found in this process; one of each kind, in a process of its own.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

from absl import flags
from covering import rest_is_slow
import jax
import pytest
from several import LIMIT
import tfds_sets

from resist_jax import report
from resist_jax.errors import ConfigError, NonFiniteError, WorkdirLostError
from resist_jax.run import cards, export, program, train
from resist_jax.run import command as command_lib
from resist_jax.run.meeting import MeetingError

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
  '--config.model.stage_sizes=(1,5)',
  '--config.model.widths=(8,8)',
  '--config.partition=(2,)',
  '--config.batch_size=8',
  '--config.num_workers=2',
  '--config.evaluation.statistics_images=100',
)


def command(workdir, *words, card='digits:smoke'):
  args = [sys.executable, '-m', 'resist_jax', f'--config={card}']
  return [*args, f'--workdir={workdir}', *words]


def run(*args, **kwargs):
  return subprocess.run(
    command(*args, **kwargs),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=LIMIT,
  )


def train_here(workdir, *words, card='digits:smoke'):
  """Trains as `command` would, without a new process."""
  values = flags.FlagValues()
  command_lib.define(values)
  argv = ['resist_jax', f'--config={card}', f'--workdir={workdir}', *words]
  options = command_lib.parse(argv, values)
  return train.train(options.config, options.workdir)


def refusal(*args, **kwargs):
  """Returns what a command line is refused with."""
  with pytest.raises(ConfigError) as caught:
    train_here(*args, **kwargs)
  return str(caught.value)


BAD = [
  (
    ['--config.num_wrokers=3'],
    'unknown config field num_wrokers. Did you mean num_workers',
  ),
  (['--config.data.nam=x'], 'field data.nam. Did you mean data.name'),
  (
    ['--config.momentum=0'],
    'Did you mean .*optimizer.momentum or ',
  ),
  (['--config.epoch=0'], r'field epoch\. --help lists all fields\.$'),
  (['--config.num_rounds.x=1'], 'unknown config field num_rounds.x. '),
  (
    ['--config.partition[0]=2'],
    r'field partition\[0\]. Did you mean partition',
  ),
  (['--config.num-workers=8'], 'field num-workers. Did you mean num_workers'),
  (['--config.num_workers=many'], "invalid literal .*'many'"),
  (['--config.num_workers'], 'num_workers'),
  (['--config.partition'], '--config.partition has no value'),
  (['--config.model=3'], 'not a dict'),
  (['--confg.seed=1'], 'unknown flag --confg.seed. Did you mean --config.seed'),
  (['--lr=1'], 'unknown flag --lr. Did you mean --config.lr'),
  (['--num_proceses=1'], 'Did you mean --num_processes'),
  (['--num_processes=0'], 'positive integer'),
  (['--flagfile=no_such_file'], 'no_such_file'),
  (['more'], "unexpected argument 'more'"),
  (['--config.num_workers=0'], 'must be at least 1'),
  (['--config.num_workers=4', '--config.num_devices=3'], 'not a multiple'),
  (['--config.num_workers=13'], '13 workers cannot share 12 blocks'),
  (['--config.min_depth=13'], 'a chain of 12 blocks'),
  (['--config.batch_size=2000'], 'sees only 1437 training examples'),
  (
    ['--config.batch_size=400', '--config.data.sharded=True'],
    'sees only 359 training examples',
  ),
  (['--config.data.name=no_such_set'], "unknown data set 'no_such_set'"),
  (['--config.data.name=mnist'], 'is not prepared in .*pip install'),
  (['--config.data.name=imdb_reviews'], 'not one of images'),
  (['--config.seed=4294967296'], r'less than 2\*\*32'),
  (['--config.lr=1e400'], 'lr is inf; it must be finite'),
  (['--config.faults.timeout=nan'], 'faults.timeout is nan; .* finite'),
]


@pytest.mark.filterwarnings('ignore')  # TFDS's own, while it is imported.
@pytest.mark.parametrize(('words', 'says'), BAD, ids=[b[1][:25] for b in BAD])
def test_bad_input_is_one_line_and_writes_nothing(words, says, tmp_path):
  data_dir = f'--config.data.dir={tmp_path / "none"}'
  line = refusal(tmp_path / 'run', data_dir, *words)
  assert re.search(says, line), line
  assert '\n' not in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('words', 'says'),
  [
    ([], 'error: --workdir is missing: .* --workdir=runs/digits'),
    (['--workdir=run', '--config=digts'], 'Did you mean --config=digits'),
    (
      ['--workdir=run', '--config=card.py'],
      'lacks the field average: begin with ',
    ),
    (['--workdir=/proc/no/such'], 'cannot be written'),
  ],
)
def test_a_process_ends_with_the_line_and_2(words, says, tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    '  return ml_collections.ConfigDict({"num_workers": 2})\n'
  )
  result = subprocess.run(
    [sys.executable, '-m', 'resist_jax', *words],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=LIMIT,
  )
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert re.search(says, line), line
  assert line.startswith('error: ')
  assert result.stdout == ''
  assert {path.name for path in tmp_path.iterdir()} <= {
    card.name,
    '__pycache__',
  }


@pytest.mark.parametrize(
  ('card', 'says'),
  [
    ('no_such_card.py', 'no_such_card.py is neither a card nor a file'),
    ('configs/cifr100.py:s4', 'Did you mean --config=cifar100'),
    ('digits:huge', "unknown word 'huge'"),
    ('cifar10:s4,huge', "unknown word 'huge'"),
    ('cifar10:s4,s8', 's4 and s8 exclude each other'),
    ('resist_plus:cpu90,smoke', 'cpu90 and smoke exclude each other'),
    ('deeper:152,cpu90', "'cpu90' is a scale of cifar10"),
  ],
)
def test_a_bad_card(card, says, tmp_path):
  assert re.search(says, refusal(tmp_path / 'run', card=card))


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('import nothing_of_the_kind', 'ModuleNotFoundError'),
    ('def get_config(:', 'SyntaxError'),
    ('def get_config():\n  return {}["x"]', "cannot be loaded: KeyError: 'x'"),
    ('def get_config():\n  return {"lr": 1}', 'returns a dict'),
    ('def get_config():\n  pass', 'returns a NoneType'),
    ('def get_config():\n  return open("no/such")', 'no/such'),
  ],
)
def test_a_broken_card(text, says, tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(text)
  line = refusal(tmp_path / 'run', card=card)
  assert re.search(says, line), line
  assert '\n' not in line


@pytest.mark.parametrize(
  ('workdir', 'says'),
  [
    ('gs://bucket/run', 'a URL'),
    ('s3://bucket/run', 'a URL'),
    ('$NO_SUCH_VARIABLE/run', 'is not set'),
    ('~no_such_user/run', 'no such home'),
    ('', '--workdir is missing: name the folder'),
    ('r\udce4n', 'not UTF-8'),
  ],
)
def test_a_workdir_that_is_no_local_folder(
  workdir, says, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  line = refusal(workdir)
  assert re.search(says, line), line
  assert '\n' not in line
  with pytest.raises(ConfigError):  # Without a command line, too.
    train.train(cards.load('digits:smoke'), workdir)
  assert not list(tmp_path.iterdir())


def test_a_home_folder_is_meant(tmp_path, monkeypatch):
  """The folder is a file, so nothing is trained."""
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'file').touch()
  monkeypatch.chdir(tmp_path)
  for workdir in ('~/file', '$HOME/file', '${HOME}/file'):
    assert f'{tmp_path / "file"} is not a folder' in refusal(workdir)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_workdir_below_a_file(tmp_path):
  file = tmp_path / 'file'
  file.write_text('not a folder')
  assert 'is not a folder' in refusal(file / 'run')
  assert file.read_text() == 'not a folder'


@pytest.mark.filterwarnings('ignore')  # TFDS's own, while it writes a set.
def test_labels_out_of_range(tmp_path):
  """A set whose own description of its classes is wrong."""
  tfds_sets.write(tmp_path, 'my_set', classes=10)
  (features,) = (tmp_path / 'my_set').rglob('features.json')
  text = features.read_text()
  assert '"numClasses": "10"' in text
  features.write_text(text.replace('"numClasses": "10"', '"numClasses": "4"'))
  words = ('--config.data.name=my_set', f'--config.data.dir={tmp_path}')
  says = r'has the label \d, but the set declares 4 classes, 0 to 3'
  assert re.search(says, refusal(tmp_path / 'run', *words))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_the_digits_card_works_for_any_small_set(tmp_path):
  tfds_sets.write(tmp_path / 'sets', 'cifar10')
  summary = train_here(
    tmp_path / 'run',
    *TINY,
    '--config.data.name=cifar10',
    f'--config.data.dir={tmp_path / "sets"}',
  )
  assert summary['dataset'] == 'cifar10'
  assert summary['rounds'] == 2


@pytest.mark.slow
def test_photographs_in_folders_train_by_their_path(tmp_path):
  for seed, (split, count) in enumerate((('train', 40), ('test', 8))):
    for i, (photo, label) in enumerate(tfds_sets.photographs(count, seed)):
      folder = tmp_path / 'photos' / split / ('china', 'flower')[label]
      folder.mkdir(parents=True, exist_ok=True)
      content = tfds_sets.encode(photo, 'JPEG').read()
      (folder / f'{i}.jpg').write_bytes(content)
  words = (*TINY, f'--config.data.name={tmp_path / "photos"}')
  finished = run(tmp_path / 'run', *words, '--config.data.image_size=16')
  assert finished.returncode == 0, finished.stderr
  assert '2: china, flower' in finished.stdout
  assert '16 x 16, 3' in (tmp_path / 'run' / 'report.html').read_text()
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['class_names'] == ['china', 'flower']
  assert summary['image_shape'] == [16, 16, 3]
  predict = export.load(tmp_path / 'run')
  assert predict.class_names == ('china', 'flower')
  assert predict.image_shape == (16, 16, 3)
  path = tmp_path / 'photos' / 'test' / 'flower' / 'notes.txt'
  path.write_text('about flowers')
  refused = run(tmp_path / 'again', *words)
  assert refused.returncode == 2
  (line,) = refused.stderr.splitlines()
  assert f'{path} is no image' in line


# Long enough that a signal comes before the end.
LONG = (*TINY, '--config.num_rounds=30', '--config.eval_every=30')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """What a run of `LONG` ends with that nobody stops."""
  folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
  done = run(folder, *LONG)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / 'summary.json').read_text())


@pytest.mark.faults
@pytest.mark.parametrize(
  'signum', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
)
def test_a_killed_run_goes_on_and_ends_bit_equal(
  signum, uninterrupted, tmp_path
):
  folder, log = tmp_path / 'killed', tmp_path / 'log'
  with log.open('w') as stderr:
    killed = subprocess.Popen(command(folder, *LONG), cwd=ROOT, stderr=stderr)
    wait_for(folder / 'checkpoints' / '2', killed, log)
    killed.send_signal(signum)
    code = killed.wait(LIMIT)
  if signum == signal.SIGKILL:
    assert code == -signum
  else:
    assert code == 128 + signum
    assert 'the same command goes on from there' in log.read_text()
  assert not (folder / 'summary.json').exists()
  two = report.read_rows(folder / 'metrics.jsonl')[:2]

  again = run(folder, *LONG)
  assert again.returncode == 0, again.stderr
  summary = json.loads((folder / 'summary.json').read_text())
  for name in ('params_hash', 'bytes_total', 'rounds', 'test_accuracy'):
    assert summary[name] == uninterrupted[name]
  # They are not trained twice: that would have taken other seconds.
  assert report.read_rows(folder / 'metrics.jsonl')[:2] == two


@pytest.mark.faults
def test_a_run_that_diverges_is_told_in_one_line(tmp_path):
  done = run(tmp_path / 'run', *TINY, '--config.lr=1e30')
  assert done.returncode == 1
  *_, line = done.stderr.splitlines()
  assert line.startswith('error: round 1: ')
  assert 'Lower lr (now 1e+30)' in line
  assert done.stderr.count('error: ') == 1
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('error', 'code', 'says'),
  [
    (ConfigError('lr is 0.'), 2, 'lr is 0.'),
    (NonFiniteError('round 1: lower lr.'), 1, 'round 1: lower lr.'),
    (WorkdirLostError('it is gone.'), 1, 'it is gone.'),
    (MeetingError('nobody came.'), 75, 'nobody came.'),
    (OSError(28, 'No space left on device'), 1, 'make room in runs/first; '),
    (OSError(5, 'Input/output error'), 1, 'mend that in runs/first; '),
  ],
)
def test_what_ends_a_run_has_a_line_and_a_code(error, code, says):
  line, found = program.explain(error, 'runs/first')
  assert found == code
  assert says in line
  assert len(line.splitlines()) == 1


@pytest.mark.faults
def test_more_steps_than_fit_in_memory_are_told_in_one_line(tmp_path):
  words = [*TINY, '--config.num_rounds=1', '--config.local_steps=2000000000']
  # A Linux that overcommits memory would kill the run, so it gets 64 GiB.
  limited = ['sh', '-c', f'ulimit -v {2**26} && exec "$@"', 'sh']
  done = subprocess.run(
    [*limited, *command(tmp_path / 'run', *words)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=LIMIT,
  )
  assert done.returncode == 1
  *_, line = done.stderr.splitlines()
  assert line.startswith('error: the memory does not suffice (')
  assert 'lower batch_size, local_steps or' in line
  assert 'Traceback' not in done.stderr


@pytest.mark.faults
def test_a_second_run_is_refused_and_a_lost_workdir_ends_the_first(tmp_path):
  folder, log = tmp_path / 'run', tmp_path / 'log'
  words = (*TINY, '--config.eval_every=100000')
  # Without checkpoints, which a run may be writing when its folder is moved.
  more = ('--config.num_rounds=100000', '--config.checkpoint_every=100000')
  with log.open('w') as stderr:
    first = subprocess.Popen(
      command(folder, *words, *more), cwd=ROOT, stderr=stderr
    )
    try:
      wait_for(folder / 'metrics.jsonl', first, log)
      second = run(folder, *words, *more)
      assert second.returncode == 2
      (line,) = second.stderr.strip().splitlines()
      assert f'is in use by process {first.pid} on' in line
      assert first.poll() is None, log.read_text()
      folder.rename(tmp_path / 'moved')
      assert first.wait(LIMIT) == 1
    finally:
      first.kill()
  (line,) = [x for x in log.read_text().splitlines() if 'error: ' in x]
  assert 'deleted, moved or replaced while the run trained' in line
  assert 'Traceback' not in log.read_text()
  assert not folder.exists()
  (tmp_path / 'moved').rename(folder)
  again = run(folder, *words, '--config.num_rounds=1')
  assert again.returncode == 0, again.stderr
  assert 'lock' not in {path.name for path in folder.iterdir()}


def wait_for(path, process, log):
  """Waits until a path exists, while a process lives."""
  deadline = time.monotonic() + LIMIT
  while not path.exists():
    assert process.poll() is None, log.read_text()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_run_loads_no_program_that_may_hang(tmp_path):
  """From JAX 0.11 on, a CPU mixes up the collectives of a loaded program."""
  environment = {
    **os.environ,
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for attempt in ('first', 'second'):
    result = subprocess.run(
      command(tmp_path / attempt, *TINY),
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=LIMIT,
    )
    assert result.returncode == 0, result.stderr
  names = {path.name.split('-')[0] for path in tmp_path.glob('cache/*')}
  assert ('jit_synchronise' in names) == (jax.__version_info__ < (0, 11))


STREAMS = {
  'closed': '>&- 2>&-',
  'on a full disk': '>/dev/full 2>/dev/full',
  'without a reader': '2>&1 | true',
}


@pytest.mark.parametrize('name', rest_is_slow(STREAMS, ['on a full disk']))
def test_a_run_goes_on_without_its_streams(name, tmp_path):
  """They show a progress bar, which nobody sees then."""
  if name == 'on a full disk' and not os.path.exists('/dev/full'):
    pytest.skip('this system has no /dev/full')
  words = [*TINY, '--config.num_rounds=2', '--config.log.report=False']
  line = shlex.join(command(tmp_path / 'run', *words))
  code = f'set -o pipefail; {line} {STREAMS[name]}'
  done = subprocess.run(['bash', '-c', code], cwd=ROOT, timeout=LIMIT)
  assert done.returncode == 0
  assert (tmp_path / 'run/summary.json').exists()
  assert len((tmp_path / 'run/metrics.jsonl').read_text().splitlines()) == 2
  code = f'set -o pipefail; {line} --config.nmu=1 {STREAMS[name]}'
  done = subprocess.run(['bash', '-c', code], cwd=ROOT, timeout=LIMIT)
  assert done.returncode == 2


def test_a_card_that_uses_jax_is_one_line(tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(
    'import jax\nfrom resist_jax.run.config import get_config as default\n'
    'def get_config():\n  config = default()\n'
    '  config.num_workers = 2 * jax.device_count()\n  return config\n'
  )
  done = run(tmp_path / 'run', *TINY, card=card)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: the card has used JAX before the run could')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('platform', ['nonesuch', 'cuda'])
def test_a_device_that_cannot_be_used_is_one_line(platform, tmp_path):
  done = subprocess.run(
    command(tmp_path / 'run', *TINY),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=LIMIT,
    env={**os.environ, 'JAX_PLATFORMS': platform},
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: JAX cannot use the devices of this host')
  assert 'set JAX_PLATFORMS=cpu' in line
