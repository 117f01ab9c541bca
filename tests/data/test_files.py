"""Lines of files: where they end, what is refused, and that little is held."""

import gzip
import lzma
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import files
from zoo.data.files import Line, content_hash, read_lines
from zoo.errors import UserError


def written(path, content: bytes):
    path.write_bytes(content)
    return str(path)


def texts(path, **limits):
    return [(line.number, line.text) for line in read_lines(path, **limits)]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]), max_size=8)),
    chunk=st.integers(1, 9),
    last_end=st.booleans(),
)
def test_lines_survive_any_chunking(tmp_path_factory, lines, chunk, last_end):
    content = "".join(line + "\n" for line in lines)
    if not last_end and lines and lines[-1]:
        content = content[:-1]
    if not content:
        return
    path = written(tmp_path_factory.mktemp("lines") / "a", content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        assert texts(path) == list(enumerate(lines, 1))


def test_only_line_feeds_end_lines(tmp_path):
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    assert texts(written(tmp_path / "a", f"{inside}\nnext\r\n".encode())) == [(1, inside), (2, "next")]


def test_byte_order_mark_is_taken_off_the_first_line_alone(tmp_path):
    assert texts(written(tmp_path / "a", "\ufeffone\n\ufefftwo\n".encode())) == [(1, "one"), (2, "\ufefftwo")]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files_also_of_several_streams(tmp_path, suffix, pack):
    content = "".join(f"line {k} 数学\n" for k in range(60_000)).encode()
    path = written(tmp_path / f"a{suffix}", pack(content[:1000]) + pack(content[1000:]))
    assert "".join(line.text + "\n" for line in read_lines(path)).encode() == content


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_packed_files_are_named(tmp_path, suffix, pack, damage):
    whole = pack(b"".join(b"%d\n" % (k * k) for k in range(20_000)))
    middle = len(whole) // 2
    content = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :],
        "other": b"this is no packed file\n",
    }[damage]
    path = written(tmp_path / f"a{suffix}", content)
    with pytest.raises(UserError, match=rf"a\{suffix}: the packed file is damaged or cut short"):
        texts(path)


def test_missing_empty_folder_and_near_names(tmp_path):
    (tmp_path / "train.tsv").write_text("x\n")
    with pytest.raises(UserError, match=r"trian\.tsv: no such file; did you mean 'train\.tsv'"):
        texts(str(tmp_path / "trian.tsv"))
    with pytest.raises(UserError, match="there is no folder"):
        texts(str(tmp_path / "none" / "a"))
    with pytest.raises(UserError, match="cannot be read"):
        texts(str(tmp_path))
    with pytest.raises(UserError, match="the file is empty"):
        texts(written(tmp_path / "empty", b""))
    with pytest.raises(UserError, match="the file is empty"):
        texts(written(tmp_path / "empty.xz", lzma.compress(b"")))


def test_invalid_utf8_names_line_and_byte(tmp_path):
    found = list(read_lines(written(tmp_path / "a", b"good\nab\xff\nagain\n")))
    assert found[0] == Line(1, "good") and found[2] == Line(3, "again")
    assert found[1].text is None and found[1].problem.startswith("byte 3 of the line (0xff) is not UTF-8")


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_ten_megabyte_line_is_refused_without_being_held(tmp_path, end):
    path = written(tmp_path / "a", b"first\n" + b"x" * 10_000_000 + end + (b"third\n" if end else b""))
    tracemalloc.start()
    found = list(read_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == Line(1, "first") and found[2:] == ([Line(3, "third")] if end else [])
    assert found[1].number == 2 and found[1].problem.startswith("the line has more than 1,048,576 characters")
    assert peak < 16_000_000 - 1_000_000  # a few chunks beyond four times the limit, not the line and its copies


def test_line_length_counts_characters(tmp_path):
    path = written(tmp_path / "a", "数学数学\n数学数学数\n".encode())
    assert [line.problem is None for line in read_lines(path, max_line_length=4)] == [True, False]


def test_unpacked_size_is_limited(tmp_path):
    bomb = written(tmp_path / "a.xz", lzma.compress(b"0\n" * 2_000_000))
    with pytest.raises(UserError, match=r"a\.xz: unpacks to more than 1,000,000 bytes; raise max_bytes"):
        for _ in read_lines(bomb, max_bytes=1_000_000):
            pass


def test_content_hash_is_of_the_bytes(tmp_path):
    one, two = written(tmp_path / "a", b"x"), written(tmp_path / "b", b"y")
    assert content_hash(one) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert content_hash(one) != content_hash(two)
