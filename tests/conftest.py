"""Four virtual devices and a strict JAX, for every test."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 4)
# Tests run each program a few times: compile it fast rather than well.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture(autouse=True, scope='module')
def _drop_compiled_programs():
  yield
  jax.clear_caches()
