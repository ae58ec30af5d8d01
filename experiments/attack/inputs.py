"""Bad inputs: each must be refused in one line, and leave nothing behind."""

from collections.abc import Callable, Iterator
import contextlib
import io
import pathlib
import random
import re
import shutil
import sys
from typing import Any, NamedTuple

from absl import flags

from experiments.attack import bad_cards, judged, library, started
from experiments.attack.judged import Case
from resist_jax.report import page
from resist_jax.run import command, train

LIMIT = 240.0  # Seconds after which a call hangs, on a busy machine.
FRESH = 12  # Command lines that a process of its own gets as well.
NOT_TRIED = (
  'sets of images whose files are damaged',
  'data in the cloud',
  'flags of absl',
)


class Words(NamedTuple):
  """A bad command line.

  Attributes:
    group: What is bad.
    words: The flags, in which `{tmp}` is a folder.
    says: A pattern that the line must match.
    tiny: Whether it also has the flags of `started.TINY`.
  """

  group: str
  words: tuple[str, ...]
  says: str
  tiny: bool = True


def _fields(group: str, *pairs: tuple[str, str]) -> list[Words]:
  """Returns a command line for each `FIELD=VALUE`, with what it must say."""
  return [Words(group, (f'--config.{word}',), says) for word, says in pairs]


