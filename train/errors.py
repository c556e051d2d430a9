"""What can end a step or a run besides the user's mistakes, which are ValueErrors."""

import errno
import re

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST = re.compile(r"connection (closed|reset) by peer|timed out waiting|socket timeout|broken pipe", re.IGNORECASE)


class NonFiniteError(ArithmeticError):
    """A loss, gradient, score or sampling probability that is NaN or infinite."""


class TrainingStopped(RuntimeError):
    """The run ended itself, for the reason given; nothing that was saved is lost."""


def reason_to_stop(error: BaseException, processes: int) -> str | None:
    """Why a run of so many processes ended, where the reason is known: it stopped itself, there is no room on the disk,
    or another of its processes is gone or hangs. None for anything else, of which the traceback must be seen."""
    if isinstance(error, TrainingStopped | NonFiniteError):
        return str(error)
    resume = "what was saved is whole, and --resume auto goes on from the newest checkpoint"
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or "(os error 28)" in str(error):
        return f"no room on the disk: {error}. Make some; {resume}"
    if processes > 1 and isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return (
            "another process of this run ended, or did not answer within parallel.timeout_s: look for the first error "
            f"among the processes' output (no error: it was killed, perhaps for memory); {resume}. This one saw: "
            f"{str(error).splitlines()[0]}"
        )
    return None
