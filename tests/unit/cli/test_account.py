"""login, logout and whoami against real servers; where the token goes, and where it never does."""

import io
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.unit.cli.hub import serving

from ckptcoord.cli.bearer import Endpoint, Token, user_of
from ckptcoord.errors import LoginError

TOKEN = "planted-4f6c1e9a77d04b2c8e51"
OTHER = "another-0b7d5e3c1a9f86420dc4"
CLI = [sys.executable, "-m", "ckptcoord.cli"]


@pytest.fixture
def hub():
    with serving(TOKEN) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "config/ckptcoord"


@pytest.fixture
def login(cli, monkeypatch):
    """`ckptcoord login --token-stdin` with this on stdin."""

    def call(token, *words):
        stdin = io.TextIOWrapper(io.BytesIO(token.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        return cli("login", "--token-stdin", *words)

    return call


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def _texts(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- logging in and out ------------------------------------------------------------------------


def test_a_login_is_checked_kept_shown_and_forgotten(cli, login, hub, folder) -> None:
    answer = login(f"{TOKEN}\n", "--verify-url", hub.url)
    assert (answer.code, answer.out) == (0, "")
    assert f"logged in at {hub.url} as ada" in answer.err
    assert hub.asked == [("/me", f"Bearer {TOKEN}")]

    shown = cli("whoami", "--json").json["data"]
    assert (shown["user"], shown["url"], shown["kept_in"]) == ("ada", hub.url, "file")
    assert len(shown["fingerprint"]) == 8
    assert cli("whoami").out.split("\t")[:2] == ["ada", hub.url]

    assert cli("logout").err == "logged out\n"
    assert cli("whoami").code == 1
    assert list(folder.iterdir()) == []
    assert cli("logout").err == "nobody was logged in\n"


def test_the_token_is_in_one_file_that_only_its_owner_reads(login, hub, folder) -> None:
    old = os.umask(0)
    try:
        assert login(TOKEN, "--verify-url", hub.url).code == 0
    finally:
        os.umask(old)

    assert (_mode(folder), _mode(folder.parent)) == (0o700, 0o700)
    assert {path.name: _mode(path) for path in folder.iterdir()} == {
        "auth.json": 0o600,
        "token": 0o600,
    }
    assert [name for name, data in _texts(folder).items() if TOKEN.encode() in data] == ["token"]


def test_a_folder_that_others_can_read_is_closed_first(login, hub, folder) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o755)

    assert login(TOKEN, "--verify-url", hub.url).code == 0
    assert _mode(folder) == 0o700


def test_whoami_verify_asks_the_server_again(cli, login, hub) -> None:
    login(TOKEN, "--verify-url", hub.url)
    assert cli("whoami", "--verify", "--json").json["data"]["verified"] is True

    hub.token = OTHER
    answer = cli("whoami", "--verify", "--json")

    assert (answer.code, answer.json["error"]["code"]) == (1, "CC051")
    assert cli("whoami").code == 0


def test_the_next_login_asks_where_the_last_one_did(cli, login, hub) -> None:
    assert login(TOKEN).code == 2
    login(TOKEN, "--verify-url", hub.url)

    assert login(TOKEN).code == 0
    assert [path for path, _ in hub.asked] == ["/me", "/me"]


def test_a_login_that_fails_leaves_the_one_before(cli, login, hub, folder) -> None:
    login(TOKEN, "--verify-url", hub.url)
    before = _texts(folder)

    assert login(OTHER).code == 1

    assert _texts(folder) == before


def test_a_dry_run_of_logout_removes_nothing(cli, login, hub, folder) -> None:
    login(TOKEN, "--verify-url", hub.url)

    answer = cli("logout", "--dry-run", "--json")

    assert answer.json["data"]["removed"] == [str(folder / "token"), str(folder / "auth.json")]
    assert len(_texts(folder)) == 2


# --- where the token comes from ----------------------------------------------------------------


def test_a_token_in_the_argument_list_is_taken_with_a_warning(cli, hub) -> None:
    answer = cli("login", "--token", TOKEN, "--verify-url", hub.url)

    assert answer.code == 0
    assert "warning: --token shows the token to all users" in answer.err
    assert TOKEN not in answer.out + answer.err


def test_the_environment_may_hold_it(cli, hub, monkeypatch) -> None:
    monkeypatch.setenv("CKPTCOORD_TOKEN", TOKEN)

    assert cli("login", "--verify-url", hub.url).code == 0
    assert hub.asked == [("/me", f"Bearer {TOKEN}")]


@pytest.mark.parametrize(
    "words", [["--token", TOKEN, "--token-stdin"], [], ["--token", ""], ["--token"]]
)
def test_without_one_token_there_is_no_login(cli, hub, monkeypatch, words) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    answer = cli("login", "--verify-url", hub.url, *words)

    assert answer.code == 2
    assert "error[CC002]: " in answer.err
    assert hub.asked == []


@pytest.mark.parametrize(
    "text",
    ["short", "x" * 10_000, f"{TOKEN} two", f"{TOKEN}\nX-Evil: 1", f"{TOKEN}é", f"{TOKEN}\0", "  "],
)
def test_what_is_no_token_is_not_sent_and_not_shown(login, hub, text) -> None:
    answer = login(text, "--verify-url", hub.url)

    assert (answer.code, hub.asked) == (2, [])
    assert "--token-stdin: is no token" in answer.err
    assert TOKEN not in answer.err
    assert "x" * 100 not in answer.err


@pytest.mark.parametrize("words", [[TOKEN], ["--tokne", TOKEN], [f"--tokne={TOKEN}"]])
def test_a_token_in_a_wrong_place_is_not_shown(cli, words) -> None:
    for more in ([], ["--json"]):
        answer = cli("login", *words, *more)
        assert answer.code == 2
        assert TOKEN not in answer.out + answer.err


def test_a_prompt_does_not_show_what_is_typed(hub, folder) -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    words = [*CLI, "login", "--verify-url", hub.url]
    process = subprocess.Popen(
        words, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    said = b""
    while b"not shown): " not in said:
        said += os.read(leader, 1000)
    os.write(leader, f"{TOKEN}\n".encode())
    assert process.wait(60) == 0
    while True:
        try:
            said += os.read(leader, 1000)
        except OSError:  # all of it was read
            break
    os.close(leader)

    assert b"as ada" in said
    assert TOKEN.encode() not in said
    assert TOKEN.encode() in (folder / "token").read_bytes()


# --- where it is sent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/me",
        "http://127.0.0.1.example.com/me",
        "https://me:planted-secret@example.com/me",
        "https://example.com/me?key=planted-secret",
        "https://example.com/me#planted-secret",
        "https://example.com:99999/",
        "https://[::1/",
        "https://",
        "ftp://localhost/me",
        "file:///etc/passwd",
        "example.com",
        "",
        "https://exämple.com/",
        "https://example.com/\nX: 1",
        "https://example.com/" + "x" * 10_000,
    ],
)
def test_a_url_that_no_token_should_go_to_is_refused(login, url) -> None:
    answer = login(TOKEN, "--verify-url", url)

    assert (answer.code, answer.out) == (2, "")
    assert "error[CC002]: --verify-url: " in answer.err
    assert "planted-secret" not in answer.err
    assert len(answer.err) < 500


def test_a_redirect_to_another_host_never_carries_the_token(login, hub, folder) -> None:
    with serving(TOKEN) as stranger:
        here = f"http://localhost:{hub.port}/me"
        for target in (stranger.url, here, "https://127.0.0.1:1/", "file:///etc/passwd", "//x/y"):
            for status in (301, 302, 303, 307, 308):
                hub.answer = lambda request, to=target, status=status: hub.say(
                    request, status, headers=[("Location", to)]
                )
                answer = login(TOKEN, "--verify-url", hub.url)
                assert answer.code == 1
                assert "redirects to" in answer.err
        assert stranger.asked == []
    assert {path for path, _ in hub.asked} == {"/me"}
    assert not (folder / "auth.json").exists()


def test_a_redirect_within_the_server_is_followed(login, hub) -> None:
    def answer(request) -> None:
        if request.path == "/me":
            # Its body has no end that anybody would wait for.
            request.send_response(307)
            request.send_header("Location", "/v2/me")
            request.end_headers()
            hub.stream(request, (b"x" * 65536 for _ in range(1 << 14)))
        else:
            hub.know(request)

    hub.answer = answer

    assert login(TOKEN, "--verify-url", hub.url).code == 0
    assert [path for path, _ in hub.asked] == ["/me", "/v2/me"]
    assert hub.sent_bytes < 64 << 20


def test_redirects_without_an_end_are_an_error(login, hub) -> None:
    hub.answer = lambda request: hub.say(request, 302, headers=[("Location", "/me")])

    assert "redirects more than 5 times" in login(TOKEN, "--verify-url", hub.url).err


def test_a_proxy_is_not_told_what_is_for_this_machine(login, hub, monkeypatch) -> None:
    with serving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)

        assert login(TOKEN, "--verify-url", hub.url).code == 0
        assert proxy.asked == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Key and certificate of 127.0.0.1, by nobody whom anybody trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    folder = tmp_path_factory.mktemp("tls")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    more = "-subj /CN=hub -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run([*words.split(), *more.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_over_https_the_certificate_decides(login, certificate, monkeypatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serving(TOKEN, tls=context) as hub:
        answer = login(TOKEN, "--verify-url", hub.url)
        assert (answer.code, hub.asked) == (1, [])
        assert "cannot be reached" in answer.err
        assert "CERTIFICATE_VERIFY_FAILED" in answer.err

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        assert login(TOKEN, "--verify-url", hub.url).code == 0


