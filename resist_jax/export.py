"""Command line: python -m resist_jax.export RUN --to=FORMAT [--out=PATH]."""

import sys

if __name__ == '__main__':
  from resist_jax.run.export_command import main

  sys.exit(main())
