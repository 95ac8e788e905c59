"""The base of every error that its user can mend."""


class InfDiTError(ValueError):
    """What was asked for cannot be done; the message says what was expected and what it got.

    Any other exception is a bug of this package.
    """
