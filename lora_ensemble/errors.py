"""The exception for what a user can put right, and the one for a user who has seen enough."""


class UserError(Exception):
    """A mistake in the user's input, told in one line: where, what was found, what was expected, what to do.

    The command lines print it after ``error:`` and leave with exit code 2; from Python it is an ordinary exception.
    """


class Interrupted(BaseException):
    """A signal told training to end, and it has ended. Like ``KeyboardInterrupt``, it is for nobody but the program.

    ``number``: the signal's; the exit code is 128 more, as a shell has it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