# --- what servers say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (401, "CC051", "refused the token (HTTP 401)"),
        (403, "CC051", "refused the token (HTTP 403)"),
        (404, "CC050", "answered HTTP 404"),
        (302, "CC050", "answered HTTP 302"),
        (429, "CC050", "was asked too often (HTTP 429)"),
        (500, "CC050", "the server failed (HTTP 500)"),
        (503, "CC050", "the server failed (HTTP 503)"),
        (204, "CC050", "is not JSON"),
    ],
)
def test_each_refusal_is_named(login, hub, folder, status, code, text) -> None:
    hub.answer = lambda request: hub.say(request, status, TOKEN.encode() if status > 204 else b"")

    answer = login(TOKEN, "--verify-url", hub.url)

    assert answer.code == 1
    assert f"error[{code}]: {hub.url}" in answer.err
    assert text in answer.err
    assert TOKEN not in answer.err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"[]",
        b"null",
        b'"ada"',
        b"{}",
        b'{"user": null, "name": " "}',
        b'{"user": {"user": "ada"}}',
        b'{"user": true}',
        b'{"user": NaN}',
        b'{"user": "a", "user": "b"}',
        b'{"user": "\\ud800"}',
        b'{"user": "\xff"}',
        b"[" * 60_000,
        b'{"user": "' + b"a" * 70_000 + b'"}',
    ],
)
def test_an_answer_that_names_nobody_is_an_error(login, hub, body) -> None:
    hub.answer = lambda request: hub.say(request, 200, body)

    answer = login(TOKEN, "--verify-url", hub.url)

    assert (answer.code, answer.out) == (1, "")
    assert f"error[CC050]: {hub.url}: the answer " in answer.err
    assert len(answer.err) < 1000


