"""The one exception that means: the user can fix this, and the message says how."""


class UserError(ValueError):
    """A wrong option, range, file or combination; shown as its message alone, without a traceback."""


class Incompatible(UserError):
    """Options that exclude one another, each of which is right by itself (`morphtrain.schema.compatibility`)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def said(error: BaseException) -> str:
    """What an error says, and of what kind it is where that tells more."""
    plain = isinstance(error, (TypeError, ValueError, ImportError, RuntimeError))
    text = first_line(error)
    return text if plain or text == type(error).__name__ else f"{type(error).__name__}: {text}"
