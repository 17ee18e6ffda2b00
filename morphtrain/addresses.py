"""Addresses of servers and databases as they may be shown and written down: without passwords."""

from __future__ import annotations

import re

from morphtrain.errors import UserError

# A password may hold an unescaped / or @, so it ends at the last @ of its word.
USER_INFO = re.compile(r"(://[^/@:\s]*):[^\s'\"]*@")
SECRET = r"pass(?:word|wd|phrase)?|pwd|token|secret|key|credential|signature|sig|auth"
OPTION = re.compile(rf"([?&;][\w.-]*(?:{SECRET})[\w.-]*=)[^&;\s'\"]*", re.IGNORECASE)


class PasswordShown(UserError):
    """A password where the files of a run would show it."""


def shown(text: str) -> str:
    """A text with the passwords of its addresses replaced by ***."""
    return OPTION.sub(r"\1***", USER_INFO.sub(r"\1:***@", text))