def test_of_a_gigabyte_no_more_is_read_than_an_answer_may_have(login, hub) -> None:
    def answer(request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(1 << 30))
        request.end_headers()
        hub.stream(request, (b"x" * 65536 for _ in range(1 << 14)))

    hub.answer = answer

    assert "longer than 65,536 bytes" in login(TOKEN, "--verify-url", hub.url).err
    assert hub.sent_bytes < 64 << 20


def _raw(request, data) -> None:
    request.wfile.write(data)
    request.wfile.flush()
    request.close_connection = True


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\xff" * 100_000,
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: https://x:y\xff@z\r\n\r\n",
    ],
)
def test_what_is_no_http_is_an_error_like_any_other(login, hub, data) -> None:
    hub.answer = lambda request: _raw(request, data)

    answer = login(TOKEN, "--verify-url", hub.url)

    assert answer.code == 1
    assert answer.err.startswith(f"error[CC050]: {hub.url}: ")
    assert len(answer.err) < 2000


def test_nobody_at_the_port_is_an_error(login, hub) -> None:
    with serving() as gone:
        pass

    assert "cannot be reached: " in login(TOKEN, "--verify-url", gone.url).err


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_never_ends_is_left_at_the_deadline(hub, head) -> None:
    """A byte now and then keeps any time-out of a socket from passing."""
    over = threading.Event()

    def answer(request) -> None:
        hub.stream(request, [head])
        while not over.wait(0.05):
            hub.stream(request, [b" "])

    hub.answer = answer
    try:
        with pytest.raises(LoginError, match="no answer within 400 ms"):
            user_of(Token(TOKEN), Endpoint(hub.url), timeout_s=0.4)
    finally:
        over.set()


