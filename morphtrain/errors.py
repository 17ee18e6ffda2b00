"""The one exception that means: the user can fix this, and the message says how."""


class UserError(ValueError):
    """A wrong option, range, file or combination; shown as its message alone, without a traceback."""
