"""What stops a command, as one line that names the cause and the fix, and as its exit code."""

import errno
import os
import re
from pathlib import Path

_FIXES: dict[int | None, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or "),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow access or "),
}


def explain(error: BaseException, command: str, out: Path | None) -> tuple[int, str] | None:
    """Exit code and message of an error; None for one that needs its traceback.

    Args:
        error: what stopped the command.
        command: ``train`` or another subcommand of ``kpig``.
        out: the file or folder that it writes.
    """
    trains = command == "train"
    again = "the same command goes on where it stopped" if trains else "run the command again"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"stopped; {again}"
    if isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return 2, str(error)
    failure = _of_file(error)
    if failure is None:
        return None
    if failure.errno is None:
        # It says all by itself: why a file could not be written or, in transformers, that there is no such model.
        cause = error.__cause__ and _of_file(error.__cause__)
        return 1 if cause and cause.errno else 2, str(error)
    fix = f"{_FIXES.get(failure.errno, '')}choose another {'output_dir' if trains else '--out'}"
    return 1, f"{failure.strerror}: {failure.filename or out or 'a file'}; {fix}; {again}"


def _of_file(error: BaseException) -> OSError | None:
    """The error as that of a file; None where it is about something else."""
    if isinstance(error, OSError):
        return error
    # safetensors and torch have errors of their own for a file that could not be written.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if re.search("inline_container.*unexpected pos|PytorchStreamWriter", str(error)):
        return OSError(errno.ENOSPC, "a checkpoint could not be written to its end")
    return None
