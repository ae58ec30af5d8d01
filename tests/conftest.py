"""Four virtual devices and a strict JAX, for every test."""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# On a busy machine a virtual device may come late to a collective; after 40
# seconds XLA would abort the process, a notebook's kernel for one.
os.environ.setdefault(
  'XLA_FLAGS', '--xla_cpu_collective_call_terminate_timeout_seconds=600'
)
# Many runs, also those of subprocesses and of other test processes, compile the
# same programs: keep them for this session.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  CACHE = tempfile.TemporaryDirectory()
  os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 4)
# Tests run each program a few times: compile it fast rather than well.
jax.config.update('jax_disable_most_optimizations', True)
# Programs that differ in the names of scopes alone must not share an entry.
jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture(autouse=True, scope='module')
def _drop_compiled_programs():
  yield
  jax.clear_caches()
