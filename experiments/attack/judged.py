"""What came of an attack, and the record of all cases of a kind."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import pathlib
import re
import signal
import types
from typing import Any, NamedTuple

from experiments.runs import provenance
from resist_jax.errors import ConfigError, NonFiniteError, WorkdirLostError

SAME = 'went on, same result'
REFUSED = 'refused in one line'
# Text without a digest, such as a number in a row of the log.
AS_WRITTEN = 'went on, shows the damaged text'
WARNED = 'went on, same parameters, a warning names the lost rows'
WRONG, HANG, TRACEBACK, SEVERAL = 'wrong', 'hang', 'traceback', 'several lines'
BAD = (WRONG, HANG, TRACEBACK, SEVERAL)
# Errors that `python -m resist_jax` prints in one line.
IN_ONE_LINE = (ConfigError, NonFiniteError, WorkdirLostError, OSError)


class Hang(BaseException):
  """A call took longer than its limit."""


class Case(NamedTuple):
  """An attack.

  Attributes:
    group: What was attacked.
    what: How.
    outcome: One of the constants of this module.
    said: The line that the program printed, or what it did instead.
  """

  group: str
  what: str
  outcome: str
  said: str = ''


class Answer(NamedTuple):
  """What a call returned or raised.

  Attributes:
    value: What it returned.
    outcome: Empty if it returned; otherwise that of its error.
    said: The error.
  """

  value: Any = None
  outcome: str = ''
  said: str = ''


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
  """Raises `Hang` in the main thread after some seconds.

  Args:
    seconds: The limit.

  Yields:
    Nothing.
  """

  def stop(signum: int, frame: types.FrameType | None) -> None:
    del signum, frame
    raise Hang(f'no answer within {seconds:g} seconds')

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def answer(
  call: Callable[[], Any],
  seconds: float,
  clear: tuple[type[Exception], ...] = IN_ONE_LINE,
) -> Answer:
  """Calls a function, and judges what it raises.

  Args:
    call: The function.
    seconds: After which it hangs.
    clear: Errors whose message a person can act on.

  Returns:
    Its value, or the outcome of its error.
  """
  try:
    with limited(seconds):
      return Answer(call())
  except Hang as error:
    return Answer(None, HANG, str(error))
  except UnicodeError as error:  # A ValueError that names no remedy.
    return Answer(None, TRACEBACK, f'{type(error).__name__}: {error}')
  except clear as error:
    lines = str(error).strip().splitlines()
    said = ' '.join(str(error).split())
    return Answer(None, REFUSED if len(lines) == 1 else SEVERAL, said)
  except Exception as error:
    return Answer(None, TRACEBACK, f'{type(error).__name__}: {error}')


def refusal(
  code: int | None, out: str, err: str, says: str = '', wanted: int = 2
) -> tuple[str, str]:
  """Judges a process that has to refuse its input.

  Args:
    code: Its exit code; None if it hangs.
    out: What it printed on stdout.
    err: What it printed on stderr.
    says: A pattern that its line must match.
    wanted: The right exit code.

  Returns:
    `(outcome, said)`.
  """
  lines = [line for line in err.splitlines() if line.strip()]
  said = lines[-1] if lines else f'nothing, exit code {code}'
  if code is None:
    return HANG, said
  if 'Traceback' in err:
    return TRACEBACK, said
  if len(lines) != 1 or out.strip():
    return SEVERAL, ' / '.join([*lines, *out.strip().splitlines()])
  if code != wanted or not re.match('error: .*' + says, said):
    return WRONG, f'exit code {code}: {said}'
  return REFUSED, said


def worst(found: Iterable[tuple[str, str]]) -> tuple[str, str]:
  """Returns the worst of some outcomes, with what was said."""
  found = list(found)
  return max(found, key=lambda pair: pair[0] in BAD)


def record(
  kind: str,
  config: Mapping[str, Any],
  seed: int,
  cases: Sequence[Case],
  folder: pathlib.Path,
  not_tried: Sequence[str],
  listed: bool = True,
) -> dict[str, Any]:
  """Returns what is kept of all attacks of a kind.

  Args:
    kind: Its name.
    config: What the attacked runs were started with, and limits in seconds.
    seed: Seed of the attacks.
    cases: The attacks.
    folder: Where they took place; nothing kept names it.
    not_tried: What no attack tried.
    listed: Whether to keep all cases, rather than the bad ones only.

  Returns:
    JSON values.
  """
  groups = {case.group: Counter[str]() for case in cases}
  for case in cases:
    groups[case.group][case.outcome] += 1

  def line(case: Case) -> str:
    what, said = (_without_places(x, folder) for x in (case.what, case.said))
    return f'{case.group} | {what} | {case.outcome} | {said}'

  return {
    'provenance': provenance('1 x cpu'),
    'command': f'python -m experiments.attack --only={kind} --seed={seed}',
    'config': dict(config),
    'seed': seed,
    'count': len(cases),
    'outcomes': dict(Counter(case.outcome for case in cases).most_common()),
    'by_group': {name: dict(found) for name, found in groups.items()},
    'not_tried': list(not_tried),
    'cases': [line(c) for c in cases if listed or c.outcome in BAD],
  }


def _without_places(text: str, folder: pathlib.Path) -> str:
  """Returns a line without the folders and ports of this machine."""
  root = pathlib.Path(__file__).parents[2]
  for path, name in ((folder, 'TMP'), (root, '.'), (pathlib.Path.home(), '~')):
    text = text.replace(str(path), name)
  return re.sub(r'127\.0\.0\.1:\d+', '127.0.0.1:PORT', text)[:300]
