"""Command line: python -m resist_jax.evaluate RUN [--data=NAME] [--out=DIR]."""

import sys

if __name__ == '__main__':
  from resist_jax.run.evaluate_command import main

  sys.exit(main())
