"""Asking web servers, on the controller: redirects, tokens, patience.

A token goes to the server that it was given for, in a header, and nowhere else: not to where that
server redirects to, not into a message. Nothing here waits forever, follows forever or reads
without end.
"""

from __future__ import annotations

import email.utils
import ipaddress
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import urljoin, urlsplit

import requests
from requests.auth import AuthBase

from tasks.rules.outside import shown

CONNECT_SECONDS = 10
READ_SECONDS = 30
BODY_SECONDS = 120
"""For a whole answer, however slowly it drips."""
MOST_REDIRECTS = 10
TRIES = 4
LONGEST_WAIT_SECONDS = 30
_BLOCK = 256 * 1024
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which trying again makes sense."""


class WebError(Exception):
    """A server gave no answer that could be used. The text has neither token nor signature."""

    def __init__(self, text: str, status: int | None = None, code: str = "") -> None:
        self.status = status
        """None where there was no answer at all."""
        self.code = code
        """What the Hub calls it: GatedRepo, RevisionNotFound, ..."""
        super().__init__(text)


@dataclass(frozen=True)
class Token:
    """A secret, and the only server that may see it."""

    secret: str = field(repr=False)
    server: str
    """A URL of that server."""

    def is_for(self, url: str) -> bool:
        """Whether a URL is on that server: the same protocol, name and port."""
        return _origin(url) == _origin(self.server)


class _Auth(AuthBase):
    """Given to every request, so that requests never looks into ~/.netrc by itself."""

    def __init__(self, token: Token | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.pop("Authorization", None)
        if self._token is not None and self._token.is_for(request.url or ""):
            request.headers["Authorization"] = f"Bearer {self._token.secret}"
        return request


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    standard = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or standard


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _wait_seconds(response: requests.Response, attempt: int) -> float:
    """How long the server asks to wait; without a word, longer each time."""
    asked = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", asked):
        return min(float(asked), LONGEST_WAIT_SECONDS)
    when = email.utils.parsedate_tz(asked) if asked else None
    if when is not None:
        try:
            left = email.utils.mktime_tz(when) - datetime.now(timezone.utc).timestamp()
        except (OverflowError, ValueError):
            left = 0.0
        return min(max(left, 0.0), LONGEST_WAIT_SECONDS)
    return min(2.0**attempt, LONGEST_WAIT_SECONDS)


def _problem(error: requests.RequestException, url: str) -> WebError:
    """What went wrong, in words; requests' own text may hold the whole URL."""
    host = urlsplit(url).hostname or url
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (requests.exceptions.ProxyError, "the proxy refuses"),
        (requests.exceptions.SSLError, "its certificate is not trusted here"),
        (requests.exceptions.ConnectTimeout, f"no connection within {CONNECT_SECONDS} s"),
        (requests.exceptions.Timeout, f"no answer within {READ_SECONDS} s"),
        (requests.exceptions.ConnectionError, "no connection"),
        (requests.exceptions.ChunkedEncodingError, "the connection broke"),
    )
    for kind, text in kinds:
        if isinstance(error, kind):
            reason = "its name is not known" if "resol" in str(error).lower() else text
            return WebError(f"{host}: {reason}")
    return WebError(f"{host}: {type(error).__name__}")


@contextmanager
def opened(
    url: str, token: Token | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[requests.Response]:
    """The answer to a GET, after redirects, not yet read. Raises WebError unless it is 2xx."""
    with requests.Session() as session:
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = _followed(session, url, token, headers or {})
            except requests.RequestException as error:
                problem = _problem(error, url)
                if last or isinstance(error, requests.exceptions.SSLError):
                    raise problem from None
                time.sleep(2.0**attempt / 4)
                continue
            if response.status_code in _PASSING and not last:
                wait = _wait_seconds(response, attempt)
                response.close()
                time.sleep(wait)
                continue
            break
        else:  # pragma: no cover  (the last try either breaks or raises)
            raise AssertionError
        with response:
            if not response.ok:
                raise _refusal(response)
            yield response


def _refusal(response: requests.Response) -> WebError:
    code = response.headers.get("X-Error-Code", "")
    host = urlsplit(response.url).hostname
    return WebError(
        f"{host}: HTTP {response.status_code}",
        response.status_code,
        code if re.fullmatch(r"\w{1,40}", code) else "",
    )


def _followed(
    session: requests.Session, url: str, token: Token | None, headers: Mapping[str, str]
) -> requests.Response:
    # requests would follow by itself, but decides by its own rules who gets the token.
    for _ in range(MOST_REDIRECTS):
        response = session.get(
            url,
            auth=_Auth(token),
            headers={"User-Agent": "llamastead", "Accept-Encoding": "identity", **headers},
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            stream=True,
        )
        if not response.is_redirect:
            return response
        target = urljoin(url, response.headers["Location"])
        response.close()
        session.cookies.clear()
        if urlsplit(target).scheme not in {"http", "https"}:
            raise WebError(f"{urlsplit(url).hostname}: redirects to {shown(target)}")
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
            raise WebError(f"{urlsplit(url).hostname}: redirects to plain http")
        url = target
    raise WebError(f"{urlsplit(url).hostname}: redirects in circles")


def body(response: requests.Response, most: int, skip: int = 0) -> bytes:
    """Up to so many bytes of an answer, after those to be skipped."""
    content = bytearray()
    deadline = time.monotonic() + BODY_SECONDS
    host = urlsplit(response.url).hostname
    try:
        for block in response.iter_content(_BLOCK):
            content += block
            if skip:
                gone = min(skip, len(content))
                del content[:gone]
                skip -= gone
            if len(content) >= most and not skip:
                break
            if time.monotonic() > deadline:
                raise WebError(f"{host}: the answer was not complete within {BODY_SECONDS} s")
    except requests.RequestException as error:
        raise _problem(error, response.url) from None
    return bytes(content[:most])


class RemoteFile:
    """A file on a web server, of which ranges are read.

    Where it redirects to is remembered, so that a file of which many ranges are read is looked up
    once; an address that has expired is looked up again.
    """

    MOST_SKIPPED_BYTES = 128 * 1024**2

    def __init__(self, url: str, token: Token | None = None) -> None:
        self._url = url
        self._token = token
        self._location = url
        self.size: int | None = None
        """Bytes of the whole file, once the server has told."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer than asked for only where the file ends."""
        if length <= 0 or (self.size is not None and offset >= self.size):
            return b""
        try:
            return self._range(self._location, offset, length)
        except WebError as problem:
            if problem.status == 416:
                return b""
            if self._location == self._url or problem.status not in {401, 403, 404, 410}:
                raise
            self._location = self._url
            return self._range(self._url, offset, length)

    def _range(self, url: str, offset: int, length: int) -> bytes:
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        with opened(url, self._token, wanted) as response:
            told = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
            if response.status_code == 206 and (found is None or int(found[1]) != offset):
                raise WebError(f"{urlsplit(response.url).hostname}: gives another range")
            if found is not None and found[2] != "*":
                self.size = int(found[2])
            skip = 0 if response.status_code == 206 else offset
            if skip > self.MOST_SKIPPED_BYTES:
                raise WebError(f"{urlsplit(response.url).hostname}: gives no ranges")
            content = body(response, length, skip)
            self._location = response.url
        expected = length if self.size is None else min(length, self.size - offset)
        if response.status_code == 206 and len(content) < expected:
            raise WebError(f"{urlsplit(url).hostname}: the connection broke")
        return content
