"""``python -m s2d_compiler`` is ``s2d``."""

import sys

from s2d_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
