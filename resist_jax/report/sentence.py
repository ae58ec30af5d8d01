"""What came out of some runs, in the sentences on top of their page."""

from collections.abc import Sequence
import math
import statistics
from typing import Any

from resist_jax.report.colours import protocol_name
from resist_jax.report.compare import (
  POINTS,
  SEEDS,
  Comparison,
  compare,
)
from resist_jax.report.groups import Group
from resist_jax.report.records import Summary, further_tests
from resist_jax.report.units import byte_text

# Settings in which runs of different protocols may differ and be compared.
_OF_PROTOCOL = (
  'protocol', 'exchange', 'wire_format', 'min_depth', 'depths', 'seed',
  'data.dir', 'checkpoint_every', 'eval_every', 'evaluation.at_start',
)  # fmt: skip
_NAMES = 10  # Classes that a page names.


def sentences(groups: Sequence[Group]) -> list[str]:
  """Returns what came out, for a reader who knows nothing of the runs.

  Args:
    groups: At least one.

  Returns:
    Sentences: how well, at what cost, what that says, and what was trained.
  """
  found = [_result(groups)]
  if not groups[1:]:
    return [*found, *_alone(groups[0]), *_seeds(groups), *_task(groups)]
  differ = _other_settings(groups)
  if len({str(g.summary.get('dataset')) for g in groups}) > 1:
    found.append('Accuracies on different data cannot be compared.')
  else:
    base = _base(groups)
    for group in groups:
      found += [_beside(group, base)] if group is not base else []
  if differ:
    found.append(
      f'These runs differ in more than their protocol ({differ}), so their '
      'numbers do not compare the protocols alone.'
    )
  return [text for text in (*found, *_seeds(groups), *_task(groups)) if text]


def _base(groups: Sequence[Group]) -> Group:
  """Returns what others are compared with: a baseline, else the first."""
  for protocol in ('local_sgd', 'data_parallel'):
    for group in groups:
      if group.protocol == protocol:
        return group
  return groups[0]


def _task(groups: Sequence[Group]) -> list[str]:
  """Says what was trained, on which images, with how many workers."""
  kinds = {}
  for group in groups:
    data = _text(group, 'dataset') + _images(group.summary)
    workers = _text(group, 'num_workers')
    plural = '' if workers == '1' else 's'
    task = (
      f'{workers} worker{plural} trained {_text(group, "model")} on {data}.'
    )
    kinds.setdefault(task, []).append(group)
  if len(kinds) == 1:
    return list(kinds)
  return [
    f'In {_listed([_name(group) for group in some])}, {task}'
    for task, some in kinds.items()
  ]


def _listed(names: Sequence[str]) -> str:
  *most, last = names
  return f'{", ".join(most)} and {last}' if most else last


def _text(group: Group, field: str) -> str:
  value = group.summary.get(field)
  return str(value) if isinstance(value, str | int) else '?'


def _images(summary) -> str:
  """Says how many classes there are, which ones, and how large an image is."""
  count, names, shape = classes_and_shape(summary)
  parts = []
  if count:
    parts.append(f'{count:,} classes ({names})')
  if shape:
    height, width, channels = shape
    parts.append(
      f'images of {height} x {width} pixels in {channels} '
      f'channel{"" if channels == 1 else "s"}'
    )
  return f': {", ".join(parts)}' if parts else ''


def classes_and_shape(summary: Summary) -> tuple[int, str, list[Any]]:
  """Returns the number of classes, names of some, and `[H, W, C]` of an image.

  What the summary of a run does not say is 0 or empty.
  """
  names, shape = summary.get('class_names'), summary.get('image_shape')
  names = names if isinstance(names, list) else []
  more = ', …' if names[_NAMES:] else ''
  known = isinstance(shape, list) and len(shape) == 3
  listed = ', '.join(map(str, names[:_NAMES]))
  return len(names), f'{listed}{more}', shape if known else []


def _examples(group: Group) -> str:
  """Returns what a network learns from."""
  # Older summaries do not say it; of ResNets, tests have no loss.
  usual = 'examples' if group.values('test_loss') else 'images'
  return str(group.summary.get('unit', usual))


