"""One exception per cause of failure, each with an exit code and what to do about it."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class StackError(Exception):
    """A failure with a known cause; `str()` says what was found, what was needed, what to do."""

    exit_code = 1

    def __init__(self, found: str, needed: str, action: str) -> None:
        self.found, self.needed, self.action = found, needed, action
        super().__init__(f"{found}\n  needed: {needed}\n  to do:  {action}")


class SettingInvalid(StackError):
    """A setting has a value that is not allowed."""

    exit_code = 2


class SnapshotMissing(StackError):
    """The model is not on the volume, or not completely."""

    exit_code = 3


class HubUnreachable(StackError):
    """The hub does not answer, or not as a hub does."""

    exit_code = 4


class ModelNotFound(StackError):
    """The hub answers but does not have this model or revision for us."""

    exit_code = 5


class DownloadFailed(StackError):
    """The download ended without a good snapshot."""

    exit_code = 6


class DiskFull(StackError):
    """There is not enough room."""

    exit_code = 7


class PortTaken(StackError):
    """Another process listens on the endpoint's port."""

    exit_code = 8


class EngineMissing(StackError):
    """No usable Docker engine."""

    exit_code = 9


class HostUnfit(StackError):
    """The host lacks something the chosen variant or runtime needs."""

    exit_code = 10


class BuildFailed(StackError):
    """An image or a virtual environment could not be built."""

    exit_code = 11


class ServeFailed(StackError):
    """The server ended, or did not become ready in time."""

    exit_code = 12


class RehearsalFailed(StackError):
    """The rehearsal model did not learn what it must know."""

    exit_code = 13


class DriverMissing(StackError):
    """No NVIDIA driver, or no GPU, where the variant needs one."""

    exit_code = 14


class DriverTooOld(StackError):
    """The NVIDIA driver cannot run the variant's CUDA."""

    exit_code = 15


class GpuUnsupported(StackError):
    """The GPUs are too few, or lack the kernels of the variant or the number type."""

    exit_code = 16


class GpuMemoryShort(StackError):
    """The GPU has too little free memory for the weights or for the share asked for."""

    exit_code = 17


class RevisionNotFound(StackError):
    """The hub has the model, and not this revision of it."""

    exit_code = 18


class AccessDenied(StackError):
    """The hub does not let us have the model."""

    exit_code = 19


class VolumeUnwritable(StackError):
    """The models volume cannot be written to."""

    exit_code = 20


class PinMismatch(StackError):
    """What the hub has is not what the pinned manifest says."""

    exit_code = 21


class PublishRefused(StackError):
    """What would be published is not fit for it, or a tag that never moves names something else."""

    exit_code = 22


class PushFailed(StackError):
    """A registry does not answer, does not let us in, or did not take an image."""

    exit_code = 23


class Terminated(BaseException):
    """SIGTERM has arrived; raised in the main thread where a job has asked for it."""


def end_on_sigterm() -> None:
    """Make SIGTERM end this process in good order, also as PID 1, which the kernel shields."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def run(main: Callable[[], int], end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """End the process with the exit code of `main`, or of the StackError it raises.

    `end` is os._exit for a job whose threads may hang in a call that nobody waits for any more.
    """
    try:
        code = main()
    except StackError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except (KeyboardInterrupt, Terminated) as error:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
    sys.stdout.flush()
    end(code)
