"""The one exception that reaches a user as a sentence and not as a traceback."""


class UserError(Exception):
    """Input that the user can mend: says what was found, what was expected and what to do.

    The entry points print its message alone and end with exit code 1. Anything else that escapes is a bug of ours.
    """