def test_a_server_that_sends_the_token_back_tells_nobody(cli, login, hub, folder) -> None:
    hub.answer = lambda request: hub.say(request, 200, {"user": f"me {TOKEN} \x1b[2J"})

    answer = login(TOKEN, "--verify-url", hub.url)

    assert answer.code == 0
    assert "as me *** \\x1b[2J" in answer.err
    assert TOKEN.encode() not in (folder / "auth.json").read_bytes()
    assert TOKEN not in cli("whoami").out

    hub.answer = lambda request: hub.say(
        request, 302, headers=[("Location", f"http://{TOKEN}.localhost/")]
    )
    assert TOKEN not in login(TOKEN, "--verify-url", hub.url).err


@pytest.mark.parametrize(
    ("body", "user"),
    [({"login": "ada"}, "ada"), ({"name": "Ada", "id": 7}, "Ada"), ({"id": 7}, "7")],
)
def test_the_user_has_any_of_the_usual_names(hub, body, user) -> None:
    hub.answer = lambda request: hub.say(request, 200, body)

    assert user_of(Token(TOKEN), Endpoint(hub.url)) == user


# --- what is kept, and who may have been there -------------------------------------------------


@pytest.fixture
def session(login, hub, folder):
    login(TOKEN, "--verify-url", hub.url)
    return folder / "auth.json"


HOSTILE = {
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"\xff\0"),
    "large": lambda path: path.write_bytes(b" " * 20_000),
    "deep": lambda path: path.write_bytes(b"[" * 10_000),
    "link": lambda path: path.unlink() or path.symlink_to("/etc/passwd"),
    "folder": lambda path: path.unlink() or path.mkdir(),
    "FIFO": lambda path: path.unlink() or os.mkfifo(path),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", ["auth.json", "token"])
def test_damage_to_what_is_kept_is_named_and_logout_removes_it(cli, session, name, damage) -> None:
    path = session.with_name(name)
    damage(path)

    answer = cli("whoami", "--verify")

    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error[CC050]: ")
    assert cli("logout").code == 0
    assert list(session.parent.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"kept_in": "/etc"},
        {"url": "http://example.com/"},
        {"user": 7},
        {"token": TOKEN},
        {"fingerprint": None},
    ],
)
def test_facts_that_break_the_format_are_named(cli, session, change) -> None:
    session.write_text(json.dumps({**json.loads(session.read_text()), **change}))

    answer = cli("whoami")

    assert (answer.code, str(session) in answer.err) == (1, True)
    assert TOKEN not in answer.err


def test_a_token_that_is_not_the_one_that_was_checked_is_not_sent(cli, session, hub) -> None:
    session.with_name("token").write_text(OTHER)
    asked = len(hub.asked)

    assert "is not the one that was checked" in cli("whoami", "--verify").err
    assert len(hub.asked) == asked


def test_a_token_that_others_may_read_is_not_used(cli, session) -> None:
    session.with_name("token").chmod(0o644)

    assert "others may read this file" in cli("whoami", "--verify").err


def test_a_token_that_is_gone_is_said_to_be(cli, session) -> None:
    session.with_name("token").unlink()

    assert "the token is gone" in cli("whoami", "--verify").err


