"""The network family: sizes, forms of blocks, and three ways of batch norm."""

import math

from covering import checkerboard
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from resist_jax import accounting, models
from resist_jax.models import layers


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shapes(net, size=32):
  image = jnp.zeros((1, size, size, 3))
  return jax.eval_shape(net.init, jax.random.key(0), image)['params']


def test_the_papers_network_to_the_last_parameter():
  params = shapes(models.PreActResNet101(num_classes=100))
  sizes = accounting.measure(params, ['stage3_chain'])
  assert sizes.total == 41_396_900
  assert sizes.shared == 15_422_116
  assert sizes.block == {'stage3_chain': 1_180_672}
  assert sizes.num_blocks == {'stage3_chain': 22}


@pytest.mark.parametrize('name', models.FAMILY)
def test_every_family_member_builds(name):
  net = models.FAMILY[name](num_classes=7)
  params = shapes(net)
  for stage, size in enumerate(net.stage_sizes, start=1):
    assert f'stage{stage}_head' in params
    chain = params.get(models.chain_name(stage))
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(chain)}
    assert lengths == ({size - 1} if size > 1 else set())
  assert params['classifier']['kernel'].shape[1] == 7


@pytest.mark.parametrize('cut_heads', [False, True])
def test_counting_activations_leaks_nothing_of_the_traced_network(cut_heads):
  net = models.PreActResNetTiny(num_classes=4, cut_heads=cut_heads)
  with jax.checking_leaks():
    lengths = {'stage3_chain': 2}
    assert models.num_activations(net, (8, 8, 1), lengths, fused=True) > 0


def test_depths_are_those_of_the_paper():
  for name, blocks in (('101', 22), ('152', 35), ('200', 49)):
    net = models.FAMILY[f'PreActResNet{name}'](num_classes=10)
    assert net.stage_sizes[2] - 1 == blocks


def test_known_parameter_counts_of_bottlenecks():
  """The literature's ResNet-50 with 1000 classes has 25.56 M; ours lacks the
  norms that pre-activation without stem and final norm leaves out."""
  params = shapes(
    models.PreActBottleneckResNet50(num_classes=1000, stem='imagenet'), 64
  )
  assert abs(count(params) / 25.557e6 - 1) < 0.002


def test_sizes_may_be_lists():
  lists, tuples = (
    models.initial_params(
      models.ResNet(3, stage_sizes=kind([1, 2]), widths=kind([4, 4])),
      (4, 4, 1),
      seed=0,
    )
    for kind in (list, tuple)
  )
  jax.tree.map(np.testing.assert_array_equal, lists, tuples)


def test_stage_names_go_both_ways():
  assert models.stage_of(models.chain_name(3)) == 3


@pytest.mark.parametrize(
  ('norm', 'bottleneck', 'pre_activation'),
  checkerboard(['batch', 'group'], [True, False], [True, False]),
)
def test_a_scale_of_zero_turns_a_block_into_the_identity(
  pre_activation, bottleneck, norm
):
  """Also after the activation: its input is not negative there."""
  net = tiny.network(
    2, pre_activation=pre_activation, bottleneck=bottleneck, norm=norm
  )
  params = tiny.init(net)
  images, _ = tiny.examples()
  off = tiny.apply(net, params, images, {tiny.CHAIN: jnp.zeros(2)})
  without = net.with_chain_lengths({tiny.CHAIN: 0})
  short = {k: v for k, v in params.items() if k != tiny.CHAIN}
  want = tiny.apply(without, short, images)
  np.testing.assert_allclose(off, want, rtol=1e-5, atol=1e-6)
  on = tiny.apply(net, params, images)
  assert np.abs(on - want).max() > 1e-3


def test_a_loop_over_blocks_equals_blocks_in_a_row():
  net = tiny.network()
  params = tiny.init(net)
  images, _ = tiny.examples()
  row = tiny.apply(net, params, images)
  loop = tiny.apply(net.clone(platform='gpu'), params, images)
  np.testing.assert_allclose(row, loop, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_on_float32_parameters():
  net = tiny.network()
  params = tiny.init(net)
  images, _ = tiny.examples()
  low = net.clone(dtype='bfloat16')
  got = tiny.apply(low, params, images)
  assert got.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('float32')
  }
  want = tiny.apply(net, params, images)
  assert 0 < np.abs(got - want).max() < 0.2


def test_initial_weights_have_he_deviation():
  """He et al. (2015): deviation sqrt(2 / (9 * features)) of a 3x3 kernel."""
  conv = layers.Conv(64)
  kernel = conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 64)))['params']
  deviation = float(kernel['kernel'].std())
  assert abs(deviation / math.sqrt(2 / (9 * 64)) - 1) < 0.02


