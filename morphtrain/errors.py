"""The one exception that means: the user can fix this, and the message says how."""


class UserError(ValueError):
    """A wrong option, range, file or combination; shown as its message alone, without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