def _result(groups: Sequence[Group]) -> str:
  """Says how well the groups classify, and which have not finished."""
  tested = [group for group in groups if _tests(group)]
  rounds = {group.name: _rounds(group) for group in groups}
  once = len(set(rounds.values())) == 1
  data = {_text(group, 'dataset') for group in groups}
  after = f'After {rounds[groups[0].name]}' if once else ''
  if len(data) == 1:
    after += f'{" on" if once else "On"} {data.pop()}'
  after += ', ' if after else ''
  parts = []
  for number, group in enumerate(tested):
    own = '' if once else f' (after {rounds[group.name]})'
    text = f'{_name(group)}{own} reaches a test loss of {_loss_of(group)}'
    if group.values('test_accuracy'):
      verb = '' if number else ' classifies'
      rest = '' if number else f' of the test {_examples(group)} correctly'
      text = f'{_name(group)}{own}{verb} {_percent_of(group, "test")}{rest}'
    for test in further_tests_of(group):
      if group.values(f'{test}_accuracy'):
        text += f' ({_percent_of(group, test)} on the test {test})'
    parts.append(text)
  counts = {len(_tests(group)) for group in tested} - {1}
  seeds = ' or '.join(map(str, sorted(counts)))
  note = f' (mean and deviation of {seeds} seeds)' if counts else ''
  found = f'{after}{_listed(parts)}{note}.' if parts else ''
  missing = [_name(group) for group in groups if group not in tested]
  if missing:
    verb = 'have' if missing[1:] else 'has'
    found += ' ' + _begin(f'{_listed(missing)} {verb} not been tested yet.')
  return _begin(found.strip())


def _rounds(group: Group) -> str:
  of, _, state = str(group.summary.get('of_rounds', '')).partition(', ')
  done = f'{group.summary.get("rounds", "?")}{of} rounds'
  return f'{done}, {state}' if state else done


def _tests(group: Group) -> list[float]:
  """Returns the accuracies, or of a network without them the losses."""
  return group.values('test_accuracy') or group.values('test_loss')


def _loss_of(group: Group) -> str:
  found = group.values('test_loss') or [math.nan]
  deviation = f' ± {statistics.stdev(found):.2g}' if found[1:] else ''
  return f'{statistics.mean(found):.4g}{deviation}'


def _percent_of(group: Group, test: str) -> str:
  found = [100 * v for v in group.values(f'{test}_accuracy')]
  deviation = f' ± {statistics.stdev(found):.1f}' if found[1:] else ''
  return f'{statistics.mean(found):.1f}{deviation}%'


def further_tests_of(group: Group) -> list[str]:
  """Returns the names of a group's tests other than `test`."""
  return further_tests(n for run in group.runs for n in run.summary)


def _name(group: Group) -> str:
  """Returns a group's name, as in the middle of a sentence."""
  name = protocol_name(group.protocol)
  if group.name in (name, group.protocol):
    return name
  return f'{group.name} ({name})' if name else group.name


def _begin(sentence: str) -> str:
  """Returns a sentence that begins with a capital, if with no folder's name."""
  baselines = tuple(map(protocol_name, ('local_sgd', 'data_parallel')))
  if sentence.startswith(baselines):
    return sentence[:1].upper() + sentence[1:]
  return sentence


def _alone(group: Group) -> list[str]:
  """Says what a run sent, beside what the baselines would have sent."""
  kind, sent = _sent(group, field='bytes_per_round')
  if not sent:
    return []
  parts = []
  for protocol in ('local_sgd', 'data_parallel'):
    whole = group.values(f'{kind}_{protocol}')
    if whole and whole[0] and protocol != group.protocol:
      share = _percent(sent / whole[0])
      parts.append(f'{share} of what {protocol_name(protocol)} would send')
  beside = f': {" and ".join(parts)}' if parts else ''
  seconds = group.values('seconds_training')
  time = f' Training took {_seconds(seconds)}.' if seconds else ''
  return [f'{_all(kind)} {byte_text(sent, 3)} in a round{beside}.{time}']


