"""The one exception that means 'the input is at fault': the CLI prints its line and exits with 2."""


class UserError(ValueError):
    """Bad input, said in one line: where it is, what is wrong, what to do about it."""


class LeakError(UserError):
    """The same prompt or rubric stands in more than one split."""
