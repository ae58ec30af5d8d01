"""What is called once a round: functions of its row and its state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import inspect
import pathlib
from typing import Any, NamedTuple

import ml_collections

from resist_jax.rounds import State
from resist_jax.run.task import Dataset

# Takes the row of a round, as `metrics.jsonl` has it, and the state after it.
Function = Callable[[Mapping[str, Any], State], None]


class Began(NamedTuple):
  """A run that begins or goes on.

  Attributes:
    config: Its config.
    dataset: What it trains on, and what it is tested on.
    workdir: Its folder.
    round: Rounds that are done.
  """

  config: ml_collections.ConfigDict
  dataset: Dataset
  workdir: pathlib.Path
  round: int


class Callback:
  """A callback that also learns when a run begins and ends.

  Attributes:
    reads_state: Whether it reads the state of a round. If any callback does,
      the next round begins after the calls. If none does, all get None for the
      state, and an accelerator runs the next round meanwhile.
  """

  reads_state = True

  def begin(self, run: Began) -> None:
    """Is called when a run begins; nothing has been called for it before.

    Args:
      run: The run.
    """

  def __call__(self, row: Mapping[str, Any], state: State | None) -> None:
    """Is called after a round.

    Args:
      row: The round's line of `metrics.jsonl`.
      state: What the workers hold after it.
    """
    raise NotImplementedError

  def end(self, summary: Mapping[str, Any] | None) -> None:
    """Is called when the run ends: once for each `begin`.

    Args:
      summary: What `summary.json` holds; None if the run was stopped.
    """


class Callbacks:
  """The callbacks of one run."""

  def __init__(
    self,
    callbacks: Sequence[Function | Callback],
    own: Sequence[Callback] = (),
  ):
    """Keeps them.

    Args:
      callbacks: In the order in which they are called.
      own: Those of the run itself, which are called before.

    Raises:
      ValueError: If one cannot be called.
    """
    if not isinstance(callbacks, Sequence):
      raise ValueError(
        f'callbacks is {callbacks!r}; it must be a list of functions.'
      )
    for callback in callbacks:
      if not callable(callback) or isinstance(callback, type):
        raise ValueError(
          f'callbacks hold {callback!r}, which is no function of a row and a '
          'state: give functions, or objects of a class with __call__.'
        )
      _check_arguments(callback)
    self._callbacks = (*own, *callbacks)
    self._summary: Mapping[str, Any] | None = None

  @property
  def reads_state(self) -> bool:
    """Whether any of them reads the state of a round."""
    return any(getattr(c, 'reads_state', True) for c in self._callbacks)

  def __call__(self, row: Mapping[str, Any], state: State) -> None:
    """Calls them for a round.

    Args:
      row: See `Callback`; each gets a copy of its own.
      state: See `Callback`.
    """
    for callback in self._callbacks:
      given: Any = state if self.reads_state else None
      callback(dict(row), given)

  @contextlib.contextmanager
  def during(self, run: Began) -> Iterator[None]:
    """Tells those that want to know when a run begins and ends.

    Args:
      run: The run.
    """
    with contextlib.ExitStack() as stack:
      for callback in self._callbacks:
        if isinstance(callback, Callback):
          callback.begin(run)
          stack.callback(self._end, callback)
      yield

  def _end(self, callback: Callback) -> None:
    callback.end(self._summary)

  def finished(self, summary: Mapping[str, Any]) -> None:
    """Keeps the summary for when the run ends.

    Args:
      summary: What `summary.json` holds.
    """
    self._summary = summary


def _check_arguments(callback: Any) -> None:
  """Raises a ValueError if it does not take a row and a state."""
  try:
    inspect.signature(callback).bind({}, None)
  except TypeError as error:
    raise ValueError(
      f'callbacks hold {callback!r}, which does not take a row and a state '
      f'({error}): give it two arguments.'
    ) from error
  except ValueError:  # A function in C may not list its arguments.
    return


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
  """Returns the values that are numbers; a truth value is none.

  Args:
    values: JSON values by name, such as those of a row.
  """
  return {
    name: value
    for name, value in values.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }
