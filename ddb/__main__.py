"""`python -m ddb` is the command line."""

import sys


def main() -> int:
    """Run the command line, and return the exit code. Its modules are imported here: that takes a while, too, in which one
    may think better of it (Ctrl-C)."""
    try:
        from ddb import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
