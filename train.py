"""Train: python train.py --config configs/glyphs_focus.py --workdir runs/a [flags]."""

import sys

from focus_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
