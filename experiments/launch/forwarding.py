"""Signals that a launcher passes on to the processes that it has started."""

from collections.abc import Sequence
import signal
import subprocess


def forward(processes: Sequence[subprocess.Popen]) -> None:
  """Passes signals that end a run on, from now on.

  Args:
    processes: They get them; more may be added later.
  """

  def handle(signum, frame):
    del frame
    # A closed terminal ends the run with a checkpoint, as SIGTERM does.
    sent = signal.SIGTERM if signum == signal.SIGHUP else signum
    for process in processes:
      process.send_signal(sent)

  for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(signum) != signal.SIG_IGN:  # As `nohup` asks.
      signal.signal(signum, handle)
