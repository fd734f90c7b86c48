"""How a command ends at a signal, and how the processes of one command end together."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MAIN = "CLIPWARD_MAIN"  # the process that launched this one to work beside it
TORCH_LOG = "TORCH_CPP_LOG_LEVEL"  # of the processes that it launches: a lost connection is a warning of forty lines
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 10.0  # seconds that a process has to end in after a signal
GRACE = 3.0  # seconds that a process has to end in after the main process is gone


class Stopped(BaseException):
    """A signal asked this process to end. It is no error, and nothing but the command line catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.timer: threading.Timer | None = None  # that ends the process, where it doesn't end by itself

    @property
    def status(self) -> int:
        """The exit status, as a shell has it."""
        return 128 + self.number


class StopSignals:
    """Raises :class:`Stopped` at SIGTERM and SIGINT, wherever the process is.

    That is safe in what can be killed at any time. A second signal ends the process at once.

    Args:
        patience: seconds after which the process ends, whatever it does; None leaves it all the time.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self._before: dict[int, Any] = {}
        self._stopped: Stopped | None = None

    def install(self) -> None:
        """Take the place of the handlers that there are, but where a signal is ignored. Others may replace it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN and handler != self._stop:
                self._before.setdefault(number, handler)
                signal.signal(number, self._stop)

    def restore(self) -> None:
        """Put back the handlers that were there first."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check(self) -> None:
        """Raise what was asked for, should Python have swallowed it, as it does in a finaliser."""
        if self._stopped is not None:
            raise self._stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopped is not None:
            os._exit(self._stopped.status)
        self._stopped = Stopped(number)
        if self.patience is not None:
            self._stopped.timer = threading.Timer(self.patience, os._exit, (self._stopped.status,))
            self._stopped.timer.daemon = True
            self._stopped.timer.start()
        raise self._stopped


def is_launched() -> bool:
    """Whether the main process of this command has launched this one; torchrun and SLURM see to their own."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and MAIN in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def end_with_main() -> None:
    """End this process soon after the main process that has launched it, however that ended."""
    if not is_launched():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[MAIN] = str(os.getpid())
            os.environ.setdefault(TORCH_LOG, "ERROR")
        return
    threading.Thread(target=_watch, args=(int(os.environ[MAIN]),), daemon=True, name="clipward-watch").start()


def _watch(main: int) -> None:
    while os.getppid() == main:
        time.sleep(0.5)
    time.sleep(GRACE)
    sys.stderr.flush()
    os._exit(1)


def wait_for_main() -> bool:
    """Wait until the main process is gone, which would take an end before its own for a failure.

    Returns:
        whether this process was launched by one that is gone.
    """
    if not is_launched():
        return False
    patient_until = time.monotonic() + PATIENCE
    while os.getppid() == int(os.environ[MAIN]) and time.monotonic() < patient_until:
        time.sleep(0.1)
    return os.getppid() != int(os.environ[MAIN])


@contextmanager
def quiet_after_main(own: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """End without a word where a connection fails because the main process has ended, for that one has said why.

    Args:
        own: errors that this process says itself.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's are
        if not isinstance(error, own) and wait_for_main():
            sys.exit(1)
        raise
