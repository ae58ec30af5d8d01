"""A run from a config: build, restore, loop over rounds, evaluate, save."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
import ml_collections

from resist_jax import folders, report
from resist_jax.errors import ConfigError, NonFiniteError
from resist_jax.rounds import assemble, averaged
from resist_jax.run import (
  metrics,
  phases,
  processes,
  same_data,
  same_program,
  speed,
  stopping,
)
from resist_jax.run import workdir as workdir_lib
from resist_jax.run.callbacks import Began, Callback, Callbacks, Function
from resist_jax.run.checkpoint import Checkpoints, Restored
from resist_jax.run.checks import validate
from resist_jax.run.config import for_processes
from resist_jax.run.interrupt import Interrupt
from resist_jax.run.lock import locked
from resist_jax.run.loop import Loop
from resist_jax.run.setup import Setup, describe_data, naming, prepare
from resist_jax.run.summary import summarise
from resist_jax.run.task import Dataset
from resist_jax.run.tensorboard import TensorBoard
from resist_jax.run.weights_and_biases import WeightsAndBiases


def train(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  dataset: Dataset | None = None,
  callbacks: Sequence[Function | Callback] = (),
) -> dict[str, Any]:
  """Trains a network from its newest checkpoint, or from scratch, to the end.

  Args:
    config: As made by `config.get_config`.
    workdir: Folder of the run; the same config in it goes on where it stopped.
    dataset: What to train on, such as `data.from_arrays` makes; None for the
      one that the config names. A run goes on with the same images only.
    callbacks: Called once a round, in every process, with the round's row of
      `metrics.jsonl` and the state after it. The next round reuses the memory
      of that state: copy what you keep. See `callbacks.Callback`.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: If the user made a mistake, before anything is written.
    ValueError: If an argument has a wrong type.
    NonFiniteError: If training diverges; the message says how to go on.
    WorkdirLostError: If the workdir is deleted or moved meanwhile.
    Interrupted: On SIGTERM or SIGINT, after a checkpoint.
  """
  started = time.perf_counter()
  _check_types(config, dataset)
  folder = folders.resolve(workdir, 'workdir')
  config = for_processes(config, jax.process_count())
  validate(config)
  config = naming(config, dataset)
  workdir_lib.check(folder, config.to_dict())
  # Process 0 writes what is not on the devices; all write checkpoints.
  first = jax.process_index() == 0
  called = Callbacks(callbacks, _own(config) if first else ())
  setup = prepare(config, dataset)
  _ = setup.schedule  # If it fails, nothing is written yet.
  stopping.judged_by(setup)
  if jax.process_count() > 1:
    described = describe_data(setup.dataset)
    # Each host may keep its files elsewhere.
    records = {**setup.described, workdir_lib.OWN_FILES: None}
    described |= {'records': records}
    processes.agree(described, 'give each host the same data.')
  with locked(folder) if first else contextlib.nullcontext():
    if first:  # While data were read, another run may have begun and ended.
      workdir_lib.check(folder, config.to_dict())
    _check_shared(folder)
    return _train_in(folder, setup, called, started)


def _check_types(config: Any, dataset: Any) -> None:
  """Raises a ValueError if an argument is another thing."""
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'config is a {type(config).__name__}: begin with '
      "resist_jax.run.config.get_config(), or cards.load('digits')."
    )
  if not isinstance(dataset, Dataset | None):
    raise ValueError(
      f'dataset is a {type(dataset).__name__}: make it by from_source, '
      'from_arrays or from_tables of resist_jax.data.'
    )


def _train_in(
  folder: pathlib.Path, setup: Setup, callbacks: Callbacks, started: float
) -> dict[str, Any]:
  """Trains in a workdir that no other run uses; see `train`."""
  with contextlib.ExitStack() as after:
    loop = _rounds(folder, setup, callbacks, after, started)
    setup = loop.setup  # It has depths by speed.
    processes.doing('the export')
    state, scales = averaged(loop.state), phases.global_scales(setup)
    params = assemble(state).params
    setup.task.save(folder, state, params, scales, loop.test)
    progress = dataclasses.asdict(loop.progress)
    summary = summarise(setup, loop.phase, params, progress, int(state.draw))
    if jax.process_index() == 0:
      workdir_lib.write_json(folder / 'summary.json', summary)
      if setup.config.log.report:
        try:
          report.write_report([folder], folder)
        except ConfigError as error:  # The log of a complete run was lost.
          (folder / 'report.html').unlink(missing_ok=True)  # An older one.
          logging.warning('there is no report: %s', error)
    callbacks.finished(summary)
  return summary


def _rounds(
  folder: pathlib.Path,
  setup: Setup,
  callbacks: Callbacks,
  after: contextlib.ExitStack,
  started: float,
) -> Loop:
  """Trains all rounds; callbacks learn of the end when `after` closes."""
  config, writes = setup.config, jax.process_index() == 0
  _check_not_lost(folder)
  described = setup.described if writes else {}
  same_data.check(folder, described)
  checkpoints = Checkpoints(folder, setup.mesh, config.keep_checkpoints)
  with Interrupt() as interrupt:
    processes.doing('the start')
    restored = _restore(folder, checkpoints, setup)
    measured = restored.progress.get('depths_by_speed') if restored else None
    setup = speed.with_depths(setup, measured or ())
    done = restored.progress['round'] if restored else 0
    after.enter_context(
      callbacks.during(Began(config, setup.dataset, folder, done))
    )
    if writes and not restored:  # Without a config, the log counts as lost.
      _record(folder, config, described, done)
    with (
      metrics.MetricsLog(folder, done, config.num_rounds, setup.dataset.unit)
      if writes
      else contextlib.nullcontext(metrics.Log())
    ) as log:
      loop = None
      try:
        loop = Loop(  # It may refuse the checkpoint.
          setup, restored, started, checkpoints, log, callbacks, interrupt
        )
        log.check()
        if writes and restored:
          same_program.warn_of_changes(folder, config)
          _record(folder, config, described, done)
        loop.run()
      except ConfigError:
        begun = restored or (loop and loop.progress.round)
        if writes and not begun:  # What is mended may begin here.
          names = (workdir_lib.DATA, same_program.CODE, 'config.json')
          for name in names:  # The config last.
            (folder / name).unlink(missing_ok=True)
        raise
      except NonFiniteError as error:
        remedy = _remedy(config, folder, checkpoints.distrust())
        raise NonFiniteError(f'{error}. {remedy}') from error
      except OSError:
        log.check()  # If the workdir is gone, that is the reason.
        raise
      log.check()
  return loop


def _record(
  folder: pathlib.Path,
  config: ml_collections.ConfigDict,
  described: dict[str, Any],
  done: int,
) -> None:
  """Writes what a run trains, on which data, and by which code."""
  workdir_lib.write_json(folder / 'config.json', config.to_dict())
  same_data.write(folder, described)
  same_program.note(folder, config)
  if done < config.num_rounds:  # It would be that of another end.
    (folder / 'summary.json').unlink(missing_ok=True)


def _check_not_lost(folder: pathlib.Path) -> None:
  """Refuses to begin anew where a checkpoint has been whole."""
  if workdir_lib.saved_rounds(folder / 'checkpoints'):
    return
  # Lists of files are written when a checkpoint is whole, and not beside it.
  listed = any((folder / 'digests').glob('[0-9]*.json'))
  rows = report.read_rows(folder / 'metrics.jsonl')
  if rows and (listed or (folder / 'summary.json').exists()):
    raise ConfigError(
      f'{folder / "metrics.jsonl"} has {rows[-1]["round"]} rounds, but there '
      f'is no checkpoint: bring the folder {folder / "checkpoints"} back, or '
      'choose another workdir.'
    )


def _own(config: ml_collections.ConfigDict) -> list[Callback]:
  """Returns the callbacks that the config of a run asks for."""
  own: list[Callback] = []
  if config.log.tensorboard:
    own.append(TensorBoard())
  if config.log.wandb_project:
    own.append(WeightsAndBiases(config.log.wandb_project))
  return own


def _check_shared(folder: pathlib.Path) -> None:
  """Checks that all processes have the same workdir, by a file in it."""
  if not processes.are_several():  # Or a program of a person's own met them.
    return
  first = jax.process_index() == 0
  token = processes.told_by_first(workdir_lib.mark(folder) if first else '')
  # Orbax requires the same path in all processes.
  path = str(folder.absolute())
  seen = {'path': path, 'run_id': workdir_lib.await_mark(folder, token)}
  processes.agree(
    {'workdir': seen},
    'give all processes the same folder, on a file system that they share.',
  )


def _remedy(
  config: ml_collections.ConfigDict, folder: pathlib.Path, good: int | None
) -> str:
  """Says how to go on after a divergence, from a known good round if any."""
  if good is None:
    return (
      f'Lower lr (now {config.lr}) or raise optimizer.warmup_rounds, and '
      'choose another workdir; the last good checkpoint of this one is kept.'
    )
  return (
    f'What was saved later is moved to {folder / "set_aside"}; the same '
    f'command goes on from round {good}, the last one whose test was finite. '
    f'If it ends here again, lower lr (now {config.lr}) in another workdir.'
  )


def _best_so_far(
  folder: pathlib.Path,
  config: ml_collections.ConfigDict,
  progress: Mapping[str, Any],
  by: str,
) -> dict[str, Any]:
  """Returns the best test so far, by the log where another rule decided."""
  best, gain = progress.get('best', {}), config.early_stopping.min_gain
  # Checkpoints of earlier versions do not say what counted as a gain.
  if best.get('by') != by or best.get('min_gain', gain) != gain:
    rows = report.each_row(folder / 'metrics.jsonl')
    # Round 0 is a test of the untrained network, which nothing judges.
    done = (row for row in rows if 0 < row['round'] <= progress['round'])
    best = stopping.replayed(done, by, gain)
  saved = workdir_lib.saved_rounds(folder / 'checkpoints')
  if config.keep_best and best and best['round'] not in saved:
    logging.warning(
      'by %s, round %d is the best so far; it has no checkpoint any more',
      by,
      best['round'],
    )
  return best


def _restore(
  folder: pathlib.Path, checkpoints: Checkpoints, setup: Setup
) -> Restored | None:
  """Returns the newest checkpoint, or None before the first round."""
  try:
    restored = checkpoints.restore()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if restored is None:
    return None
  config, progress = setup.config, restored.progress
  done = progress['round']
  if done > config.num_rounds:
    raise ConfigError(
      f'num_rounds is {config.num_rounds}, but this workdir has trained '
      f'{done} rounds already: raise num_rounds or choose another workdir.'
    )
  best = _best_so_far(folder, config, progress, stopping.judged_by(setup))
  if done == config.num_rounds or stopping.reason(config, best):
    settings = progress.get('settings', {})
    workdir_lib.check_ended(folder, config.to_dict(), settings)
  logging.info('going on after round %d', done)
  return restored._replace(progress={**progress, 'best': best})
