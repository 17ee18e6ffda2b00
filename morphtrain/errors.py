"""The one exception that means: the user can fix this, and the message says how."""


class UserError(ValueError):
    """A wrong option, range, file or combination; shown as its message alone, without a traceback."""


def first_line(error: Exception) -> str:
    """What an error says, in one line: the first of its message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
