"""Waiting for what a test is about, without sleeping for a fixed time."""
import time


def wait_for(what, predicate, seconds=60, interval=0.005):
    """Returns the first true value of predicate(); fails saying `what` (a text, or a function that makes one) after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(interval)
