"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake in the user's input, told in one line: where, what was found, what was expected, what to do.

    The command lines print it after ``error:`` and leave with exit code 2; from Python it is an ordinary exception.
    """