FLAGS = [
  Words('flags', words, says)
  for words, says in (
    (('--workdri={tmp}/x',), 'unknown flag --workdri'),
    (('--workdir=',), 'workdir'),
    (('--workdir',), 'workdir'),
    (('--workdir=gs://bucket/run',), 'URL'),
    (('--workdir=~nobody_at_all/run',), 'no such home'),
    (('--workdir=$NO_SUCH_VARIABLE/run',), 'NO_SUCH_VARIABLE'),
    (('--workdir={tmp}/file/run',), 'not a folder'),
    (('--workdir={tmp}/file',), 'not a folder'),
    (('--workdir={tmp}/\x00',), 'zero byte'),
    (('--workdir={tmp}/' + 300 * 'x',), 'workdir'),
    (('--config=digits:tiny',), 'tiny'),
    (('--config=cifar10:s3',), 's3'),
    (('--config=',), 'neither a card nor a file'),
    (('--config={tmp}',), 'neither a card nor a file'),
    (('--config=/dev/null',), 'neither a card nor a file'),
    (('--config.lr',), 'lr'),
    (('--config.',), 'config'),
    (('--config.lr.x=1',), 'lr'),
    (('--config.optimizer=sgd',), 'optimizer'),
    (('--noconfig.data.sharde',), 'sharde'),
    (('--num_processes=2',), 'go together'),
    (('--num_processes=two',), 'num_processes'),
    (('--process_id=-1',), 'process_id'),
    (('--coordinator=localhost:1', '--num_processes=2'), 'go together'),
    (('--coordinator=:1', '--num_processes=2', '--process_id=0'),
     'HOST:PORT'),
    (('--coordinator=a:b', '--num_processes=2', '--process_id=1'),
     'HOST:PORT'),
    (('--coordinator=a:1', '--num_processes=2', '--process_id=2'), 'it is 0'),
    (('--', 'more'), 'unexpected argument'),
  )
]  # fmt: skip
TYPES = _fields(
  'types',
  ('num_workers=2.5', 'num_workers'),
  ('num_rounds=1e2', 'num_rounds'),
  ('local_steps=', 'local_steps'),
  ('lr=fast', 'lr'),
  ('lr=', 'lr'),
  ('data.sharded=perhaps', 'sharded'),
  ('partition=third', 'partition'),
  ('partition=(1,', 'partition'),
  ('partition=(1.5,)', 'partition'),
  ('depths=(1,', 'depths'),
  ('depths=quick', 'depths'),
  ('depths=(2.5,2.5)', 'depths'),
  ('depths={}', 'depths'),
  ('model.widths=wide', 'widths'),
  ('model.stage_sizes=(1,x)', 'stage_sizes'),
  ('optimizer.drops=half', 'drops'),
  ('data.extra_tests=(1,)', 'extra_tests'),
)
RANGES = _fields(
  'ranges',
  ('num_workers=0', 'num_workers'),
  ('num_workers=-2', 'num_workers'),
  ('num_workers=99999999999999999999', 'workers'),
  ('workers_per_process=-1', 'workers_per_process'),
  ('num_devices=-1', 'num_devices'),
  ('num_devices=64', 'num_devices'),
  ('devices_per_worker=0', 'devices_per_worker'),
  ('devices_per_worker=64', 'devices_per_worker'),
  ('num_rounds=0', 'num_rounds'),
  ('local_steps=-1', 'local_steps'),
  ('seed=-1', 'seed'),
  ('batch_size=0', 'batch_size'),
  ('batch_size=100000', 'batch_size'),
  ('lr=-0.1', 'lr'),
  ('lr=nan', 'lr'),
  ('optimizer.momentum=1', 'momentum'),
  ('optimizer.weight_decay=-1', 'weight_decay'),
  ('optimizer.bias_rate=-1', 'optimizer.bias_rate'),
  ('optimizer.drops=(0.7,0.5)', 'drops'),
  ('optimizer.drops=(nan,)', 'drops'),
  ('optimizer.warmup_rounds=-1', 'warmup_rounds'),
  ('partition=()', 'partition'),
  ('partition=(9,)', 'stage 9'),
  ('partition=(0,)', 'stage 0'),
  ('min_depth=-1', 'min_depth'),
  ('min_depth=5', 'chain of 4 blocks'),
  ('depths=(4,0)', 'depths|depth'),
  ('depths=(9,9)', 'depths|blocks'),
  ('depths=(1,1)', 'depths|blocks'),
  ('depths=(2,1,1)', 'depths'),
  ('model.widths=(4,0)', 'widths'),
  ('model.widths=(4,4,4)', 'widths'),
  ('model.stage_sizes=(1,-5)', 'stage_sizes'),
  ('phases.full_before=-1', 'full_before'),
  ('phases.full_after=9', 'phases'),
  ('eval_every=0', 'eval_every'),
  ('checkpoint_every=0', 'checkpoint_every'),
  ('evaluation.batch_size=0', 'evaluation.batch_size'),
  ('evaluation.statistics_images=0', 'statistics_images'),
  ('evaluation.batches_at_once=0', 'batches_at_once'),
  ('data.validation=1', 'validation'),
  ('data.validation=-0.5', 'validation'),
  ('data.image_size=0', 'image_size'),
  ('faults.timeout=0', 'timeout'),
  ('faults.progress_timeout=-1', 'progress_timeout'),
  ('faults.update_factor=0.5', 'update_factor'),
  ('faults.loss_factor=inf', 'loss_factor'),
)
CHOICES = _fields(
  'choices',
  ('protocol=resits', 'protocol'),
  ('exchange=psum', 'exchange'),
  ('wire_format=int4', 'wire_format'),
  ('residual_scale=always', 'residual_scale'),
  ('optimizer.schedule=stepp', 'schedule'),
  ('model.name=ResNet', 'name'),
  ('model.norm=layer', 'norm'),
  ('model.stem=large', 'stem'),
  ('model.dtype=float16', 'dtype'),
  ('data.augment=mixup', 'augment'),
  ('data.streaming=sometimes', 'streaming'),
)
COMBINATIONS = [
  Words('combinations', tuple(f'--config.{word}' for word in words), says)
  for words, says in (
    (('protocol=data_parallel', 'wire_format=int8'), 'int8'),
    (('protocol=local_sgd', 'depths=(2,2)'), 'depths'),
    (('protocol=local_sgd', 'phases.full_before=1'), 'phases'),
    (('depths=by_speed', 'min_depth=3'), 'by_speed'),
    (('depths=(2,2)', 'partition_strided=True'), 'depths'),
    (('num_workers=5',), '5 workers'),
    (('num_workers=5', 'num_devices=2'), 'num_devices'),
    (('batch_size=9', 'devices_per_worker=2'), 'devices_per_worker'),
    (('faults.leave_out=False', 'faults.loss_factor=2'), 'leave_out'),
    (('protocol=data_parallel', 'faults.loss_factor=2'), 'loss_factor'),
    (('data.sharded=True', 'batch_size=1000'), 'batch_size'),
    (('data.validation=0.9999', 'batch_size=64'), 'validation'),
  )
]
DATA = _fields(
  'data',
  ('data.name=', 'data set'),
  ('data.name=no_such_set', 'no_such_set'),
  ('data.name=../digits', 'digits'),
  ('data.name=imdb_reviews', 'imdb_reviews'),
  ('data.train_split=trian', 'trian'),
  ('data.test_split=train[:10%]', 'split'),
  ("data.extra_tests=('no_such_set',)", 'no_such_set'),
)


