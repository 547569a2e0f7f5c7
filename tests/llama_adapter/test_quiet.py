"""Nothing below an error is said inside, and everything again behind it."""

import logging
import warnings

import pytest

from llama_adapter.quiet import quiet


def test_warnings_are_held_back_inside_alone(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            logging.getLogger("of another package").warning("not told")
            logging.getLogger("of another package").error("an error")
            warnings.warn("not told either", stacklevel=1)
        logging.getLogger("of another package").warning("told")
        warnings.warn("told too", stacklevel=1)
    assert [record.message for record in caplog.records] == ["an error", "told"]
    assert [str(one.message) for one in caught] == ["told too"]


def test_what_was_disabled_before_stays_so() -> None:
    logging.disable(logging.ERROR)
    try:
        with pytest.raises(ZeroDivisionError), quiet():
            _ = 1 / 0
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
