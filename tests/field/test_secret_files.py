"""A key or password means the same whatever editor or shell wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moorline.settings import SettingsError, load_settings

KEY = "hunter2 é-hunter2"
SECRETS = ("serving.api_key", "stream.sasl_password")


def variable_of(name: str) -> str:
    return "MOORLINE_" + name.upper().replace(".", "__")


def loaded(name: str, environment: dict[str, str]) -> str:
    section, field = name.split(".")
    secret = getattr(getattr(load_settings(environment=environment), section), field)
    return str(secret.get_secret_value())


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r", "\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_an_editor_adds_is_no_part_of_a_secret(
    tmp_path: Path, name: str, end: str, mark: str
) -> None:
    path = tmp_path / "key"
    path.write_bytes(f"{mark}{KEY}{end}".encode())
    assert loaded(name, {variable_of(name) + "_FILE": str(path)}) == KEY
    assert loaded(name, {variable_of(name): f"{mark}{KEY}{end}"}) == KEY  # KEY=$(cat key)


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("\r\n", "empty"),
        ("hunter2\nhunter3\n", "one line"),
        (" hunter2", "blanks"),
        ("hunter2 \r\n", "blanks"),
        ("hunter2\x00", "control"),
        ("hunter2\u200b\n", "control"),
    ],
)
def test_what_can_be_no_secret_is_said_at_start_without_showing_it(
    tmp_path: Path, name: str, text: str, why: str
) -> None:
    path = tmp_path / "key"
    path.write_bytes(text.encode())
    with pytest.raises(SettingsError, match=why) as raised:
        load_settings(environment={variable_of(name) + "_FILE": str(path)})
    assert "hunter" not in str(raised.value)
    assert name in str(raised.value)


def test_a_secret_in_utf_16_is_said_at_start(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes("hunter2".encode("utf-16"))
    with pytest.raises(SettingsError, match="not UTF-8 text"):
        load_settings(environment={"MOORLINE_SERVING__API_KEY_FILE": str(path)})
