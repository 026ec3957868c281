"""Ctrl-C as a request: the first is answered between two steps, the second is not held back.

``signal.raise_signal`` sends to this very thread and returns when it was delivered; ``os.kill``
may hand the signal to another thread of the process, and then it comes some time later.
"""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from layer_tying.runs.interrupt import stop_requests

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _python_answers_ctrl_c():
    """A shell starts a background job with SIGINT ignored, and then Python leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_is_a_request(number):
    before = handlers()
    with stop_requests() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
    assert handlers() == before


def test_the_second_is_not_held_back():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop_requested:
        signal.raise_signal(signal.SIGINT)
        assert stop_requested()
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_what_was_there_comes_back_after_an_error():
    before = handlers()
    with pytest.raises(ZeroDivisionError), stop_requests():
        _ = 1 / 0
    assert handlers() == before


def test_another_thread_has_no_signals_to_wait_for():
    def run() -> bool:
        with stop_requests() as stop_requested:
            return stop_requested()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run).result() is False
