"""One command, one file."""

import os

# transformers advises to install PyTorch, which is missed in tests alone.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
