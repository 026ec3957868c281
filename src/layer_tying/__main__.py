"""``python -m layer_tying`` is the command ``layer-tying``."""

import sys

from layer_tying.cli import main

if __name__ == "__main__":
    sys.exit(main())
