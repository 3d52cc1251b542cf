"""Score a trained run: python eval.py --checkpoint runs/a [--method random:keep=0.25] [flags]."""

import sys

from focus_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
