"""Errors that are not kvarena's own: bad input, and bugs of a policy."""


class UsageError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class PolicyError(RuntimeError):
    """A policy's own bug. The message is one line: which policy, where in its file, what it did."""


class LockedError(UsageError):
    """Another process is writing the same cell; the command line exits with code 75."""
