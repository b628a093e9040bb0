"""A broken promise of a policy in one line: what was seen, what is wanted, and where to look."""

import inspect
import os
import traceback

from kvarena.policies.base import Policy


class ContractError(Exception):
    """What was seen, what is wanted, and the method of the policy to look at."""

    def __init__(self, seen: str, wanted: str, member: str = "score") -> None:
        super().__init__(seen)
        self.seen, self.wanted, self.member = seen, wanted, member


def told(error: Exception, kind: type) -> str:
    """The line for a ContractError, or for whatever the code of the policy class ``kind`` raised.

    Of an exception with causes, the one is told that went through the policy's own file; notes
    of the outermost one follow it.
    """
    if isinstance(error, ContractError):
        return f"{error.seen}; wanted: {error.wanted}; look at {place_of(kind, error.member)}"
    own_files = {inspect.getfile(parent) for parent in _own_classes(kind)}
    culprit, place = error, place_of(kind, "score")
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        for frame in traceback.extract_tb(cause.__traceback__):
            if frame.filename in own_files:
                culprit, place = cause, f"{shortened(frame.filename)}:{frame.lineno}"
        cause = cause.__cause__ or cause.__context__
    notes = getattr(error, "__notes__", [])
    message = " ".join([f"{type(culprit).__name__}: {culprit}", *notes]).split()
    wanted = "no exception"
    if "NoneType" in str(culprit):
        wanted += " (attention and its like are None unless `needs` asks for them)"
    return f"{' '.join(message)}; wanted: {wanted}; look at {place}"


def place_of(kind: type, member: str) -> str:
    """File and line of a method or property, or of the class if it does not define it."""
    for parent in _own_classes(kind):
        found = vars(parent).get(member)
        code = getattr(getattr(found, "fget", found), "__code__", None)
        if code is not None:
            return f"{shortened(code.co_filename)}:{code.co_firstlineno}"
    return f"{shortened(inspect.getfile(kind))}:{inspect.getsourcelines(kind)[1]}"


def shortened(path: str) -> str:
    """Relative to the working directory, if the path is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _own_classes(kind: type) -> list[type]:
    """The class and its parents below Policy."""
    return list(kind.__mro__[: -len(Policy.__mro__)])