def _in_tmp(words: Words, folder: pathlib.Path) -> tuple[str, ...]:
  given = [word.replace('{tmp}', str(folder)) for word in words.words]
  if not any(word.startswith('--workdir') for word in given):
    given.insert(0, f'--workdir={folder / "run"}')
  tiny = (*started.TINY, f'--config.data.dir={folder / "none"}')
  return (*(tiny if words.tiny else ()), *given)


def of_words(folder: pathlib.Path) -> list[Words]:
  """Returns all bad command lines; writes the cards of some.

  Args:
    folder: Where to.
  """
  cards = [
    Words('cards', (f'--config={path}',), says, tiny=False)
    for path, says in bad_cards.write(folder)
  ]
  return [*FLAGS, *TYPES, *RANGES, *CHOICES, *COMBINATIONS, *DATA, *cards]


def attack(seed: int, share: float, folder: pathlib.Path) -> dict[str, Any]:
  """Gives bad input to the command, to the report and to the library.

  Args:
    seed: Which command lines are tried in a process of their own, too.
    share: Share of the inputs to give.
    folder: An empty folder.

  Returns:
    The record.
  """
  rng = random.Random(seed)
  lines = of_words(folder / 'cards')
  calls = library.calls(folder / 'library')
  chosen = rng.sample(lines, max(1, round(share * FRESH)))
  if share < 1:
    lines = rng.sample(lines, max(1, round(share * len(lines))))
    calls = rng.sample(calls, max(1, round(share * len(calls))))
  cases = [_here(words, folder / 'here') for words in lines]
  cases += [_fresh(words, folder / 'fresh') for words in chosen]
  cases += [_report(*bad, folder / 'report') for bad in REPORTS]
  cases += [_workdir(*bad, folder / 'workdirs') for bad in WORKDIRS]
  for group, what, call, says in calls:
    found = judged.answer(call, LIMIT, (ValueError, OSError))
    cases.append(_judge(group, what, found, says))
  config = {'flags': started.TINY, 'limit_seconds': LIMIT}
  return judged.record('inputs', config, seed, cases, folder, NOT_TRIED)


def _judge(group: str, what: str, found: judged.Answer, says: str) -> Case:
  if not found.outcome:
    return Case(group, what, judged.WRONG, f'it was accepted: {found.value}')
  if found.outcome == judged.REFUSED and not re.search(says, found.said):
    return Case(group, what, judged.WRONG, found.said)
  return Case(group, what, found.outcome, found.said)


