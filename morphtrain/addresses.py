"""Addresses of servers and databases as they may be shown and written down: without passwords."""

from __future__ import annotations

import re

from morphtrain.errors import UserError

# A password may hold an unescaped / or @, so it ends at the last @ of its word.
USER_INFO = re.compile(r"(://[^/@:\s]*):[^\s'\"]*@")
SECRET = "pass|pwd|token|secret|key|credential|signature|auth"
NAMES_A_FILE = "sslkey|sslpassfile|passfile"
OPTION = re.compile(rf"([?&;](?!(?:{NAMES_A_FILE})=)[\w.-]*(?:{SECRET})[\w.-]*=)[^&;\s'\"]*", re.IGNORECASE)


class PasswordShown(UserError):
    """A password where the files of a run would show it."""


def check_no_password(key: str, address: str, instead: str) -> None:
    """Raise `PasswordShown` for an address that holds a password; `instead` says where one may be given."""
    if shown(address) != address:
        wanted = "must be an address without a password, since every file of a run would show it"
        raise PasswordShown(f"{key}={shown(address)}: {wanted}; {instead}")


def shown(text: str) -> str:
    """A text with the passwords of its addresses replaced by ***."""
    return OPTION.sub(r"\1***", USER_INFO.sub(r"\1:***@", text))
