"""Environment variables in locations, and keeping credentials out of what is printed or saved.

A path or URL may say `${NAME}`. The configuration keeps it that way; whoever opens the path fills
it in with `with_secrets`, which remembers the value. `redact` then does three things to a text:

- values that were filled in become `${NAME}` again, wherever they stand, also in the text of
  other libraries' errors;
- of a URL only scheme, host, port and path are shown. No list of suspicious names could be
  complete, so all else is taken for a credential:
  `https://me:pw@host:80/x?v=1` becomes `https://REDACTED@host:80/x?REDACTED`;
- outside of URLs, credentials are known by the name before them (`api_key: ...`), by their form
  (`hf_...`), and by the environment variables that hold them.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote, quote_plus, unquote

Location = Annotated[str, "location"]
"""A config field with a path or URL in which `${NAME}` may stand."""

REDACTED = "REDACTED"
_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|secret(?!ar)|credential|signature|(?:api|private|access)[_-]?key"
    r"|(?:access|auth|api|hf|session|security|refresh|bearer)[_-]?token(?!i[sz]))[\w-]*"
)
_SECRET_NAME = re.compile(rf"{_NAME}|token", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"\w*(?:TOKEN|API_KEY|SECRET|ACCESS_KEY|PASSWORD|PASSWD)")
_NO_REFERENCE = r"(?![^\s@&'\"]*\$\{)"  # ${NAME} only says where the secret is
_NAMED = re.compile(
    rf"((?<![\w.-]){_NAME}['\"]?\s*[=:]\s*['\"]?)(?!null\b|None\b){_NO_REFERENCE}"
    r"[^\s,;&'\"})\]]+",
    re.IGNORECASE,
)
_RULES = [
    (r"(\bAuthorization['\"]?\s*[=:]\s*['\"]?\w+\s+)[^\s'\"]+", rf"\1{REDACTED}"),
    # A digit, or very long: else it is a bearer of something, or a name.
    (r"(\bBearer\s+)(?=\S*\d|\S{20})[\w.~+/=-]{8,}", rf"\1{REDACTED}"),
    (r"\b(?:hf_[^\W_]{16,}|sk-(?=\S*\d)[\w-]{16,}|gh[pousr]_\w{20,}|A[KS]IA[0-9A-Z]{16})",
     REDACTED),
]  # fmt: skip
_COMPILED = [(re.compile(pattern, re.IGNORECASE), new) for pattern, new in _RULES]

_REFERENCE = re.compile(r"\$\{(\w+)\}")
_RUN_ID = "run_id"  # ${run_id} is no variable: it is filled in where a run's folder is named

_SCHEME = r"[A-Za-z][\w+.-]{0,30}://"
_CHARACTER = rf"(?!{_SCHEME})(?:\\.|[^\s\\"  # of a URL, up to the next one
_URL = re.compile(
    # Up to the quote that opened it; without one, up to what a URL cannot hold.
    rf"(?<=\")({_SCHEME})((?:{_CHARACTER}\"]))*)"
    rf"|(?<=')({_SCHEME})((?:{_CHARACTER}']))*)"
    rf"|({_SCHEME})((?:{_CHARACTER}<>`\"]))*)"
)
_HOST = re.compile(r"[^:@]*(?::\d{1,5})?(?:::)?|\[[\da-fA-F:.%]+\](?::\d{1,5})?|arn:[\w:-]+")
_USER_REFERENCE = re.compile(r"(?:(?:[\w.%+-]|\$\{\w+\})*:)?(?:\$\{\w+\})+")
_QUERY_OF_PATH = re.compile(r"((?<![\w.*:/-])/[^\s?'\"<>]*\?)([^\s'\"<>/]*=[^\s'\"<>]*)")
"""As libraries for HTTP show it: `Max retries exceeded with url: /x?sig=...`"""

_MIN_LENGTH = 8
"""Shorter values are common words: they are put back only where they belong to a location."""
_remembered: dict[str, str] = {}  # text -> what stands for it, anywhere
_locations: dict[str, str] = {}  # the same for texts that are replaced as whole words only


def redact(text: str) -> str:
    """The text without what is, or looks like, a credential."""
    for known, shown in sorted(_locations.items(), key=_longest_first):
        if known in text:
            text = re.sub(rf"(?<![\w./-]){re.escape(known)}(?![\w-])", lambda _, s=shown: s, text)
    for known, shown in sorted(_remembered.items(), key=_longest_first):
        text = text.replace(known, shown)
    if "?" in text:
        text = _QUERY_OF_PATH.sub(lambda match: match[1] + _shown_query(match[2]), text)
    return _without_credentials(text)


def redacted(value: Any, name: str = "") -> Any:
    """Plain values without credentials; all text under the name of a secret counts as one.

    What is saved must not depend on what this process has opened, so values of `${NAME}` are not
    looked for: a configuration keeps `${NAME}`.
    """
    if isinstance(value, dict):
        return {key: redacted(child, str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [redacted(child, name) for child in value]
    if not isinstance(value, str) or not value:
        return value
    is_secret = _SECRET_NAME.fullmatch(name) and not _REFERENCE.search(value)
    return REDACTED if is_secret else _without_credentials(value)


def with_secrets(location: str) -> str:
    """A path or URL with its `${NAME}`s filled in from the environment, for the one who opens it.

    `ValueError` where there is no such variable, or the URL comes from what was saved without its
    credential.
    """
    if REDACTED in location and "://" in location:
        raise ValueError("its credential was left out when it was saved; give the URL again")
    if fault := location_fault(location):
        raise ValueError(" - ".join(fault))
    filled = _REFERENCE.sub(_value, location)
    if filled != location:
        _remember(location, filled)
    for secret in _hidden_parts(filled):
        if len(secret) >= _MIN_LENGTH:
            for text in _spellings(secret):
                _remembered.setdefault(text, REDACTED)
    return filled


def local_path(location: str) -> str:
    """The same of a path on this machine; a URL is left for the one who opens it."""
    return location if "://" in location else with_secrets(location)


def location_fault(location: str) -> tuple[str, str] | None:
    """Why a location cannot be filled in, and what to do about it; None where it can."""
    for name in _REFERENCE.findall(location):
        if name != _RUN_ID and not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            return f"the environment variable {name} is {state}", "set it, or write its value here"
    if wrong := re.search(r"\$\{(?!\w+\})[^}]*\}?", location):
        return f"{wrong[0]} is no ${{NAME}}", "only names of environment variables are filled in"
    if "://" not in location and (plain := re.search(r"(?:^|/)\$([A-Za-z_]\w*)(?=/|$)", location)):
        return f"${plain[1]} is not filled in", f"write ${{{plain[1]}}}"
    return None


def _value(reference: re.Match) -> str:
    return reference[0] if reference[1] == _RUN_ID else os.environ[reference[1]]


def _remember(location: str, filled: str) -> None:
    """Note what `redact` has to put back."""
    for name in _REFERENCE.findall(location):
        value = os.environ.get(name, "")
        if len(value) >= _MIN_LENGTH:
            for text in _spellings(value):
                _remembered[text] = f"${{{name}}}"
        elif len(value) > 3 and not value.isalnum():
            _locations[value] = f"${{{name}}}"
    if len(filled) > 3:
        _locations[filled] = location
    # A pattern's folder stands before every name that it matches.
    start, old = (re.split(r"[*?\[]|(?<!\$)\{", text)[0] for text in (filled, location))
    start, old = start.rpartition("/")[0], old.rpartition("/")[0]
    if len(start) > 3 and "${" in old:
        _locations[start] = old


def _hidden_parts(url: str) -> Iterator[str]:
    """Userinfo and query of a URL, and each part of them."""
    _, mark, rest = url.partition("://")
    if not mark or _without_credentials(url) == url:
        return
    before, _, query = rest.partition("?")
    user = before.rpartition("@")[0]
    yield from (user, user.partition(":")[2], query)
    yield from (part.partition("=")[2] for part in re.split("[&;#]", query))


def _spellings(secret: str) -> set[str]:
    """The forms in which libraries show it."""
    plain = {secret, unquote(secret)}
    quoted = {function(text) for text in plain for function in (quote, quote_plus)}
    quoted |= {quote(text, safe="") for text in plain}
    return plain | quoted | {form(text)[1:-1] for text in plain for form in (repr, json.dumps)}


def _without_credentials(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and value in text and _SECRET_VARIABLE.fullmatch(name):
            text = text.replace(value, REDACTED)
    if "://" in text:
        text = _URL.sub(_shown, text)
    if "=" in text or ":" in text:  # the pattern takes long, also where it finds nothing
        text = _NAMED.sub(rf"\1{REDACTED}", text)
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    return text


def _shown(match: re.Match) -> str:
    """What may be shown of a URL; where that is in doubt, its scheme."""
    scheme, rest = (part for part in match.groups() if part is not None)
    before, mark, after = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()
    host = before.partition("/")[0]
    if not scheme.lower().startswith("http") and not re.match(r"[\w.-]+=", after):
        before, mark, after = rest, "", ""  # a pattern or a name: s3://bucket/part-?.jsonl
    if not _HOST.fullmatch(host):
        user, at, place = before.rpartition("@")
        if not at or "@" in after:  # cut off, or a password with a question mark
            return f"{scheme}{REDACTED}"
        before = place if not user else f"{_shown_user(user)}@{place}"
    return scheme + before + mark + (_shown_query(after) if after else "")


def _shown_user(user: str) -> str:
    return user if _USER_REFERENCE.fullmatch(user) else REDACTED


def _shown_query(query: str) -> str:
    """`name=${NAME}` stays, so that the URL can be saved; all else goes."""
    parts = re.split("&", query)
    kept = [part for part in parts if re.fullmatch(r"[\w.-]+=(?:(?:\$\{\w+\})+|)", part)]
    return "&".join(kept if len(kept) == len(parts) else [REDACTED, *kept])


def _longest_first(item: tuple[str, str]) -> int:
    return -len(item[0])
