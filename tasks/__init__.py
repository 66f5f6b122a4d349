"""Everything that deploy.py does, one module per line of it."""

import atexit
import logging
import sys


def _leave_quietly() -> None:
    """End the logs before the interpreter does.

    Python 3.10 lets go of log handlers when gevent's threads are gone already, and would print a
    traceback about that after every run over SSH.
    """
    logging.shutdown()
    logging._handlerList.clear()  # type: ignore[attr-defined]


if sys.version_info < (3, 11):
    atexit.register(_leave_quietly)