def _sent(group: Group, *others: Group, field: str) -> tuple[str, float]:
  """Returns which count of bytes all groups have, and that of the first."""
  for kind in (f'wire_{field}', field):
    found = [g.values(kind) for g in (group, *others)]
    if all(values and min(values) > 0 for values in found):
      return kind, statistics.mean(found[0])
  return '', 0


def _all(kind: str) -> str:
  if kind.startswith('wire'):
    return 'All devices together send'
  return "By the paper's count, all workers together fetch and return"


def _beside(group: Group, base: Group) -> str:
  """Says what a group costs and reaches, beside a baseline."""
  name, other = _name(group), _name(base)
  if len({v for g in (group, base) for v in g.values('rounds')}) != 1:
    return _begin(f'{name} and {other} have not trained for the same rounds.')
  costs = _costs(group, base)
  found = [_begin(f'{name} {" and ".join(costs)}.')] if costs else []
  ours, theirs = (
    [100 * v for v in g.values('test_accuracy')] for g in (group, base)
  )
  verdict = compare(ours, theirs)
  if verdict.verdict != 'untested':
    found.append(_begin(_ranked(name, other, verdict)))
  return ' '.join(found)


def _costs(group: Group, base: Group) -> list[str]:
  """Returns what a group sent, and how long it took on equal devices."""
  costs = []
  kind, sent = _sent(group, base, field='bytes_total')
  if sent:
    share = _share(sent / statistics.mean(base.values(kind)))
    count = '' if kind.startswith('wire') else " (the paper's count)"
    costs.append(f'sent {share} the bytes{count} of {_name(base)}')
  ours, theirs = (g.values('seconds_training') for g in (group, base))
  same = all(
    group.summary.get(name) and group.summary[name] == base.summary.get(name)
    for name in ('device', 'num_devices')
  )
  if ours and theirs and min(theirs) > 0 and same:
    share = statistics.median(ours) / statistics.median(theirs)
    whole = 'its seconds' if costs else f'the seconds of {_name(base)}'
    costs.append(f'took {_share(share)} {whole}')
  return costs


def _ranked(name: str, other: str, found: Comparison) -> str:
  gap = abs(found.points)
  gap = f'{gap:.{1 if gap >= 1 else 2}f} points'
  side = 'above' if found.points > 0 else 'below'
  if found.verdict == 'level':
    return f'{name} and {other} are level in accuracy: {found.why}.'
  if found.verdict == 'undecided':
    ends = f'{name} ends {gap} {side} {other}'
    return f'{ends}, which does not rank them: {found.why}.'
  better = 'better' if found.verdict == 'ahead' else 'worse'
  return f'{name} is {better} than {other} by {gap}, {found.why}.'


def _other_settings(groups: Sequence[Group]) -> str:
  """Names the settings that differ and are not of the protocol."""
  names = sorted(set().union(*(group.config for group in groups)))
  differ = [
    name
    for name in names
    if name not in _OF_PROTOCOL
    and any(g.config.get(name) != groups[0].config.get(name) for g in groups)
  ]
  more = ', …' if differ[4:] else ''
  return ', '.join(differ[:4]) + more


def _seeds(groups: Sequence[Group]) -> list[str]:
  """Says what so few seeds cannot say."""
  fewest = min((len(_tests(g)) for g in groups if _tests(g)), default=SEEDS)
  if fewest >= SEEDS:
    return []
  if fewest > 1:
    return [f'{fewest} seeds are too few to rank runs; {SEEDS} would do.']
  return [
    'This is one seed: another one gives another accuracy, so a difference '
    f'of about {POINTS:g} point, or of a few {_examples(groups[0])} of the '
    'test, means nothing between two such runs. Give the '
    f'runs of {SEEDS} seeds or more, and this page shows their mean and spread.'
  ]


def _share(share: float) -> str:
  return f'{_percent(share)} of' if share < 1.5 else f'{share:.3g} times'


def _percent(share: float) -> str:
  digits = 0 if share >= 0.1 else -math.floor(math.log10(share)) - 1
  return f'{share:.{digits}%}'


def _seconds(values: Sequence[float]) -> str:
  median = statistics.median(values)
  return f'{median:,.{0 if median >= 100 else 1}f} seconds'
