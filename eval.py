"""Score a checkpoint: python eval.py --checkpoint DIR [--method M] [--benchmark B --data DIR]."""

import sys

from focus_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
