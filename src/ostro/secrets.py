"""Credentials in text: what is printed or saved holds `REDACTED` in their place.

They are known by where they stand (in a URL before the host or in its query, behind a name such as
`api_key`), by their form, and by the environment variables that hold them.
"""

import os
import re
from typing import Any

REDACTED = "REDACTED"
_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|secret|credential|signature|(?:api|private|access)[_-]?key"
    r"|(?:access|auth|api|hf|session|security|refresh|bearer)[_-]?token)[\w-]*"
)
_SECRET_NAME = re.compile(rf"{_NAME}|token", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"\w*(?:TOKEN|API_KEY|SECRET|ACCESS_KEY|PASSWORD|PASSWD)")
_NO_REFERENCE = r"(?![^\s@&'\"]*\$\{)"  # ${NAME} only says where the secret is
_RULES = [
    # scheme://user:password@host; a password may hold a slash, but host:80/ is none
    (rf"(\w://){_NO_REFERENCE}[^\s/:@?#'\"]*:(?!\d+/)(?:[^\s/'\"]+|[^\s@'\"]+)@",
     rf"\1{REDACTED}@"),
    (rf"(\bhttps?://){_NO_REFERENCE}[^\s/@?#'\"]+@", rf"\1{REDACTED}@"),  # a token for a user
    (rf"([?&;](?:{_NAME}|token|key|sig)=){_NO_REFERENCE}[^\s&;#'\"]+", rf"\1{REDACTED}"),
    (rf"((?<![\w-]){_NAME}['\"]?\s*[=:]\s*['\"]?)(?!null\b|None\b){_NO_REFERENCE}"
     r"[^\s,;&'\"})\]]+", rf"\1{REDACTED}"),
    (r"(\bBearer\s+)[\w.~+/=-]{8,}", rf"\1{REDACTED}"),
    (r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|A[KS]IA[0-9A-Z]{16})", REDACTED),
]  # fmt: skip
_COMPILED = [(re.compile(pattern, re.IGNORECASE), new) for pattern, new in _RULES]
_REFERENCE = re.compile(r"\$\{(\w+)\}")


def redact(text: str) -> str:
    """The text without what looks like a credential."""
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_VARIABLE.fullmatch(name):
            text = text.replace(value, REDACTED)
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """Plain values without credentials; all text under the name of a secret counts as one."""
    if isinstance(value, dict):
        return {key: redacted(child, str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [redacted(child, name) for child in value]
    if not isinstance(value, str) or not value:
        return value
    is_secret = _SECRET_NAME.fullmatch(name) and not _REFERENCE.search(value)
    return REDACTED if is_secret else redact(value)


def with_secrets(url: str) -> str:
    """The URL with its `${NAME}`s filled in from the environment, for the one who opens it.

    `ValueError` where there is no such variable, or the URL comes from what was saved without its
    credential.
    """
    if "://" not in url:
        return url
    if REDACTED in url:
        raise ValueError("its credential was left out when it was saved; give the URL again")
    for name in _REFERENCE.findall(url):
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
    return _REFERENCE.sub(lambda match: os.environ[match[1]], url)
