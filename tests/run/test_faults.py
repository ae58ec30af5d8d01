"""A run reports processes that die, stop or run out of disk, and continues."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from several import FOREVER, ROOT, TIMEOUT, TINY, Several

from resist_jax import report
from resist_jax.run import export, program
from resist_jax.run.processes import TRY_AGAIN

pytestmark = pytest.mark.faults


def go_on(folder, rounds, kept, count=1):
  """Runs the same command again, for some rounds more.

  Of the rounds before, none up to `kept`, which has a checkpoint, is trained
  twice: it would have taken other seconds.
  """
  path = folder / 'metrics.jsonl'
  before = report.read_rows(path)
  done = len(before)
  with Several(
    folder, f'--config.num_rounds={done + rounds}', count=count
  ) as again:
    assert [again.wait(i) for i in range(count)] == [0] * count, again.output(0)
  rows = report.read_rows(path)
  assert [row['round'] for row in rows] == list(range(1, done + rounds + 1))
  assert rows[:kept] == before[:kept]
  export.load(folder)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_that_is_killed_is_named_and_the_run_goes_on(
  victim, tmp_path
):
  """Process 0 is the coordinator, through which the others communicate."""
  folder = tmp_path / 'run'
  with Several(folder, FOREVER) as run:
    run.wait_for_checkpoints(1)
    run.processes[victim].kill()
    other = 1 - victim
    assert run.wait(other) == TRY_AGAIN, run.output(other)
    (line,) = run.errors(other)
    assert f'process {other} stops because process {victim}' in line
    assert 'the same command goes on' in line
    done = run.rounds()
  # All rounds since the newest checkpoint are done again, and no others.
  newest = run.checkpoints()[-1]
  assert newest >= done - done % 5 - 5
  go_on(folder, 1, newest, count=2 - victim)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_that_stands_still_is_named_and_all_end(tmp_path, victim):
  other = 1 - victim
  with Several(tmp_path / 'run', FOREVER) as run:
    run.wait_for_rounds(7)
    run.processes[victim].send_signal(signal.SIGSTOP)
    assert run.wait(other) == TRY_AGAIN, run.output(other)
    (line,) = run.errors(other)
    assert f'process {victim} ' in line
    run.processes[victim].send_signal(signal.SIGCONT)
    assert run.wait(victim) == TRY_AGAIN, run.output(victim)
    (line,) = run.errors(victim)
    assert f'process {victim} stops because it was suspended' in line


@pytest.mark.parametrize('manifests', [True, False])
def test_a_run_whose_processes_are_killed_goes_on_from_a_checkpoint(
  manifests, tmp_path
):
  """Also if only the checkpoints were copied to another workdir."""
  folder = tmp_path / 'run'
  with Several(folder, FOREVER) as run:
    run.wait_for_checkpoints(2)
    for process in run.processes:
      process.kill()
  # The newest checkpoint is damaged as well: the one before it is whole.
  *_, kept, damaged = run.checkpoints()
  newest = folder / 'checkpoints' / str(damaged)
  victim = max(newest.rglob('*'), key=lambda p: p.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 0xFF
  if not manifests:
    shutil.rmtree(folder / 'digests')
    del content[len(content) // 2 :]  # Only a manifest shows a flipped bit.
  victim.write_bytes(content)
  go_on(folder, 1, kept, count=2)


def test_a_signal_to_one_process_stops_all_after_the_same_round(tmp_path):
  folder = tmp_path / 'run'
  with Several(folder, FOREVER) as run:
    run.wait_for_rounds(3)
    run.processes[1].send_signal(signal.SIGTERM)
    codes = [run.wait(0), run.wait(1)]
    assert codes == [128 + signal.SIGTERM] * 2, run.output(0) + run.output(1)
    said = {run.output(i).splitlines()[-1] for i in (0, 1)}
    assert len(said) == 1
    assert said.pop().startswith(f'stopped after round {run.rounds()} of')
  assert (folder / 'checkpoints' / str(run.rounds())).is_dir()


@pytest.fixture
def small_disk(tmp_path):
  """A file system with room for two or three checkpoints."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=500k', 'tmpfs', str(folder)]
  if not shutil.which('mount') or subprocess.run(mount, check=False).returncode:
    pytest.skip('a disk of a given size takes root')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_loses_no_checkpoint(
  small_disk, tmp_path
):
  folder = small_disk / 'run'
  with Several(tmp_path / 'out', FOREVER, f'--workdir={folder}') as run:
    codes = [run.wait(0), run.wait(1)]
    assert set(codes) <= {1, TRY_AGAIN}, run.output(0) + run.output(1)
    assert 1 in codes
    lines = run.errors(0) + run.errors(1)
    assert len(lines) == 2
    assert any('make room in' in line for line in lines)
  saved = [int(p.stem) for p in (folder / 'digests').glob('[0-9]*.json')]
  assert saved  # And it can be read:
  whole = tmp_path / 'run'
  shutil.copytree(folder, whole)
  go_on(whole, 1, max(saved))


def test_a_model_without_room_is_told_as_a_full_disk(small_disk):
  (small_disk / 'run').mkdir()
  arrays = {'x': np.random.default_rng(0).normal(size=200_000)}
  with pytest.raises(OSError, match='the model cannot be written') as told:
    export.write(small_disk / 'run', arrays, {})
  line, code = program.explain(told.value, 'runs/one')
  assert 'make room in runs/one' in line
  assert code == 1
  assert not (small_disk / 'run/model').exists()


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
extern int access(const char *, int); /* unistd.h's syscall is variadic. */
#define F_OK 0
/* The wall clock jumps back by a day while the file in JUMP exists. */
static long jump(void) {
  const char *path = getenv("JUMP");
  return path && access(path, F_OK) == 0 ? -86400 : 0;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME) t->tv_sec += jump();
  return code;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
/* The kernel's clock does not jump: it is told what it would have been told.
   A time since the epoch, not since the machine started, is the wall's. */
static struct timespec kernel(const struct timespec *until) {
  struct timespec then = *until;
  if (then.tv_sec > 1000000000) then.tv_sec -= jump();
  return then;
}
int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           const struct timespec *until) {
  static int (*real)(pthread_cond_t *, pthread_mutex_t *,
                     const struct timespec *);
  if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec then = kernel(until);
  return real(cond, mutex, &then);
}
long syscall(long number, long a, long b, long c, long d, long e, long f) {
  static long (*real)(long, ...);
  if (!real) real = dlsym(RTLD_NEXT, "syscall");
  if (number != SYS_futex || (b & FUTEX_CMD_MASK) != FUTEX_WAIT_BITSET || !d)
    return real(number, a, b, c, d, e, f);
  struct timespec then = kernel((const struct timespec *)d);
  return real(number, a, b, c, (long)&then, e, f);
}
"""


@pytest.mark.skipif(not shutil.which('gcc'), reason='needs a C compiler')
def test_a_clock_that_jumps_is_not_noticed(tmp_path):
  source, library = tmp_path / 'clock.c', tmp_path / 'clock.so'
  source.write_text(CLOCK)
  command = ['gcc', '-shared', '-fPIC', '-o', library, source, '-ldl']
  subprocess.run(command, check=True)
  jump = tmp_path / 'jump'
  env = {'LD_PRELOAD': str(library), 'JUMP': str(jump)}
  # No checkpoint meanwhile: a jump breaks JAX's barriers in it, and the run
  # has to be started again.
  rounds = '--config.checkpoint_every=1000000'
  with Several(tmp_path / 'run', FOREVER, rounds, env=env) as run:
    run.wait_for_rounds(3)
    jump.touch()
    began = time.monotonic()
    while time.monotonic() - began < 1.5 * TIMEOUT:
      run.wait_for_rounds(run.rounds() + 1)
    jump.unlink()
    run.wait_for_rounds(run.rounds() + 3)
    run.processes[0].send_signal(signal.SIGTERM)
    assert [run.wait(i) for i in (0, 1)] == [128 + signal.SIGTERM] * 2


BAD_WORKER = """
import sys
from absl import app
from resist_jax import __main__ as program
from resist_jax.run import classification

make_loss = classification.make_loss

def make_bad_loss(*args):
  good = make_loss(*args)
  def loss_fn(*args):
    loss, measured = good(*args)
    return loss * float('nan'), measured
  return loss_fn

if '--process_id=1' in sys.argv:
  classification.make_loss = make_bad_loss
app.run(program.main, flags_parser=program.parse)
"""


def test_a_worker_that_fails_in_its_process_is_excluded(tmp_path):
  script = tmp_path / 'bad_worker.py'
  script.write_text(BAD_WORKER)
  folder = tmp_path / 'run'
  prefix = ['env', 'PYTHONPATH=.', sys.executable, str(script)]
  with Several(folder, '--config.num_rounds=3', prefix=prefix) as run:
    assert [run.wait(0), run.wait(1)] == [0, 0], run.output(0)
  rows = report.read_rows(folder / 'metrics.jsonl')
  assert [row['left_out'] for row in rows] == [[1], [1], [1]]
  assert 'worker 1' in run.output(0)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--coordinator=here:1'], 'go together'),
    (['--num_processes=2', '--process_id=0', '--coordinator=x'], 'HOST:PORT'),
    (
      ['--num_processes=2', '--process_id=0', '--coordinator=x:0'],
      'HOST:PORT, with a port',
    ),
    (
      ['--num_processes=2', '--process_id=2', '--coordinator=x:1'],
      'it is 0 to 1',
    ),
  ],
)
def test_wrong_flags_of_processes_are_one_line_and_exit_code_2(
  flags, says, tmp_path
):
  command = [sys.executable, '-m', 'resist_jax', *TINY]
  result = subprocess.run(
    [*command, f'--workdir={tmp_path / "run"}', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert says in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()


def test_a_full_disk_of_tensorboard_does_not_hold_the_run_up(
  small_disk, tmp_path
):
  """Its writer ends with an error; nothing may wait for it."""
  (small_disk / 'filler').write_bytes(bytes(484 * 1024))
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'tensorboard').symlink_to(small_disk)
  words = f'--workdir={folder}', '--config.num_rounds=60'
  ran = subprocess.run(
    [sys.executable, '-m', 'resist_jax', *TINY, *words],
    cwd=ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr
  assert ran.stderr.count('the run goes on without it') == 1
  assert report.read_rows(folder / 'metrics.jsonl')[-1]['round'] == 60
