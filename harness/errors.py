"""The one exception that means "you asked for something impossible", not "kvarena has a bug"."""


class UsageError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class LockedError(UsageError):
    """Another process is writing the same cell; the command line exits with code 75."""
