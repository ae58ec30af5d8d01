"""Damages of every file that a run leaves, each followed by its next use.

A resume begins by reading all that it reads, and what it then trains follows
from that alone. So each resume is judged by the state and the log with which it
begins, and some of each class of files go on to the end of the run.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import contextlib
import functools
import io
import json
import logging as python_logging
import pathlib
import random
import shutil
import sys
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from experiments.attack import judged, library, started
from experiments.attack.judged import Case
from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.report import page
from resist_jax.rounds import storage
from resist_jax.run import export, metrics, setup, train, workdir
from resist_jax.run.checkpoint import Checkpoints
from resist_jax.run.lock import locked

LIMIT = 120.0  # Seconds after which a use of the files hangs.
KILLED_AT, ROUNDS = 4, 6  # The run is killed after a round, and then goes on.
WHOLES = 1  # Resumes of each class of files that go on to the end of the run.
NOT_TRIED = (
  'permissions, which mean nothing to root',
  'damages while a run holds the file open',
  'pipes and devices in the place of files',
  'files of two folders that are damaged at once, except of two checkpoints',
)
_TIMES = ('seconds', 'images_per_second')  # Fields that differ in every run.


class Use(NamedTuple):
  """What a user does with files, and what it gives.

  Attributes:
    call: `call(folder)`; returns what has to be the same.
    clear: Errors whose message a person can act on.
    begin: The part of `call` that reads files, where the whole takes long.
  """

  call: Callable[[pathlib.Path], Any]
  clear: tuple[type[Exception], ...] = judged.IN_ONE_LINE
  begin: Callable[[pathlib.Path], Any] | None = None


class Target(NamedTuple):
  """A class of files.

  Attributes:
    name: Its name.
    use: What is done next.
    files: Returns the files to choose from.
    count: How often one of them is damaged.
    first: Is done to the folder before each damage.
  """

  name: str
  use: Use
  files: Callable[[pathlib.Path], Sequence[pathlib.Path]]
  count: int = 200
  first: Callable[[pathlib.Path], None] = lambda folder: None


# --- How files are damaged: each takes a file and the files of its folder. ---


def _flip(path, others, rng):
  content = bytearray(path.read_bytes() or b'\0')
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def _truncate(path, others, rng):
  content = path.read_bytes()
  path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def _empty(path, others, rng):
  path.write_bytes(b'')


def _garbage(path, others, rng):
  path.write_bytes(rng.randbytes(max(1, path.stat().st_size)))


def _zeros(path, others, rng):
  """As a file system leaves a file whose blocks were never written."""
  path.write_bytes(bytes(path.stat().st_size))


def _append(path, others, rng):
  with path.open('ab') as file:
    file.write(rng.randbytes(rng.randrange(1, 100)))


def _delete(path, others, rng):
  path.unlink()


def _folder(path, others, rng):
  path.unlink()
  path.mkdir()


def _link(path, others, rng):
  path.unlink()
  path.symlink_to('nowhere')


def _swap(path, others, rng):
  other = rng.choice([p for p in others if p != path] or [path])
  mine, theirs = path.read_bytes(), other.read_bytes()
  path.write_bytes(theirs)
  other.write_bytes(mine)


DAMAGES = {
  'a bit flipped': _flip,
  'cut off': _truncate,
  'emptied': _empty,
  'garbage': _garbage,
  'zeros': _zeros,
  'garbage added': _append,
  'deleted': _delete,
  'a folder instead': _folder,
  'a broken link instead': _link,
  'swapped with another file': _swap,
}


# --- What is done next. ---


def _resume(folder: pathlib.Path) -> Any:
  return train.train(_config(), folder)['params_hash']


def _begin(folder: pathlib.Path) -> tuple[int, str]:
  """Begins a resume as `train.train` does, and ends before the first round.

  Returns:
    The round that it goes on from, and a digest of the state.
  """
  config = _config()
  workdir.check(folder, config.to_dict())
  with locked(folder):
    checkpoints = Checkpoints(folder, _mesh())
    try:
      restored = checkpoints.restore()
    except ValueError as error:
      raise ConfigError(str(error)) from error
    done = restored.progress['round'] if restored else 0
    workdir.write_json(folder / 'config.json', config.to_dict())
    with metrics.MetricsLog(folder, done, ROUNDS):
      pass
  return (done, _digest(restored.stored)) if restored else (0, '')


def _digest(stored: storage.Stored) -> str:
  """Returns a digest of a state, and of what was counted until then."""
  record = json.dumps(stored.record, sort_keys=True)
  counted = np.frombuffer(record.encode(), np.uint8)
  return storage.digest_of_arrays([stored.state, counted])


@functools.cache
def _mesh():
  return setup.prepare(_config()).mesh


def _config():
  return started.config_of(f'--config.num_rounds={ROUNDS}')


def _report(folder: pathlib.Path) -> Any:
  """Makes the page; a refusal counts as the error that it printed."""
  err = io.StringIO()
  quiet = contextlib.redirect_stdout(io.StringIO())
  with quiet, contextlib.redirect_stderr(err):
    code = page.main([str(folder)])
  if code:
    outcome, said = judged.refusal(code, '', err.getvalue())
    if outcome != judged.REFUSED:
      raise AssertionError(said)
    raise ConfigError(said)
  return (folder / 'report.html').read_bytes()


def _load(folder: pathlib.Path) -> Any:
  model = export.load(folder)
  arrays = model.variables, model.scales, model.mean, model.std
  names = model.class_names, model.image_shape
  return repr(model.network), storage.digest_of_arrays(arrays), names


def _restore(folder: pathlib.Path) -> Any:
  trainer = library.trainer()
  state = trainer.restore(folder / 'state')
  return storage.digest_of_arrays(trainer.params(state)), int(state.round)


def _save_again(folder: pathlib.Path) -> Any:
  """Saves over a damaged state, and reads that."""
  trainer = library.trainer()
  state = trainer.init(library.parameters())
  trainer.save(folder / 'state', state)
  return _restore(folder)


RESUME, REPORT = Use(_resume, begin=_begin), Use(_report)
LOAD = Use(_load, (ValueError, FileNotFoundError))
RESTORE = Use(_restore, (ValueError,))
SAVE = Use(_save_again, (OSError,))


# --- What is damaged. ---


def _named(*patterns: str) -> Callable[[pathlib.Path], list[pathlib.Path]]:
  def files(folder):
    found = [p for pattern in patterns for p in folder.glob(pattern)]
    return sorted(p for p in found if p.is_file() and not p.is_symlink())

  return files


def _unfinished(folder: pathlib.Path) -> list[pathlib.Path]:
  with contextlib.suppress(FileNotFoundError):  # It has just been finished.
    return _named('checkpoints/*tmp*/**/*')(folder)
  return []


def _saved(folder: pathlib.Path) -> list[int]:
  return workdir.saved_rounds(folder / 'checkpoints')


def _checkpoint(age: int) -> Callable[[pathlib.Path], list[pathlib.Path]]:
  def files(folder):
    step = _saved(folder)[-1 - age]
    return _named(f'checkpoints/{step}/**/*')(folder)

  return files


def _lose_newest(folder: pathlib.Path) -> None:
  """Damages the newest checkpoint, so that the one before it is read."""
  newest = folder / 'checkpoints' / str(_saved(folder)[-1])
  (newest / '_CHECKPOINT_METADATA').write_text('{}')


def _lose_manifests(folder: pathlib.Path) -> None:
  """Leaves checkpoints without manifests, as a copy of their folder alone."""
  shutil.rmtree(folder / 'digests')


def _diverged(folder: pathlib.Path) -> None:
  """Leaves what a run leaves that diverged, and was told to go on."""
  newest = _saved(folder)[-1]
  aside = folder / 'set_aside'
  aside.mkdir()
  shutil.copytree(folder / f'checkpoints/{newest}', aside / str(newest))


TARGETS = (
  Target('config.json, resume', RESUME, _named('config.json')),
  Target('metrics.jsonl, resume', RESUME, _named('metrics.jsonl')),
  Target('newest checkpoint, resume', RESUME, _checkpoint(0)),
  Target('two checkpoints, resume', RESUME, _checkpoint(1), 200, _lose_newest),
  Target('checkpoint without manifest, resume', RESUME, _checkpoint(0), 200,
         _lose_manifests),
  Target('digests, resume', RESUME, _named('digests/[0-9]*.json')),
  Target('digests/good.json, resume', RESUME, _named('digests/good.json')),
  Target('lock and run_id, resume', RESUME, _named('lock', 'run_id')),
  Target('model, load', LOAD, _named('model/**/*')),
  Target('state of a Trainer, restore', RESTORE, _named('state/**/*')),
  Target('state of a Trainer, save again', SAVE, _named('state/**/*')),
  # These are written again, and never read.
  Target('model, resume', RESUME, _named('model/**/*'), 40),
  Target('summary.json and report, resume', RESUME,
         _named('summary.json', '*.html', '*.png'), 40),
  Target('tensorboard, resume', RESUME, _named('tensorboard/*'), 40),
  Target('an unfinished checkpoint, resume', RESUME, _unfinished, 40),
  Target('set_aside, resume', RESUME, _named('set_aside/**/*'), 40,
         _diverged),
  # These draw pictures, and take longest.
  Target('config.json, report', REPORT, _named('config.json')),
  Target('metrics.jsonl, report', REPORT, _named('metrics.jsonl')),
  Target('summary.json, report', REPORT, _named('summary.json')),
)  # fmt: skip


def make_source(folder: pathlib.Path) -> None:
  """Trains a run to its end, and kills it while it is given more rounds.

  Args:
    folder: Its workdir, which then also holds what only several processes
      write, and the state of a `Trainer`.
  """
  output = folder.with_name('source_output')
  rounds = f'--config.num_rounds={KILLED_AT - 1}'
  begun = started.Started(started.alone(folder, rounds), output).end()
  assert begun.code == 0, begun.err
  summary = (folder / 'summary.json').read_text()
  # Rounds without end, so that the kill comes in one of them.
  command = started.alone(folder, '--config.num_rounds=1000')
  process = started.Started(command, output)
  while not (folder / f'checkpoints/{KILLED_AT}').is_dir():
    assert process.process.poll() is None, process.end()
    time.sleep(0.002)
  while not _unfinished(folder):
    assert process.process.poll() is None, process.end()
  process.kill()
  # A run that goes on removes it, but it is to be damaged, too.
  workdir.replace_text(folder / 'summary.json', summary)
  workdir.mark(folder)
  trainer = library.trainer()
  state = trainer.init(library.parameters())
  trainer.save(folder / 'state', state)


class _Warnings(python_logging.Handler):
  """Keeps what the program warns of."""

  def __init__(self):
    super().__init__()
    self.lines: list[str] = []

  def emit(self, record):
    self.lines.append(record.getMessage())


def _essence(rows: Sequence[dict]) -> list[dict]:
  """Returns the rows of a log without measured times."""
  return [
    {k: v for k, v in row.items() if not k.startswith(_TIMES)} for row in rows
  ]


class _Attack:
  """The same folder, damaged again and again."""

  def __init__(self, source: pathlib.Path, rng: random.Random):
    """Finds out what each checkpoint gives without damage."""
    self._source, self._rng = source, rng
    self._work = source.with_name('work')
    self._expected: dict[str, tuple[Any, list]] = {}
    self._states = {
      step: _digest(storage.read(source / f'checkpoints/{step}', _mesh()))
      for step in _saved(source)
    }
    self._rows = _essence(report.read_rows(source / 'metrics.jsonl'))
    self._warnings = _Warnings()
    logging.get_absl_logger().addHandler(self._warnings)

  def _fresh(self, target: Target) -> None:
    shutil.rmtree(self._work, ignore_errors=True)
    shutil.copytree(self._source, self._work, symlinks=True)
    target.first(self._work)

  def _log(self) -> list[dict]:
    return _essence(report.read_rows(self._work / 'metrics.jsonl'))

  def _undamaged(self, target: Target) -> tuple[Any, list]:
    """Returns what the whole use gives without damage, and the log then."""
    if target.name not in self._expected:
      self._fresh(target)
      value = target.use.call(self._work)
      self._expected[target.name] = value, self._log()
    return self._expected[target.name]

  def once(self, target: Target, damage: str, whole: bool) -> Case:
    """Damages a file, and uses it; `whole` goes on to the end of the use."""
    call = (not whole and target.use.begin) or target.use.call
    if call is target.use.call:
      self._undamaged(target)
    self._fresh(target)
    files = target.files(self._work)
    path = self._rng.choice(files)
    DAMAGES[damage](path, files, self._rng)
    self._warnings.lines.clear()
    with contextlib.redirect_stderr(io.StringIO()):  # Progress bars.
      found = judged.answer(lambda: call(self._work), LIMIT, target.use.clear)
    what = f'{path.relative_to(self._work)}: {damage}'
    outcome, said = found.outcome, found.said
    if not outcome and call is target.use.begin:
      outcome, said = self._judge_begin(*found.value)
    elif not outcome:
      outcome, said = self._judge(target, found.value)
    return Case(target.name, what, outcome, said)

  def _judge_begin(self, done: int, digest: str) -> tuple[str, str]:
    """Judges a resume by the state and the log that it begins with."""
    if self._states.get(done) != digest:
      return judged.WRONG, f'another state of round {done}'
    return self._judge_log([r for r in self._rows if r['round'] <= done])

  def _judge(self, target: Target, value: Any) -> tuple[str, str]:
    """Judges a use that gave something."""
    expected, log = self._undamaged(target)
    if target.use is REPORT:
      same = value == expected
      return (judged.SAME if same else judged.AS_WRITTEN), ''
    if value != expected:
      return judged.WRONG, f'{value} instead of {expected}'
    return self._judge_log(log) if target.use is RESUME else (judged.SAME, '')

  def _judge_log(self, log: list[dict]) -> tuple[str, str]:
    """Judges the log, where the parameters are the same."""
    rows = self._log()
    if rows == log:
      return judged.SAME, ''
    if [row['round'] for row in rows] == [row['round'] for row in log]:
      return judged.AS_WRITTEN, ''
    warned = [x for x in self._warnings.lines if 'metrics.jsonl' in x]
    if warned:
      return judged.WARNED, warned[0]
    return judged.WRONG, f'the log has rounds {[r["round"] for r in rows]}'


def attack(seed: int, share: float, folder: pathlib.Path) -> dict[str, Any]:
  """Damages the files of one run again and again.

  Args:
    seed: Seed of the damages.
    share: Share of the damages to make.
    folder: An empty folder.

  Returns:
    The record.
  """
  rng = random.Random(seed)
  with contextlib.suppress(RuntimeError):  # JAX has already been initialised.
    jax.config.update('jax_num_cpu_devices', 2)
  source = folder / 'source'
  make_source(source)
  attacked, cases = _Attack(source, rng), []
  not_tried = list(NOT_TRIED)
  for target in TARGETS:
    try:
      _of_class(attacked, target, share, rng, cases)
    except KeyboardInterrupt:  # What was counted is kept.
      done = sum(case.group == target.name for case in cases)
      rest = [t.name for t in TARGETS[TARGETS.index(target) + 1 :]]
      not_tried.append(f'stopped after {done} of {target.name}, before {rest}')
      break
  config = {
    'flags': [*started.TINY, f'--config.num_rounds={ROUNDS}'],
    'killed_after_round': KILLED_AT,
    'damages': list(DAMAGES),
    'resumes_of_each_class_that_end_the_run': max(1, round(share * WHOLES)),
    'limit_seconds': LIMIT,
  }
  record = judged.record(
    'damages', config, seed, cases, folder, not_tried, listed=False
  )
  of_damages = {name: Counter[str]() for name in DAMAGES}
  for case in cases:
    of_damages[case.what.rpartition(': ')[2]][case.outcome] += 1
  return {**record, 'by_damage': of_damages}


def _of_class(
  attacked: _Attack,
  target: Target,
  share: float,
  rng: random.Random,
  cases: list[Case],
) -> None:
  """Damages files of a class, and adds what comes of it to `cases`."""
  wholes = max(1, round(share * WHOLES))
  damages = list(DAMAGES)  # Each comes equally often.
  rng.shuffle(damages)
  for number in range(max(1, round(share * target.count))):
    damage = damages[number % len(damages)]
    cases.append(attacked.once(target, damage, number < wholes))
  found = [case for case in cases if case.group == target.name]
  bad = [case for case in found if case.outcome in judged.BAD]
  print(f'{target.name}: {len(found)}, bad {len(bad)}', file=sys.stderr)
