"""`python -m genco` is `genco`."""

import sys

from genco.cli import main

if __name__ == "__main__":
    sys.exit(main())