@pytest.mark.parametrize('initial', models.INITIAL)
def test_initial_values_have_the_statistics_of_their_kind(initial):
  """PyTorch's default: uniform, within +-1 / sqrt(inputs) of a number."""
  net = models.ResNet(10, (2, 2), widths=(32, 48), initial=initial)
  params = models.initial_params(net, (16, 16, 3), seed=0)
  for path, leaf in jax.tree.leaves_with_path(params):
    kind = path[-1].key
    values = np.asarray(leaf, np.float64)
    if kind != 'kernel':
      continue
    *size, inputs, outputs = values.shape[-4 if values.ndim > 2 else 0 :]
    taps = math.prod(size)
    deviation = math.sqrt(1 / (3 * taps * inputs))
    if initial == 'he':
      deviation = math.sqrt(2 / (taps * outputs))
      if path[0].key == 'classifier':  # LeCun's, as flax has it.
        deviation = math.sqrt(1 / inputs)
    spread = values.std() / deviation - 1
    assert abs(spread) < 5 / math.sqrt(values.size), path
    # A normal one has values past sqrt(3) deviations.
    limit = math.sqrt(3) * deviation * (1 + 1e-6)
    within = np.abs(values).max() <= limit
    assert within == (initial == 'torch'), path
  bias = params['classifier']['bias']
  assert (bias.std() > 0) == (initial == 'torch')
  assert np.abs(bias).max() <= 48**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize(('size', 'stride'), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_convolution_by_hand(size, stride):
  """Padding is (size - 1) // 2 on both sides, also where the stride is 2."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 6, 3)).astype(np.float32)
  conv = layers.Conv(4, size, stride)
  variables = conv.init(jax.random.key(0), jnp.array(x))
  kernel = np.asarray(variables['params']['kernel'])
  pad = (size - 1) // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  want = np.zeros((2, 6 // stride, 6 // stride, 4))
  for i in range(want.shape[1]):
    for j in range(want.shape[2]):
      top, left = i * stride, j * stride
      window = padded[:, top : top + size, left : left + size]
      want[:, i, j] = np.einsum('bhwc,hwcf->bf', window, kernel)
  got = conv.apply(variables, jnp.array(x))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def batch_norm(x, stats=None, mutable=False):
  norm = layers.BatchNorm()
  variables = {
    'params': {'scale': jnp.array([2.0, 0.5]), 'bias': jnp.array([1.0, -1.0])}
  }
  if stats is not None:
    variables['batch_stats'] = stats
  return norm.apply(variables, x, mutable=['batch_stats'] if mutable else False)


def test_batch_norm_by_hand_and_its_three_modes():
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, size=(5, 4, 4, 2)).astype(np.float32)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  want = (x - mean) / np.sqrt(var + 1e-5) * [2, 0.5] + [1, -1]
  y = batch_norm(jnp.array(x))
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)

  y, measured = batch_norm(jnp.array(x), mutable=True)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  stats = measured['batch_stats']
  np.testing.assert_allclose(stats['mean'], mean, rtol=1e-5)
  np.testing.assert_allclose(stats['mean_square'], var + mean**2, rtol=1e-5)

  fixed = {'mean': jnp.zeros(2), 'mean_square': jnp.full(2, 4.0)}
  y = batch_norm(jnp.array(x), fixed)
  want = x / np.sqrt(4 + 1e-5) * [2, 0.5] + [1, -1]
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_batch_norm_has_the_gradient_of_its_definition():
  """Against the same formula written with plain reductions."""
  rng = np.random.default_rng(0)
  x = jnp.array(rng.normal(1, 2, size=(6, 3, 3, 2)), jnp.float32)
  weight = jnp.array(rng.normal(size=x.shape), jnp.float32)

  def by_definition(x):
    mean = x.mean((0, 1, 2), keepdims=True)
    var = jnp.square(x - mean).mean((0, 1, 2), keepdims=True)
    y = (x - mean) / jnp.sqrt(var + 1e-5)
    scale = jnp.array([2.0, 0.5]).reshape(1, 1, 1, 2)
    return (weight * y * scale).sum()

  ours = jax.grad(lambda x: (weight * batch_norm(x)).sum())(x)
  want = jax.grad(by_definition)(x)
  np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('pre_activation', [True, False])
@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_rescaled_branches_undo_another_residual_scale(pre_activation, norm):
  net = tiny.network(3, pre_activation=pre_activation, norm=norm)
  params = tiny.init(net)
  images, _ = tiny.examples()
  quarter = {tiny.CHAIN: jnp.full(3, 0.25)}
  half = {tiny.CHAIN: jnp.full(3, 0.5)}
  want = net.apply({'params': params}, images, quarter)
  halved = models.rescale_branches(params, {tiny.CHAIN: 0.5}, net)
  got = net.apply({'params': halved}, images, half)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('field', ['norm', 'stem'])
def test_unknown_choices_say_what_is_known(field):
  net = tiny.network(**{field: 'nonsense'})
  with pytest.raises(ValueError, match=f'unknown {field}'):
    tiny.init(net)


@pytest.mark.parametrize('fields', [{}, {'pre_activation': False}])
def test_a_gate_multiplies_the_branch_of_its_block(fields):
  """Gates of the chain are scales; all of them can go into last layers."""
  sizes = {'num_classes': 3, 'stage_sizes': (1, 3), 'widths': (8, 8), **fields}
  gated, bare = models.ResNet(gate=0.5, **sizes), models.ResNet(**sizes)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), 'float32')
  params = models.initial_params(gated, (8, 8, 3), seed=0)
  np.testing.assert_array_equal(params['stage2_chain']['gate'], [0.5, 0.5])
  gates = np.array([0.2, -1.5], np.float32)
  params['stage2_chain']['gate'] = gates
  for head in ('stage1_head', 'stage2_head'):
    params[head]['gate'] = np.float32(1)
  got = gated.apply({'params': params}, x)
  plain = {
    name: {key: value for key, value in piece.items() if key != 'gate'}
    for name, piece in params.items()
  }
  want = bare.apply({'params': plain}, x, {'stage2_chain': jnp.asarray(gates)})
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  params['stage1_head']['gate'] = np.float32(0.3)
  got = gated.apply({'params': params}, x)
  want = bare.apply({'params': models.without_gates(params, gated)}, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
