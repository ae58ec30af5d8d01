"""Compiles a program, and reads what memory it takes on a device.

libtpu's `memory_analysis` says more than a program reserves. In small programs,
exactly the holes in the heap count twice: where 5 tuples of 512 bytes lie at
multiples of 16 KiB, the heap has 80 KiB, and libtpu says 157.5. The compiler's
list of allocations has the size of the heap, and how much lies on the chip.
"""

import pathlib
import re
import tempfile
from typing import Any

from experiments.compile.targets import Target
from resist_jax import accounting

# A line of the list: bytes, and the kind of memory, none for HBM.
_HEAP = re.compile(
  r'^allocation \d+: size (\d+)(?:, color (\d+))?, preallocated-temp', re.M
)
_MEMORIES = {'': 'temporary', '1': 'on_chip'}


def compile_for(
  target: Target, lowered: Any, by_library: bool = False
) -> tuple[Any, dict[str, int]]:
  """Compiles a program.

  Args:
    target: What to compile it for.
    lowered: The program, as `jax.jit(...).lower` returns it.
    by_library: See `Target.options`.

  Returns:
    `(executable, memory)`: bytes as `accounting.memory_parts` sorts them, and
    for a TPU how much of the memory `on_chip` is used besides.
  """
  options = target.options(by_library)
  if target.platform != 'tpu':
    executable = lowered.compile(compiler_options=options)
    return executable, accounting.memory_parts(executable.memory_analysis())
  with tempfile.TemporaryDirectory() as folder:
    options |= {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
    executable = lowered.compile(compiler_options=options)
    pattern = '*.after_optimizations-buffer-assignment.txt'
    (path,) = pathlib.Path(folder).glob(pattern)
    found = heaps(path.read_text())
  parts = accounting.memory_parts(executable.memory_analysis())
  peak = parts['peak'] - parts['temporary'] + found['temporary']
  return executable, {**parts, **found, 'peak': peak}


def heaps(text: str) -> dict[str, int]:
  """Reads what a program for TPUs reserves.

  Args:
    text: The compiler's list of allocations.

  Returns:
    Bytes: `temporary` in HBM, and `on_chip`.

  >>> heaps('''allocation 0: size 4096, parameter 0, shape |f32[1024]|:
  ... allocation 1: size 81920, preallocated-temp:
  ...  value: <3 fusion @0> (size=512,offset=0): f32[128]
  ... allocation 2: size 512, color 1, preallocated-temp:''')
  {'temporary': 81920, 'on_chip': 512}
  """
  found = dict.fromkeys(_MEMORIES.values(), 0)
  for size, memory in _HEAP.findall(text):
    if memory in _MEMORIES:
      found[_MEMORIES[memory]] += int(size)
  return found
