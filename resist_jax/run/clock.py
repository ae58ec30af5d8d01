"""A stopwatch for the seconds that count as training."""

import time


class Clock:
  """Adds up the seconds between calls of `start` and `stop`."""

  def __init__(self, seconds: float):
    """Starts from a sum of seconds, such as that of a resumed run."""
    self._seconds = seconds
    self._since: float | None = None

  @property
  def stands(self) -> bool:
    """Whether the clock is not running."""
    return self._since is None

  def start(self) -> None:
    """Starts the clock if it is not running."""
    self._since = self._since or time.perf_counter()

  def stop(self) -> None:
    """Stops the clock."""
    self._seconds, self._since = self.seconds(), None

  def seconds(self) -> float:
    """Returns the seconds so far, including those since the last `start`."""
    if self._since is None:
      return self._seconds
    return self._seconds + time.perf_counter() - self._since
