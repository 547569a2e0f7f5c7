"""The entry of the command: Ctrl-C must not show a traceback while torch is being imported."""

import sys


def main() -> int:
    """Run the command line; returns its exit code."""
    try:
        from llama_adapter.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
