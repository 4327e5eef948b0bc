"""The error that a person caused and can mend."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what is wrong and what would be right.

    The command line prints it as one line, ``error: ...``, without a traceback, and exits with 1. It is a `ValueError`,
    so library users catch it as they always have.
    """
