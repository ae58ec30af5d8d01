"""Where the processes of a run meet: given by flags, or by what started them.

A launcher starts one process on each host, or one for each device, and tells
each how many there are and where process 0 is: by flags of ours, by the
variables of torchrun, or in the ways that JAX knows.
"""

from collections.abc import Mapping
import os
import re
import warnings

from resist_jax.errors import ConfigError, printable
from resist_jax.run import meeting
from resist_jax.run.meeting import Place

_WAIT = 30  # Seconds that a cluster may take to answer.


def find_place(
  coordinator: str | None, count: int | None, me: int | None
) -> Place | None:
  """Returns where the processes of a run meet.

  Args:
    coordinator: `HOST:PORT` of process 0. If None, torchrun says it, or JAX
      asks SLURM, Open MPI, the TPU pod, or Kubernetes if its package is
      installed.
    count: Number of processes, if known.
    me: Number of this process, if known.

  Returns:
    The place; None if this process is alone, as outside of all clusters.

  Raises:
    ConfigError: If torchrun was started in a way that leaves no port, or a
      Kubernetes job does not say where its pods are, or devices of this host
      are named wrongly.
    MeetingError: If a cluster does not say where its processes are.
  """
  if count == 1:
    return None
  if coordinator is not None and count is not None and me is not None:
    return Place(coordinator, count, me, _named_devices(os.environ))
  if 'TORCHELASTIC_RUN_ID' in os.environ:
    return of_torchrun(os.environ)
  from jax._src import clusters  # What `jax.distributed.initialize` asks.

  try:
    with warnings.catch_warnings():
      # JAX warns about each cluster environment that it fails to query.
      warnings.simplefilter('ignore')
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, count, me, None, None, _WAIT
      )
  except Exception as error:  # Each cluster raises its own.
    raise meeting.MeetingError(
      f'the cluster does not say where the processes of this run are '
      f'({printable(str(error))}): set --coordinator, --num_processes '
      'and --process_id, or --num_processes=1 for a run of one process.'
    ) from error
  coordinator, count, me, devices = found
  if coordinator is None or count is None or me is None:
    _check_pod(os.environ)
    _check_mpi(os.environ)
    return None
  own = tuple(devices) if devices else None  # What the cluster gives.
  return Place(coordinator, count, me, _named_devices(os.environ) or own)


def _named_devices(variables: Mapping[str, str]) -> tuple[int, ...] | None:
  """Returns the devices of this host that a variable names; None for all.

  JAX reads it too, where nobody names devices, and takes no mistake in it well.
  """
  named = variables.get('JAX_LOCAL_DEVICE_IDS', '')
  if named and not re.fullmatch(r'\s*\d+\s*(,\s*\d+\s*)*', named):
    raise ConfigError(
      f'JAX_LOCAL_DEVICE_IDS is {named!r}: name devices as in 0,1,2,3.'
    )
  return tuple(map(int, named.split(','))) if named else None


def _check_pod(variables: Mapping[str, str]) -> None:
  """Refuses to train alone in one of several pods.

  JAX asks Kubernetes for the other pods only if that package is installed.
  """
  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= set(variables):
    raise ConfigError(
      'this is a pod of an indexed Kubernetes job, and nothing says where its '
      'other pods are: set --coordinator, --num_processes and --process_id as '
      'experiments/launch/jobset.yaml does, or --num_processes=1 for a run of '
      "one pod, or install JAX's package: pip install 'jax[k8s]'."
    )


def _check_mpi(variables: Mapping[str, str]) -> None:
  """Refuses to train alone in one of several processes of Open MPI.

  JAX knows Open MPI by a variable that its version 5 does not set.
  """
  ranks = variables.get('OMPI_COMM_WORLD_SIZE', '1')
  if ranks.isdigit() and int(ranks) > 1:
    raise ConfigError(
      f'this is one of {ranks} processes of Open MPI, and JAX does not find '
      'the others, as under Open MPI 5: set --coordinator, --num_processes and '
      '--process_id=$OMPI_COMM_WORLD_RANK, or --num_processes=1 for a run of '
      'one process.'
    )


def of_torchrun(variables: Mapping[str, str]) -> Place | None:
  """Returns where torchrun lets the processes meet.

  Args:
    variables: The environment that torchrun gives to a process.

  Returns:
    The place, with one device of the host for each of its processes; None if
    this process is alone.

  Raises:
    ConfigError: If torchrun keeps the port to itself.

  >>> of_torchrun({'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '0',
  ...              'LOCAL_WORLD_SIZE': '1', 'MASTER_ADDR': 'a',
  ...              'MASTER_PORT': '7'})
  Place(coordinator='a:7', count=2, me=1, local_devices=None)
  """
  count = int(variables['WORLD_SIZE'])
  if count == 1:
    return None
  if variables.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
    raise ConfigError(
      'torchrun keeps the port of MASTER_PORT to itself: set '
      'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or start it by '
      'python -m experiments.launch.elastic.'
    )
  address, port = variables['MASTER_ADDR'], variables['MASTER_PORT']
  # The processes of one host share its devices.
  shared = int(variables['LOCAL_WORLD_SIZE']) > 1
  mine = (int(variables['LOCAL_RANK']),) if shared else None
  mine = mine or _named_devices(variables)
  return Place(f'{address}:{port}', count, int(variables['RANK']), mine)
