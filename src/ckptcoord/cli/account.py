"""`ckptcoord login`, `logout` and `whoami`."""

from __future__ import annotations

import getpass
import os
import secrets
import sys
import warnings
from typing import TYPE_CHECKING

from ckptcoord.cli.bearer import MAX_TOKEN_CHARS, Endpoint, Token, user_of
from ckptcoord.cli.text import Style, aligned, printable, when
from ckptcoord.cli.vault import FACTS, FILE, KEYRING, TOKEN, Session, Vault, fingerprint_of
from ckptcoord.errors import ConfigError, LoginError, NotLoggedInError
from ckptcoord.redact import TOKEN_VARIABLE

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_HOW = f"Pipe the token into `ckptcoord login --token-stdin`, or set {TOKEN_VARIABLE}"


def login(out: Output, *, token: str | None, from_stdin: bool, url: str | None) -> int:
    """Check the token, then keep it; whoever was logged in stays so if it is not good.

    Raises:
        ConfigError: no URL to ask, no token, or what can be neither.
        CkptError: the token is refused, or cannot be checked or kept.
    """
    vault = Vault.of(os.environ)
    endpoint = Endpoint(url) if url is not None else _endpoint_before(out, vault)
    given = _token(out, token, from_stdin=from_stdin)
    vault.prepare()
    user = user_of(given, endpoint)
    kept_in, why = vault.keep(given)
    salt = secrets.token_hex(16)
    session = Session(
        user=user,
        url=endpoint.url,
        verified_at=out.now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        salt=salt,
        fingerprint=fingerprint_of(given, salt),
        kept_in=kept_in,
    )
    vault.remember(session)
    if kept_in == FILE:
        path = vault.folder / TOKEN
        _warn(out, f"the token is in {path}, 0600, and not in the OS keyring: {why}")
    if out.as_json:
        out.data(_document(session))
    else:
        out.note(f"logged in at {session.url} as {printable(user)}")
    return 0


def logout(out: Output, *, dry_run: bool) -> int:
    """Remove the token and the facts; nothing to remove is no failure.

    Raises:
        CkptError: something could not be removed.
    """
    vault = Vault.of(os.environ)
    removed = [str(vault.folder / name) for name in (TOKEN, FACTS) if vault.has(name)]
    place = _place(vault)
    if place == KEYRING:
        removed.insert(0, KEYRING)
    if not dry_run:
        _remove(out, vault, place)
    if out.as_json:
        out.data({"dry_run": dry_run, "removed": removed})
    elif not removed:
        out.note("nobody was logged in")
    elif dry_run:
        out.note(*(f"would remove {printable(name)}" for name in removed))
    else:
        out.note("logged out")
    return 0


def whoami(out: Output, *, verify: bool) -> int:
    """Say who is logged in, and with `verify` ask the server whether the token is still good.

    Raises:
        NotLoggedInError: nobody is.
        CkptError: what is kept cannot be read, or the server refuses it.
    """
    vault = Vault.of(os.environ)
    session = vault.session()
    if session is None:
        raise NotLoggedInError
    user = session.user
    if verify:
        user = user_of(vault.token(session), Endpoint(session.url))
    if out.as_json:
        out.data({**_document(session), "user": user, "verified": verify})
    else:
        out.lines(_lines(out, session, user))
    return 0


def _document(session: Session) -> dict[str, object]:
    shown = ("user", "url", "verified_at", "fingerprint", "kept_in")
    return {name: getattr(session, name) for name in shown}


def _lines(out: Output, session: Session, user: str) -> list[str]:
    if not out.terminal:
        cells = {**_document(session), "user": user}.values()
        return ["\t".join(printable(str(cell)) for cell in cells)]
    place = "the OS keyring" if session.kept_in == KEYRING else "a file"
    rows: list[tuple[str, ...]] = [
        ("user", printable(user)),
        ("server", printable(session.url)),
        ("since", when(session.verified_at, out.now)),
        ("token", f"{printable(session.fingerprint)} (a fingerprint), in {place}"),
    ]
    return [f"{out.paint(name, Style.DIM)}  {value}" for name, value in aligned(rows)]


def _endpoint_before(out: Output, vault: Vault) -> Endpoint:
    """Where the last login was; whoever changes tokens need not say it again."""
    session = vault.session()
    if session is None:
        help_ = "Give the URL that says whose a token is: --verify-url https://HOST/PATH"
        raise ConfigError(field="login", why="--verify-url is missing", help=help_)
    out.note(f"note: asking {session.url}, as for the last login")
    return Endpoint(session.url)


def _place(vault: Vault) -> str:
    """Where the token is; empty where that cannot be known."""
    try:
        session = vault.session()
    except LoginError:  # what cannot be read is removed unread
        return ""
    return FILE if session is None else session.kept_in


def _remove(out: Output, vault: Vault, place: str) -> None:
    why = "" if place == FILE else vault.leave_keyring()
    if why and place == KEYRING:
        help_ = "Unlock the keyring and log out again, or delete the entry ckptcoord there"
        raise LoginError(where=KEYRING, why=f"the token is still there: {why}", help=help_)
    vault.remove_files()
    if why:
        _warn(out, f"whether a token is in the keyring, too, cannot be known: {why}")


def _token(out: Output, given: str | None, *, from_stdin: bool) -> Token:
    if given is not None:
        if from_stdin:
            raise ConfigError(field="login", why="--token and --token-stdin are both given")
        _warn(
            out,
            "--token shows the token to all users of this machine, and your shell keeps it; "
            "--token-stdin does not",
        )
        return Token(given, "--token")
    if from_stdin and not sys.stdin.isatty():
        return Token(_from_stdin(), "--token-stdin")
    found = os.environ.get(TOKEN_VARIABLE, "")
    if found and not from_stdin:
        out.note(f"note: taking the token from {TOKEN_VARIABLE}")
        return Token(found.strip(), TOKEN_VARIABLE)
    return Token(_asked(), "the token")


def _from_stdin() -> str:
    """One token and its line's end, and no more than a token's length of what else comes."""
    data = sys.stdin.buffer.read(MAX_TOKEN_CHARS + 3)
    return data.decode("ascii", "surrogateescape").strip("\r\n")


def _asked() -> str:
    """Typed by a person, unseen."""
    if not sys.stdin.isatty():
        raise ConfigError(field="login", why="there is nobody to ask for the token", help=_HOW)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass("Token (not shown): ", stream=sys.stderr).strip()
    except getpass.GetPassWarning as error:
        why = "this terminal would show the token"
        raise ConfigError(field="login", why=why, help=_HOW) from error
    except KeyboardInterrupt:
        sys.stderr.write("\n")  # what was typed has no line's end
        raise
    except EOFError as error:
        sys.stderr.write("\n")
        raise ConfigError(field="login", why="no token was typed", help=_HOW) from error


def _warn(out: Output, text: str) -> None:
    out.note(f"{out.paint_note('warning:', Style.BOLD, Style.YELLOW)} {printable(text)}")
