"""A strict JAX that compiles fast, for every test and all that tests start."""

import gc
from importlib import metadata
import mmap
import os
import pathlib
import tempfile

import jaxlib

# Tests run each program a few times: compile it fast rather than well. These
# flags halve the time that the CPU compiler takes.
FAST_COMPILER = (
  '--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE',
  '--xla_cpu_parallel_codegen_split_count=1',
  '--xla_cpu_use_fusion_emitters=false',
)
# On a busy machine a virtual device may come late to a collective; after 40
# seconds XLA would abort the process.
PATIENT = ('--xla_cpu_collective_call_terminate_timeout_seconds=600',)


def known(xla_flags):
  """Returns the flags that this XLA has: another one would abort JAX."""
  found = set()
  for path in pathlib.Path(jaxlib.__file__).parent.glob('*.so'):
    with (
      path.open('rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
      for flag in xla_flags:
        name = flag.removeprefix('--').partition('=')[0]
        # As a whole word: a flag that is gone lives on in longer ones.
        if library.find(f'\0{name}\0'.encode()) >= 0:
          found.add(flag)
  return [flag for flag in xla_flags if flag in found]


# Environment variables, not `jax.config.update`: the command line, notebooks
# and other processes of a test get them too, and find what has been compiled.
if 'PYTEST_XDIST_WORKER' not in os.environ:  # A worker inherits them.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('XLA_FLAGS', ' '.join(known(FAST_COMPILER + PATIENT)))
  if os.environ['JAX_PLATFORMS'] == 'cpu':  # Else the test is of a device.
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
  os.environ['JAX_NUMPY_DTYPE_PROMOTION'] = 'strict'
  # All tests of a session compile a large program once.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE.name
  # What newer ones load may hang on CPUs, see `rounds.loads_may_hang`.
  if tuple(map(int, metadata.version('jax').split('.')[:2])) >= (0, 11):
    os.environ.setdefault('JAX_ENABLE_COMPILATION_CACHE', 'false')
  # Those that compile sooner take as long to be read.
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'
  # Programs that differ in the names of scopes alone must not share an entry,
  # and programs that differ in the line of the caller alone must share one.
  os.environ['JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY'] = '1'
  os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'

import jax
import pytest

# Processes choose their own number of virtual devices.
jax.config.update('jax_num_cpu_devices', 4)


def pytest_collection_finish():
  """Spares the collector what stays: a twentieth of the time went there.

  JAX keeps all that it traced until caches are dropped, and each collection
  walked it, and all modules, again.
  """
  gc.freeze()
  gc.set_threshold(10_000, 20, 50)


@pytest.fixture(autouse=True, scope='module')
def _drop_compiled_programs():
  yield
  jax.clear_caches()
