"""A token, and the HTTP endpoint that says whose it is.

The endpoint is asked by GET with `Authorization: Bearer`, and answers 200 with a JSON object that
names the user. The token goes to that one origin (scheme, host and port) and to no other: redirects
elsewhere are refused, and a server on this machine is asked past any proxy.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from ckptcoord.cli.deadlines import within
from ckptcoord.cli.text import clipped, seconds_text
from ckptcoord.core.jsonio import parse_json
from ckptcoord.errors import CkptError, ConfigError, LoginError, ManifestError, TokenRefusedError
from ckptcoord.redact import MIN_SECRET_CHARS, redact, remember
from ckptcoord.version import VERSION

TIMEOUT_S = 15.0
MAX_TOKEN_CHARS = 4096

_MAX_URL_CHARS = 2048
_MAX_ANSWER_BYTES = 64 << 10
_MAX_USER_CHARS = 200
_MAX_WHY_CHARS = 300
_MAX_REDIRECTS = 5
_USER_FIELDS = ("user", "login", "username", "name", "email", "id")
_VISIBLE = re.compile(r"[!-~]+")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Token:
    """A secret that no repr shows, and that no text which ckptcoord writes will hold.

    Args:
        text: 8 to 4,096 visible ASCII characters.
        source: where it comes from, for errors.

    Raises:
        ConfigError: the text can be no token.
    """

    text: str = field(repr=False)
    source: str = field(default="token", compare=False)

    def __post_init__(self) -> None:
        remember(self.text)
        if not MIN_SECRET_CHARS <= len(self.text) <= MAX_TOKEN_CHARS:
            why = f"is no token: it has {len(self.text):,} characters" if self.text else "is empty"
            help_ = f"A token has {MIN_SECRET_CHARS} to {MAX_TOKEN_CHARS:,} characters"
            raise ConfigError(field=self.source, why=why, help=help_)
        if _VISIBLE.fullmatch(self.text) is None:
            why = "is no token: it has a space, a control character or a letter outside of ASCII"
            raise ConfigError(field=self.source, why=why, help="Look what was copied with it")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a token is checked: `https://...`, or `http://` on this machine.

    Raises:
        ConfigError: the text is no such URL, or there is more in it than where to ask.
    """

    url: str

    def __post_init__(self) -> None:
        why = self._fault()
        if why:
            help_ = "Give https://HOST/PATH of the service that the token is for"
            raise ConfigError(field="--verify-url", why=why, help=help_)

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port."""
        parts = urlsplit(self.url)
        return parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme]

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        host = self.origin[1]
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:  # a name
            return False

    def _fault(self) -> str:
        if len(self.url) > _MAX_URL_CHARS or _VISIBLE.fullmatch(self.url) is None:
            return f"is no URL of 1 to {_MAX_URL_CHARS:,} visible ASCII characters"
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            return "is no URL"
        if "@" in parts.netloc or parts.query or parts.fragment:
            return "has more in it than scheme, host and path; the token goes into a header"
        if parts.scheme not in _PORTS or not host:
            return "is no https:// URL"
        if parts.scheme == "https" or self.is_here:
            return ""
        return "sends the token unencrypted; http:// is for this machine only"


def user_of(token: Token, endpoint: Endpoint, *, timeout_s: float = TIMEOUT_S) -> str:
    """The user whose token it is, as the endpoint says.

    Args:
        token: goes to the endpoint's origin only.
        endpoint: where to ask.
        timeout_s: for all of it: name look-up, redirects, the slowest of servers.

    Raises:
        TokenRefusedError: 401 or 403.
        LoginError: no answer, or none that is understood.
    """
    try:
        answer = within(timeout_s, lambda: _answer(token, endpoint, timeout_s))
    except CkptError:
        raise
    except TimeoutError as error:
        raise _failure(endpoint, f"no answer within {seconds_text(timeout_s)}") from error
    except URLError as error:
        reason = error.reason if isinstance(error.reason, BaseException) else error
        raise _failure(endpoint, f"cannot be reached: {reason}") from error
    except (HTTPException, OSError, ValueError) as error:
        raise _failure(
            endpoint, f"the answer is broken: {type(error).__name__}: {error}"
        ) from error
    return _named(answer, endpoint)


def _answer(token: Token, endpoint: Endpoint, timeout_s: float) -> bytes:
    """The body of the 200 at the end of the redirects within the origin."""
    opener = _opener(endpoint)
    url = endpoint.url
    for _ in range(_MAX_REDIRECTS + 1):
        found = _ask(opener, url, token, timeout_s)
        if isinstance(found, bytes):
            return found
        url = _next(endpoint, urljoin(url, found))
    raise _failure(endpoint, f"redirects more than {_MAX_REDIRECTS} times")


def _opener(endpoint: Endpoint) -> OpenerDirector:
    """Knows HTTP and proxies, and no more: urllib's own redirects would take the token anywhere."""
    opener = OpenerDirector()
    # Without an argument, the proxies of the environment.
    opener.add_handler(ProxyHandler({}) if endpoint.is_here else ProxyHandler())
    for kind in (HTTPHandler, HTTPSHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler):
        opener.add_handler(kind())
    return opener


