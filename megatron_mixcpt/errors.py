"""Errors a user can act on. The command line prints the message alone and exits with `exit_code`."""


class MixcptError(Exception):
    """What was wrong, where (file, line or key), and what to do about it."""

    exit_code = 1


class ConfigError(MixcptError):
    """A wrong key or value in a configuration file or on the command line."""

    exit_code = 2


class VerificationError(MixcptError):
    """Data or a checkpoint does not match its manifest."""

    exit_code = 3


class BadRecordsError(MixcptError):
    """More input records were bad than the budget allows."""

    exit_code = 4


class StoppedError(MixcptError):
    """Stopped on request; running the same command again resumes (EX_TEMPFAIL)."""

    exit_code = 75


class LostRankError(MixcptError):
    """Another rank ended. It has its own message; this one says only how the loss was noticed."""
