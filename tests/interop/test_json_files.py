"""JSON of strangers: read within a limit, each key once, and refused in words that name the file."""

from __future__ import annotations

import pytest

from zoo.errors import UserError
from zoo.interop.json_files import LARGEST, read_json


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{\n"a": 1\n"b": 2}', "not JSON: .* in line 3"),
        (b"[1]", "must hold a JSON object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands there twice"),
        # Looking for each among all would take an hour.
        (b"{" + b"".join(b'"%d":0,' % i for i in range(100_000)) + b'"99999":0}', "the key '99999' stands there twice"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300"),
    ],
    ids=["utf-8", "json", "kind", "depth", "twice", "many keys", "digits"],
)
def test_what_is_refused(tmp_path, data, message):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        read_json(path, dict)
    assert str(refused.value).startswith(str(path))


def test_what_is_not_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "config.json", dict)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match="has 8,388,609 bytes; at most 8,388,608 are read"):
        read_json(tmp_path / "config.json", dict)
    (tmp_path / "config.json").write_bytes('{"é": [1]}'.encode())
    assert read_json(tmp_path / "config.json", dict) == {"é": [1]}
