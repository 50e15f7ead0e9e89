"""A pseudonym key means the same whatever editor or shell wrote it, and what is none is said."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from moorline.pseudonyms import PseudonymKeyInvalid, Pseudonyms

TEXT = "0123456789abcdef" * 4


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("text", [TEXT, TEXT[:33]])
def test_what_an_editor_adds_is_no_part_of_a_key(
    tmp_path: Path, mark: bytes, text: str, end: bytes
) -> None:
    plain = Pseudonyms.read(written(tmp_path / "plain", text.encode()))
    edited = Pseudonyms.read(written(tmp_path / "edited", mark + text.encode() + end))
    assert edited.fingerprint == plain.fingerprint
    assert edited.pseudonym_of("ana") == plain.pseudonym_of("ana")


@pytest.mark.parametrize("last", [b"\n", b"\r", b"\x00", b" "])
def test_the_bytes_of_a_key_that_moorline_made_are_kept_as_they_are(
    tmp_path: Path, last: bytes
) -> None:
    content = secrets.token_bytes(31) + last
    key = Pseudonyms.read(written(tmp_path / "pseudonym.key", content))
    assert key.pseudonym_of("ana") == Pseudonyms(content).pseudonym_of("ana")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"short",
        TEXT[:31].encode(),
        TEXT.encode() + b"0",
        b"\xff" * 33,
        f"{TEXT[:40]}\n{TEXT[:40]}".encode(),
        f" {TEXT[:40]}".encode(),
        f"{TEXT[:40]} \n".encode(),
        TEXT[:40].encode("utf-16"),
        b"\x00" * 10_000,
    ],
)
def test_what_is_no_key_is_said_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "key", content)
    with pytest.raises(PseudonymKeyInvalid, match="must be 32 bytes, or one line") as raised:
        Pseudonyms.read(path)
    assert str(path) in str(raised.value)
    assert "0123" not in str(raised.value)
    with pytest.raises(PseudonymKeyInvalid):
        Pseudonyms.from_file(path)
    assert path.read_bytes() == content


def test_a_key_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(PseudonymKeyInvalid, match="cannot be read"):
            Pseudonyms.read(path)
    if os.geteuid() != 0:  # whom every file is open to
        closed = written(tmp_path / "closed", TEXT.encode())
        closed.chmod(0)
        with pytest.raises(PseudonymKeyInvalid, match="Permission denied"):
            Pseudonyms.read(closed)


def test_a_fingerprint_names_the_key_and_is_nobodys_pseudonym() -> None:
    first, second = Pseudonyms(b"k" * 32), Pseudonyms(b"l" * 32)
    assert first.fingerprint == Pseudonyms(b"k" * 32).fingerprint != second.fingerprint
    assert len(first.fingerprint) == 16
    assert not first.pseudonym_of("moorline").startswith(first.fingerprint)