@contextlib.contextmanager
def _clean(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives an empty folder with a file in it, and deletes it afterwards."""
  folder.mkdir()
  (folder / 'file').touch()
  yield folder
  shutil.rmtree(folder)


def _left(folder: pathlib.Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir() if p.name != 'file')


def _train(*words: str) -> Any:
  """Trains in this process, as the command does."""
  values = flags.FlagValues()
  command.define(values)
  options = command.parse(['resist_jax', *words], values)
  return train.train(options.config, options.workdir)


def _here(words: Words, folder: pathlib.Path) -> Case:
  """Gives a command line to this process."""
  what = ' '.join(words.words)[:100]
  with _clean(folder):
    given = _in_tmp(words, folder)
    found = judged.answer(lambda: _train(*given), LIMIT)
    case = _judge(words.group, what, found, words.says)
    if _left(folder):
      said = f'it left {", ".join(_left(folder))}: {case.said}'
      case = case._replace(outcome=judged.WRONG, said=said)
  return case


def _fresh(words: Words, folder: pathlib.Path) -> Case:
  """Gives a command line to a process of its own."""
  what = ' '.join(words.words)[:100]
  if any('\x00' in word for word in words.words):  # No process can get it.
    words = words._replace(words=('--workdir={tmp}/file',), says='not a folder')
  with _clean(folder), _clean(folder.with_name('output')) as output:
    argv = [sys.executable, '-m', 'resist_jax']
    ended = started.Started(
      [*argv, *_in_tmp(words, folder)], output / 'of'
    ).end()
    outcome, said = judged.refusal(*ended, says=f'.*({words.says})')
    if _left(folder):
      outcome, said = judged.WRONG, f'it left {_left(folder)}: {said}'
  return Case('in a process of its own', what, outcome, said)


ROW = '{"round": 1, "slots": {}}\n'
# Arguments of the report, files that lie in {tmp}, and what it must say.
REPORTS = (
  ((), {}, 'RUN'),
  (('--ot=x', '{tmp}'), {}, 'ot'),
  (('{tmp}/none',), {}, 'none'),
  (('{tmp}',), {}, 'config.json'),
  (('{tmp}/file',), {}, 'config.json'),
  (('{tmp}', '{tmp}'), {}, 'twice'),
  (('{tmp}',), {'config.json': '{}'}, 'metrics.jsonl'),
  (('{tmp}',), {'config.json': '{}', 'metrics.jsonl': ''}, 'no round'),
  (('{tmp}',), {'config.json': '{', 'metrics.jsonl': ROW}, 'config.json'),
  (('{tmp}',), {'config.json': '[]', 'metrics.jsonl': ROW}, 'config.json'),
  (('{tmp}',), {'config.json': '{}', 'metrics.jsonl': '{}\n'}, 'line 1'),
  (('{tmp}', '--out=gs://bucket/x'),
   {'config.json': '{}', 'metrics.jsonl': ROW}, 'URL'),
  (('{tmp}', '--out={tmp}/file'),
   {'config.json': '{}', 'metrics.jsonl': ROW}, 'file'),
)  # fmt: skip


def _report(
  args: tuple[str, ...], files: dict[str, str], says: str, folder: pathlib.Path
) -> Case:
  """Gives bad arguments, or a bad workdir, to the report."""
  what = f'{" ".join(args)} {files or ""}'
  out, err = io.StringIO(), io.StringIO()

  def call() -> int:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        return page.main([arg.replace('{tmp}', str(folder)) for arg in args])
      except SystemExit as stop:
        return int(stop.code or 0)

  with _clean(folder):
    for name, text in files.items():
      (folder / name).write_text(text)
    found = judged.answer(call, LIMIT)
    outcome, said = found.outcome, found.said
    if not outcome:
      outcome, said = judged.refusal(
        found.value, out.getvalue(), err.getvalue(), f'.*({says})'
      )
    if set(_left(folder)) != set(files):
      outcome, said = judged.WRONG, f'it left {_left(folder)}: {said}'
  return Case('report', what, outcome, said)


def _file(name: str, text: str) -> Callable[[pathlib.Path], None]:
  def make(folder: pathlib.Path) -> None:
    (folder / name).write_text(text)

  return make


def _folder(name: str) -> Callable[[pathlib.Path], None]:
  return lambda folder: (folder / name).mkdir(parents=True)


def _checkpoint(folder: pathlib.Path) -> None:
  (folder / 'checkpoints/3').mkdir(parents=True)
  (folder / 'checkpoints/3/_CHECKPOINT_METADATA').write_text('{}')


def _same_config(folder: pathlib.Path) -> None:
  config = started.config_of()
  (folder / 'config.json').write_text(config.to_json())


def _only_damaged(folder: pathlib.Path) -> None:
  _checkpoint(folder)
  _same_config(folder)


def _bad_log(folder: pathlib.Path) -> None:
  _same_config(folder)
  (folder / 'metrics.jsonl').write_text('{"round": "one"}\n')


# Workdirs that cannot be used: how they are made, and what must be said.
WORKDIRS = (
  ('config.json is empty', _file('config.json', ''), 'config.json'),
  ('config.json is a list', _file('config.json', '[]'), 'config.json'),
  ('config.json is deep', _file('config.json', 9999 * '['), 'config.json'),
  ('config.json is a folder', _folder('config.json'), 'config.json'),
  ('another config', _file('config.json', '{"lr": 1}'), 'another config'),
  ('a checkpoint alone', _checkpoint, 'no config.json'),
  ('a damaged checkpoint alone', _only_damaged, 'damaged'),
  ('checkpoints is a file', _file('checkpoints', ''), 'checkpoints'),
  ('digests is a file', _file('digests', ''), 'digests'),
  ('model is a file', _file('model', ''), 'model'),
  ('tensorboard is a file', _file('tensorboard', ''), 'tensorboard'),
  ('lock is a folder', _folder('lock'), 'lock'),
  ('metrics.jsonl is a folder', _folder('metrics.jsonl'), 'metrics.jsonl'),
  ('metrics.jsonl is damaged', _bad_log, 'line 1'),
)


def _workdir(
  what: str,
  make: Callable[[pathlib.Path], None],
  says: str,
  folder: pathlib.Path,
) -> Case:
  """Trains in a workdir that cannot be used."""
  folder.mkdir()
  make(folder)
  words = *started.TINY, f'--workdir={folder}'
  found = judged.answer(lambda: _train(*words), LIMIT)
  shutil.rmtree(folder)
  if not found.outcome:  # It made room for its own.
    return Case('workdirs', what, judged.SAME)
  return _judge('workdirs', what, found, says)
