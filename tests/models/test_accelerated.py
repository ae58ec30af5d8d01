"""Forms of layers for accelerators compute what the plain forms do."""

from covering import rest_is_slow
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tiny

from resist_jax import models
from resist_jax.models import layers

CHANNELS = 5


def images(dtype, constant=False):
  rng = np.random.default_rng(0)
  x = rng.normal(1, 2, (4, 3, 3, CHANNELS))
  if constant:
    x[..., 0] = 0.5
  return jnp.asarray(x, dtype)


def norm_of(dtype, saves_traffic):
  """Returns a function of scale, bias and input, and values for these."""
  norm = layers.BatchNorm(dtype=dtype, saves_traffic=saves_traffic)

  def apply(scale, bias, x):
    params = {'scale': scale, 'bias': bias}
    return norm.apply({'params': params}, x, relu=True)

  wide = layers.widen(jnp.zeros((), dtype)).dtype
  scale = jnp.linspace(0.5, 2, CHANNELS, dtype=wide)
  return apply, scale, scale[::-1] - 1


def values_and_gradients(apply, *args):
  y, pull = jax.vjp(apply, *args)
  rng = np.random.default_rng(1)
  return y, pull(jnp.asarray(rng.normal(size=y.shape), y.dtype))


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [('float64', 1e-12), ('bfloat16', 2e-2)]
)
def test_norm_and_relu_equal_the_plain_form(dtype, tolerance):
  with jax.enable_x64(dtype == 'float64'):
    ours, theirs = (
      values_and_gradients(*norm_of(jnp.dtype(dtype), saves), images(dtype))
      for saves in (True, False)
    )
    # A bfloat16 gradient of the input is rounded once here, and there too.
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
      assert a.dtype == b.dtype
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
  ('parts', 'common'),
  [(1, True), (2, True), (2, False)],
  ids=['whole', 'parts', 'parts, each with its own scale and bias'],
)
def test_the_gradient_is_that_of_the_plain_form_by_autodiff(parts, common):
  """In float64, over parts of a batch, and for a channel that is constant."""

  def gradient(norm, parts=1):
    def loss(params, x, weights):
      if parts > 1 and not common:
        params = lax.pcast(params, 'data', to='varying')
      y = norm.apply({'params': params}, x, relu=True)
      total = (y * weights).sum()
      return lax.psum(total, 'data') if parts > 1 else total

    if parts > 1:
      mesh = jax.make_mesh((parts,), ('data',), (jax.sharding.AxisType.Auto,))
      specs = P(), P('data'), P('data')
      loss = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    weights = np.random.default_rng(1).normal(size=x.shape)
    return jax.jit(jax.grad(loss, (0, 1)))(params, x, jnp.asarray(weights))

  with jax.enable_x64(True):
    x = images('float64', constant=True)
    scale = jnp.linspace(0.5, 2, CHANNELS, dtype='float64')
    params = {'scale': scale, 'bias': scale[::-1] - 1}
    norm = layers.BatchNorm(dtype=jnp.dtype('float64'))
    want = gradient(norm)
    axis_name = 'data' if parts > 1 else None
    ours = norm.clone(saves_traffic=True, axis_name=axis_name)
    found = gradient(ours, parts)
  for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_channel_without_variance_has_a_finite_gradient():
  _, gradients = values_and_gradients(
    *norm_of(jnp.float32, True), images('float32', constant=True)
  )
  assert all(np.isfinite(g).all() for g in gradients)
  # What all inputs share is taken away again: it has no gradient.
  assert np.abs(gradients[2].sum((0, 1, 2))).max() < 1e-2


def test_the_backward_pass_keeps_the_input_alone_as_narrow_as_it_came():
  x = images('bfloat16')
  apply, *args = norm_of(jnp.bfloat16, True)
  _, pull = jax.vjp(apply, *args, x)
  large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
  assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_kernels_are_cast_and_their_gradients_are_the_same():
  rng = np.random.default_rng(0)
  params = {
    'conv': jnp.asarray(rng.normal(size=(2, 3, 3, 4, 5)), jnp.float32),
    'scale': jnp.ones(4),
  }

  def loss(cast, params):
    cast = cast(params)
    assert cast['scale'].dtype == jnp.float32
    assert cast['conv'].dtype == jnp.bfloat16
    return jnp.square(cast['conv'].astype(jnp.float32)).sum()

  def plain(params):
    return {**params, 'conv': params['conv'].astype(jnp.bfloat16)}

  found = [
    jax.grad(lambda p, cast=cast: loss(cast, p))(params)
    for cast in (lambda p: models.computed_kernels(p, jnp.bfloat16), plain)
  ]
  jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu', None])
def test_every_platform_has_its_own_forms(platform):
  net = tiny.network(1, platform=platform)
  images = jnp.zeros((2, 4, 4, 1))
  text = str(jax.make_jaxpr(net.apply)({'params': tiny.init(net)}, images))
  here = platform or jax.default_backend()
  assert ('norm_relu' in text) == (here == 'gpu')


@pytest.mark.parametrize('pre_activation', rest_is_slow([True, False], [True]))
def test_a_network_for_accelerators_has_the_same_gradient(pre_activation):
  found = []
  for platform in ('cpu', 'gpu', 'tpu'):
    net = tiny.network(2, platform=platform, pre_activation=pre_activation)
    params = tiny.init(net)
    present = {tiny.CHAIN: jnp.ones(2)}
    found.append(
      tiny.gradient(tiny.make_loss(net), params, present, np.arange(6))
    )
  for other in found[1:]:
    for a, b in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
