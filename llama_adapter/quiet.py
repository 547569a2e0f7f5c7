"""Without what other packages say of themselves while they are imported or load something."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Let no message below an error and no warning through, in any thread.

    Packages look for libraries of other GPUs when they are imported, and warn of deprecations of
    their own: nothing that a user of this one could do anything about.
    """
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