@pytest.mark.parametrize("home", ["/dev/null/x", "/proc/none/x"])
def test_a_place_that_cannot_be_written_is_found_out_before_the_token_is_sent(
    cli, login, hub, monkeypatch, home
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", home)

    answer = login(TOKEN, "--verify-url", hub.url)

    assert (answer.code, hub.asked) == (1, [])
    assert answer.err.startswith("error[CC040]: ")
    assert cli("logout").code in (0, 1)
    assert cli("whoami").code == 1


def test_a_full_disk_is_said_to_be_full(login, hub, monkeypatch, folder) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckptcoord.store.local.write_all", full)

    answer = login(TOKEN, "--verify-url", hub.url)

    assert answer.code == 14
    assert f"error[CC014]: {folder / 'token'}: " in answer.err


def test_without_a_home_the_user_is_told(cli, monkeypatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")

    assert "error[CC050]: login: no home directory" in cli("whoami").err


# --- the keyring -------------------------------------------------------------------------------


@pytest.fixture
def keyring(monkeypatch):
    """Has the real keyring use this back end."""
    library = pytest.importorskip("keyring")
    from keyring.backend import KeyringBackend

    class Memory(KeyringBackend):
        priority = 5
        held: dict[tuple[str, str], str]

        def __init__(self) -> None:
            super().__init__()
            self.held = {}

        def get_password(self, service, username):
            return self.held.get((service, username))

        def set_password(self, service, username, password) -> None:
            self.held[service, username] = password

        def delete_password(self, service, username) -> None:
            del self.held[service, username]

    memory = Memory()
    monkeypatch.setattr(library.core, "_keyring_backend", memory)
    return memory


def test_a_keyring_holds_the_token_and_no_file_does(cli, login, hub, folder, keyring) -> None:
    answer = login(TOKEN, "--verify-url", hub.url)

    assert (answer.code, "warning" in answer.err) == (0, False)
    assert list(keyring.held.values()) == [TOKEN]
    assert [path.name for path in folder.iterdir()] == ["auth.json"]
    assert cli("whoami", "--verify", "--json").json["data"]["kept_in"] == "keyring"
    assert cli("logout", "--dry-run", "--json").json["data"]["removed"][0] == "keyring"
    assert cli("logout").code == 0
    assert keyring.held == {}


def test_a_token_that_moves_to_the_keyring_leaves_no_file(
    cli, login, hub, folder, keyring, monkeypatch
) -> None:
    monkeypatch.setattr(type(keyring), "priority", 0)
    login(TOKEN, "--verify-url", hub.url)
    assert (folder / "token").exists()

    monkeypatch.setattr(type(keyring), "priority", 5)
    login(TOKEN, "--verify-url", hub.url)

    assert not (folder / "token").exists()


def _raising(error):
    def call(*_: object) -> None:
        raise error

    return call


BROKEN = {
    "locked": ("set_password", _raising(RuntimeError(f"locked, cannot keep {TOKEN}"))),
    "forgets": ("set_password", lambda *_: None),
    "lies": ("get_password", lambda *_: OTHER),
    "no text": ("get_password", lambda *_: 7),
    "no priority": ("priority", property(_raising(RuntimeError("no D-Bus")))),
    "plain files": ("priority", 0.5),
}


@pytest.mark.parametrize(("name", "value"), BROKEN.values(), ids=BROKEN.keys())
def test_a_keyring_that_does_not_work_is_named_and_the_file_serves(
    cli, login, hub, folder, keyring, monkeypatch, name, value
) -> None:
    monkeypatch.setattr(type(keyring), name, value)

    answer = login(TOKEN, "--verify-url", hub.url)

    assert answer.code == 0
    assert f"warning: the token is in {folder / 'token'}" in answer.err
    assert TOKEN not in answer.err
    assert cli("whoami", "--verify").code == 0


def test_a_keyring_that_hangs_is_left_at_the_deadline(
    login, hub, folder, keyring, monkeypatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr("ckptcoord.cli.vault._KEYRING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(type(keyring), "set_password", lambda *_: over.wait(60))

    answer = login(TOKEN, "--verify-url", hub.url)
    over.set()

    assert (answer.code, "it has not answered for" in answer.err) == (0, True)


def test_without_the_extra_the_user_is_told_of_it(login, hub, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)

    assert "pip install 'ckptcoord[login]'" in login(TOKEN, "--verify-url", hub.url).err


def test_a_keyring_that_keeps_the_token_at_logout_is_an_error(
    cli, login, hub, folder, keyring, monkeypatch
) -> None:
    login(TOKEN, "--verify-url", hub.url)
    with monkeypatch.context() as patch:
        patch.setattr(type(keyring), "delete_password", _raising(RuntimeError("locked")))
        answer = cli("logout")
        assert (answer.code, "the token is still there: locked" in answer.err) == (1, True)
        assert (folder / "auth.json").exists()

    assert cli("logout").code == 0


def test_an_entry_that_is_gone_from_the_keyring_is_said_to_be(cli, login, hub, keyring) -> None:
    login(TOKEN, "--verify-url", hub.url)
    keyring.held.clear()

    assert "error[CC050]: keyring: the token is gone" in cli("whoami", "--verify").err
    assert cli("logout").code == 0
