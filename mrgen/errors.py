"""The exceptions that are no bugs: what a user can mend, and a run that was told to end."""

__all__ = ["Preempted", "UserError"]


class UserError(Exception):
    """Input that the user can mend: says what was found, what was expected and what to do.

    The entry points print its message alone and end with exit code 1. Anything else that escapes is a bug of ours.
    """


class Preempted(SystemExit):
    """A run was told by a signal to end, and is to be started again.

    Nobody who handles failures handles it: it ends the process, whatever jobs would come next, with exit code 143.

    Args:
        reason: for the run's status.
    """

    preempted = True  # for whoever may not import this module

    def __init__(self, reason: str):
        super().__init__(143)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
