"""The error that a person caused and can mend, and words for its message."""


class UserError(ValueError):
    """An input is wrong. The message says what is wrong and what would be right.

    The command line prints it as one line, ``error: ...``, without a traceback, and exits with 1. It is a `ValueError`,
    so library users can catch it as such.
    """


def kind_of(thing: object) -> str:
    """Its class with an article: ``a Linear``, ``an Attention``."""
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
