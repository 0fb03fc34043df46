"""No secret is left in a text, in whatever form; the rest of the text is."""

import json
import sys
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord import redact as module
from ckptcoord.errors import ConfigError, DigestMismatchError, SaveAbortedError
from ckptcoord.redact import MASK, mask_known, redact, redact_all, remember, secrets_in

SECRET = "planted-4f6c1e9a77d04b2c8e51-secret"
# A star in a secret could make it anew out of a mask and its neighbours.
SECRETS = st.text(
    st.characters(exclude_characters="*\t\r\n", exclude_categories=("Cs", "Z")), min_size=8
)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch) -> None:
    monkeypatch.setattr(module, "_told", set())


@given(secret=SECRETS, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_secret_that_was_told_stands_in_no_text_in_any_form(secret, before, after) -> None:
    module._told.clear()
    remember(secret)
    for text in (secret, json.dumps(secret), repr(secret), quote(secret, safe="")):
        shown = redact(f"{before}{text}{after}")
        assert secret not in shown
        assert MASK in shown


@given(st.text())
def test_what_holds_no_secret_stays_as_it_is(text) -> None:
    assert mask_known(text) == text


@given(st.text(alphabet="-=:/@ tokenBearer?&_T1234567890", max_size=80))
def test_redacting_twice_is_redacting_once(text) -> None:
    assert redact(redact(text)) == redact(text)


def test_a_secret_that_was_cut_short_is_masked_to_its_last_character() -> None:
    remember(SECRET)

    assert redact(f"'{SECRET[:20]}...' is wrong") == "'***...' is wrong"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:p@ss@host/a", "s3://***@host/a"),
        ("https://host/a?b=1", "https://host/a?b=1"),
        ("file:///runs/checkpoint-7@exp", "file:///runs/checkpoint-7@exp"),
        ("Invalid header value b'Bearer abcdefgh\\n'", "Invalid header value b'Bearer ***\\n'"),
        ("train.py --hub_token abcdefgh -n 2", "train.py --hub_token *** -n 2"),
        ("train.py --api-key='abcdefgh' -n 2", "train.py --api-key='***' -n 2"),
        ("['train.py', '--token', 'abcdefgh']", "['train.py', '--token', '***']"),
        ("HF_TOKEN=abcdefgh train.py", "HF_TOKEN=*** train.py"),
        ("AWS_SECRET_ACCESS_KEY=abcdefgh", "AWS_SECRET_ACCESS_KEY=***"),
        ("https://host/a?access_token=abcdefgh&b=1", "https://host/a?access_token=***&b=1"),
        ("--num-tokens 123456789 --tokenizer google/byt5", None),
        ("pad_token=123456789, tokens: 123456789", None),
        ("--token-stdin --tokens 123456789", None),
        ("Option '--token' requires an argument.", None),
    ],
)
def test_a_secret_is_known_by_its_place(text, shown) -> None:
    assert redact(text) == (text if shown is None else shown)


def test_the_words_of_this_process_tell_their_secrets(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--hf-token", SECRET, f"--password={SECRET[::-1]}"])

    assert redact(f"a {SECRET} b {SECRET[::-1]}") == "a *** b ***"
    assert list(secrets_in(["--token", "--json", "--secret"])) == []


def test_long_texts_take_as_long_as_they_are(monkeypatch) -> None:
    """Each of these would take hours, were a pattern quadratic."""
    for part in ("-", "--", "://", "A_", "Bearer ", "--token ", "?a_token=", "TOKEN="):
        redact(part * (2_000_000 // len(part)))


def test_trees_are_redacted_to_their_leaves() -> None:
    remember(SECRET)

    found = redact_all({"a": [SECRET, (1, {SECRET: None})], "b": 1.5})

    assert found == {"a": [MASK, (1, {MASK: None})], "b": 1.5}


def test_no_error_carries_a_secret_in_text_facts_or_attributes() -> None:
    remember(SECRET)

    error = ConfigError(field="x", why=f"is {SECRET}", help=f"not {SECRET}")
    aborted = SaveAbortedError(phase="write", failures={3: f"https://me:{SECRET}@host is down"})
    corrupt = DigestMismatchError(path=SECRET, expected="a", found="b")

    for one in (error, aborted, corrupt):
        assert SECRET not in f"{one} {one!r} {one.args} {one.to_document()} {vars(one)}"
    assert aborted.failures == {3: "https://***@host is down"}
    assert (corrupt.expected, corrupt.found) == ("a", "b")
