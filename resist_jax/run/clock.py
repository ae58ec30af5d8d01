"""The time that counts as training."""

import time


class Clock:
  """Adds up the seconds between `start` and `stop`."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._since: float | None = None

  @property
  def stands(self) -> bool:
    """Whether it has not been started, or was stopped."""
    return self._since is None

  def start(self) -> None:
    """Runs, if it is not running already."""
    self._since = self._since or time.perf_counter()

  def stop(self) -> None:
    """Stands still."""
    self._seconds, self._since = self.seconds(), None

  def seconds(self) -> float:
    """Returns the sum so far."""
    if self._since is None:
      return self._seconds
    return self._seconds + time.perf_counter() - self._since
