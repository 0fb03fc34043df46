"""Commands about who the user is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_LOGIN_HELP = """Check a token, and keep it in the OS keyring or a file that only you can read.

The token comes from --token, from stdin, from CKPTCOORD_TOKEN, or is asked for and not shown. It is
sent to the URL as `Authorization: Bearer`; the answer must be a JSON object that names the user.

\b
Examples:
  ckptcoord login --verify-url https://api.github.com/user
  ckptcoord login --verify-url https://huggingface.co/api/whoami-v2 --token-stdin < token.txt
  CKPTCOORD_TOKEN=... ckptcoord login --verify-url https://hub.example.com/me --json
"""
_LOGOUT_HELP = """Remove the token and all that is known about it from this machine.

\b
Examples:
  ckptcoord logout
  ckptcoord logout --dry-run
"""
_WHOAMI_HELP = """Show who is logged in, where and since when.

Into a pipe the columns are separated by tabs: user, URL, time, the token's fingerprint, and whether
the token is in the keyring or a file.

\b
Examples:
  ckptcoord whoami
  ckptcoord whoami --verify
  ckptcoord whoami | cut -f1
"""

app = commands()


@app.command("login", cls=Command, help=_LOGIN_HELP)
def _login(
    *,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="TOKEN", help="The token; others may see it: see above."),
    ] = None,
    from_stdin: Annotated[
        bool, typer.Option("--token-stdin", help="Read the token from stdin.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            "--verify-url",
            metavar="URL",
            help="Where to ask whose it is; by default where the last login was.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import account

        return account.login(out, token=token, from_stdin=from_stdin, url=url)

    return run("login", body, as_json=as_json)


@app.command("logout", cls=Command, help=_LOGOUT_HELP)
def _logout(*, dry_run: DryRun = False, as_json: AsJson = False) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import account

        return account.logout(out, dry_run=dry_run)

    return run("logout", body, as_json=as_json)


@app.command("whoami", cls=Command, help=_WHOAMI_HELP)
def _whoami(
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask the server whether the token is still good.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import account

        return account.whoami(out, verify=verify)

    return run("whoami", body, as_json=as_json)
