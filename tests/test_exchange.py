"""The exchange on a mesh is `take(aggregate(...), next_slots)`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import tiny

from resist_jax import decomposition, exchange
from resist_jax import state as state_lib

ON_WORKERS = PartitionSpec(exchange.WORKER)


def on_mesh(function, num_devices):
  mesh = state_lib.make_mesh(num_devices)
  return jax.jit(
    jax.shard_map(
      function, mesh=mesh, in_specs=ON_WORKERS, out_specs=ON_WORKERS
    )
  )


@pytest.mark.parametrize('min_depth', [0, 3])
@pytest.mark.parametrize(
  ('S', 'D'), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4)]
)
def test_masked_psum_aggregates_and_deals_again(S, D, min_depth):
  L = 9
  slots, next_slots = (tiny.deal(r, L, S, min_depth) for r in (0, 1))
  rng = np.random.default_rng(0)
  shape = (*slots.shape, 2, 3)
  chain = {'w': jnp.array(rng.normal(size=shape), jnp.float32)}
  run = on_mesh(partial(exchange.masked_psum, num_blocks=L), D)
  got = run(chain, slots, next_slots)

  old = {'w': jnp.full((L, 2, 3), np.nan)}
  whole = decomposition.aggregate(chain, slots, old)
  for s in range(S):
    want = decomposition.take(whole, next_slots[s])
    np.testing.assert_allclose(got['w'][s], want['w'], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(('S', 'D'), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_the_mean_over_workers_reaches_all_of_them(S, D):
  x = np.random.default_rng(0).normal(size=(S, 5)).astype(np.float32)
  run = on_mesh(partial(exchange.mean_over_workers, num_workers=S), D)
  got = np.asarray(run(jnp.array(x)))
  np.testing.assert_allclose(got, np.tile(x.mean(0), (S, 1)), rtol=1e-6)
  assert (got == got[0]).all()