def _ask(opener: OpenerDirector, url: str, token: Token, timeout_s: float) -> bytes | str:
    """The body, or where the server redirects to."""
    request = Request(url, headers={"Accept": "application/json"})
    request.add_header("User-Agent", f"ckptcoord/{VERSION}")
    request.add_unredirected_header("Authorization", f"Bearer {token.text}")
    try:
        with opener.open(request, timeout=timeout_s) as response:
            body: bytes = response.read(_MAX_ANSWER_BYTES + 1)
            return body
    except HTTPError as error:
        with error:
            status, location = error.code, error.headers.get("Location")
        if status in (301, 302, 303, 307, 308) and location is not None:
            return str(location)
        raise _refusal(url, status) from None


def _refusal(url: str, status: int) -> CkptError:
    if status in (401, 403):
        return TokenRefusedError(url=url, status=status)
    if status >= 500:
        return LoginError(where=url, why=f"the server failed (HTTP {status})", help="Try later")
    if status == 429:
        return LoginError(where=url, why="was asked too often (HTTP 429)", help="Try later")
    return LoginError(where=url, why=f"answered HTTP {status}", help="Check --verify-url")


def _next(endpoint: Endpoint, url: str) -> str:
    """A redirect's target, if the token may go there."""
    try:
        target = Endpoint(url)
    except ConfigError as error:
        raise _failure(endpoint, "redirects to what is no place to send a token to") from error
    if target.origin != endpoint.origin:
        scheme, host, port = target.origin
        raise LoginError(
            where=endpoint.url,
            why=f"redirects to {scheme}://{host}:{port}, where the token does not go",
            help="If you trust that host, give its URL as --verify-url",
        )
    return url


def _named(body: bytes, endpoint: Endpoint) -> str:
    """The user's name; a server that sends the token back as one gets it masked."""
    if len(body) > _MAX_ANSWER_BYTES:
        raise _failure(endpoint, f"the answer is longer than {_MAX_ANSWER_BYTES:,} bytes")
    try:
        document = parse_json(body, path=endpoint.url, max_depth=32)
    except ManifestError as error:
        raise _failure(endpoint, f"the answer {error.why}") from error
    fields = document if isinstance(document, dict) else {}
    for name in _USER_FIELDS:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return redact(value.strip())[:_MAX_USER_CHARS]
    raise _failure(
        endpoint, f"the answer is no object that names a user ({', '.join(_USER_FIELDS)})"
    )


def _failure(endpoint: Endpoint, why: str) -> LoginError:
    help_ = "Check --verify-url and the network, then log in again"
    return LoginError(where=endpoint.url, why=clipped(why, _MAX_WHY_CHARS), help=help_)
