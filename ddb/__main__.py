"""`python -m ddb` is the command line."""

import sys

from ddb.cli import main

if __name__ == "__main__":
    sys.exit(main())
