"""Sources: what their records are, and what each says of bad rows."""

import logging

import pytest

from zoo import data
from zoo.data.source import BadRows
from zoo.errors import UserError


def source(tmp_path, content, name, *, file="a.txt", **options):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.registry.build({"name": name, "train": (str(path),), **options})


def fields(built):
    return [record.fields for record in built.records("train")]


def lines(built):
    return [record.line for record in built.records("train")]


def test_names():
    assert set(data.names()) >= {"text", "tsv", "csv", "jsonl", "conll", "builtin"}


TEXT = "a b\nc\n \n\nd\n"


@pytest.mark.parametrize(
    "documents, expected",
    [
        ("line", [(1, "a b"), (2, "c"), (5, "d")]),
        ("blank_line", [(1, "a b\nc"), (5, "d")]),
        ("file", [(1, "a b\nc\n \n\nd")]),
    ],
)
def test_text_documents(tmp_path, documents, expected):
    built = source(tmp_path, TEXT, "text", documents=documents)
    assert [(r.line, r.fields["text"]) for r in built.records("train")] == expected


def test_text_document_too_long(tmp_path):
    built = source(tmp_path, "abc\nabc\n\nok\n", "text", documents="blank_line", max_document_length=6)
    with pytest.raises(UserError, match=r"a\.txt:1: the document has more than 6 characters"):
        fields(built)
    built = source(
        tmp_path, "abc\nabc\n\nok\n", "text", documents="blank_line", max_document_length=6, on_bad_row="skip"
    )
    assert fields(built) == [{"text": "ok"}]


def test_tsv_keeps_quotes_and_odd_line_ends(tmp_path):
    built = source(tmp_path, 'say "hi\tyou\u2028too\t1\na\tb"\t0\n', "tsv", text=0, text_pair=1, label=2)
    assert fields(built) == [
        {"text": 'say "hi', "text_pair": "you\u2028too", "label": "1"},
        {"text": "a", "text_pair": 'b"', "label": "0"},
    ]


def test_header_names_columns(tmp_path):
    built = source(tmp_path, "label\ttext_a\n1\tgood\n", "tsv", header=True, text="text_a", label="label")
    assert fields(built) == [{"text": "good", "label": "1"}] and lines(built) == [2]
    built = source(tmp_path, "label\ttext_a\n1\tgood\n", "tsv", header=True, text="text_b")
    with pytest.raises(UserError, match=r"a\.txt:1: text='text_b' is not in the header; did you mean 'text_a'"):
        fields(built)
    with pytest.raises(UserError, match="needs header=True"):
        source(tmp_path, "x\n", "tsv", text="text_a")


def test_negative_and_absent_columns(tmp_path):
    built = source(tmp_path, "x\ty\tz\n", "tsv", text=-1)
    assert fields(built) == [{"text": "z"}]
    built = source(tmp_path, "x\ty\tz\n", "tsv", label=3)
    with pytest.raises(UserError, match=r"a\.txt:1: label is column 3, but the line has 3 columns"):
        fields(built)


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("tsv", "a\t1\nb\n", {"label": 1}, "a.txt:2: 1 column where the first line of the file has 2"),
        ("tsv", "a\t1\nb\t1\t1\n", {"label": 1}, "a.txt:2: 3 columns where the first line of the file has 2"),
        ("tsv", b"a\t1\n\xff\t1\n", {"label": 1}, "a.txt:2: byte 1 of the line (0xff) is not UTF-8; save the file"),
        ("tsv", b"a\t1\n" + b"x" * 10_000_000, {}, "a.txt:2: the line has more than 1,048,576 characters"),
        ("csv", 'a,1\n"b,1\n', {}, "a.txt:2: malformed CSV: unexpected end of data; is a quote never closed?"),
        ("csv", 'a,1\n"b"x,1\n', {}, "a.txt:2: malformed CSV"),
        ("csv", "a,1\nb\n", {}, "a.txt:2: 1 column where the first line of the file has 2"),
        ("jsonl", '{"text": "a"}\n{"text": \n', {}, "a.txt:2: malformed JSON at character 10"),
        ("jsonl", '{"text": "a"}\n["a"]\n', {}, "a.txt:2: expected a JSON object"),
        ("jsonl", '{"text": "a"}\n{"txt": "a"}\n', {}, "a.txt:2: no key 'text'; did you mean 'txt'"),
        ("jsonl", '{"text": "a"}\n{"text": 5}\n', {}, "a.txt:2: key 'text' holds \"5\", not a string"),
        ("jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", {}, "a.txt:2: malformed JSON: nested too deeply"),
        ("conll", "a O\nb\n", {}, "a.txt:2: 1 column (' ' between columns): the word 'b' has no tag"),
        ("conll", "a O\nb x O\n", {}, "a.txt:2: 3 columns (' ' between columns) where the first line of the file has"),
        ("conll", "a O\nb \n", {}, "a.txt:2: the tag is empty"),
        ("conll", b"a O\n\xe4 O\n", {}, "a.txt:2: byte 1 of the line (0xe4) is not UTF-8"),
        ("text", b"a\n\xe4\n", {}, "a.txt:2: byte 1 of the line (0xe4) is not UTF-8"),
    ],
)
def test_bad_rows_stop_or_are_counted(tmp_path, caplog, name, content, options, message):
    built = source(tmp_path, content, name, **options)
    with pytest.raises(UserError) as raised:
        fields(built)
    assert message in str(raised.value) and "on_bad_row='skip'" in str(raised.value)

    good = "good O\n" if name == "conll" else '{"text": "good"}\n' if name == "jsonl" else None
    start = (good + "\n").encode() if good else b""
    content = start + (content if isinstance(content, bytes) else content.encode())
    skipping = source(tmp_path, content, name, on_bad_row="skip", **options)
    bad = BadRows("skip")
    with caplog.at_level(logging.WARNING):
        kept = list(skipping.records("train", bad))
    assert bad.count == 1 and len(bad.shown) == 1
    assert len(kept) == 1 + (name == "jsonl")
    assert "skipped 1 bad rows" in caplog.text and "a.txt:" in caplog.text


def test_csv_quotes_and_line_numbers(tmp_path):
    content = 'text,label\n"a, ""b""\nc",1\n\nd,0\n'
    built = source(tmp_path, content, "csv", header=True, text="text", label="label")
    assert fields(built) == [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "0"}]
    assert lines(built) == [2, 5]


def test_csv_row_with_a_bad_line_inside_is_dropped_whole(tmp_path):
    content = b'"a\n\xff\nb",1\nc,0\n'
    built = source(tmp_path, content, "csv", on_bad_row="skip")
    assert [(r.line, dict(r.fields)) for r in built.records("train")] == [(4, {"text": "c"})]


def test_jsonl_labels_as_spelled(tmp_path):
    rows = '{"s": "x", "p": "y", "l": 1}\n\n{"s": "x", "p": "y", "l": 5.000}\n{"s": "x", "p": "y", "l": true}\n'
    built = source(tmp_path, rows, "jsonl", text="s", text_pair="p", label="l")
    assert [f["label"] for f in fields(built)] == ["1", "5.000", "true"] and lines(built) == [1, 3, 4]
    assert fields(built)[0] == {"text": "x", "text_pair": "y", "label": "1"}
    nothing = source(tmp_path, '{"s": "x", "l": null}\n', "jsonl", text="s", label="l")
    with pytest.raises(UserError, match="holds null, not a string, number or boolean"):
        fields(nothing)


def test_conll_words_may_be_white_space(tmp_path):
    built = source(tmp_path, "厦 B-LOC\n\u3000 O\n  O\n\n\n门 O\n", "conll")
    assert fields(built) == [
        {"words": ("厦", "\u3000", " "), "tags": ("B-LOC", "O", "O")},
        {"words": ("门",), "tags": ("O",)},
    ]
    assert lines(built) == [1, 6]


def test_conll_2003_and_other_columns(tmp_path):
    content = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"
    assert fields(source(tmp_path, content, "conll")) == [{"words": ("EU", "rejects"), "tags": ("B-ORG", "O")}]
    tabs = source(tmp_path, "1\tEU\tORG\n", "conll", separator="\t", word=1, tag=2)
    assert fields(tabs) == [{"words": ("EU",), "tags": ("ORG",)}]


def test_conll_bad_line_spoils_its_sentence_only(tmp_path):
    built = source(tmp_path, "a O\nb\nc\n\nd O\n", "conll", on_bad_row="skip")
    bad = BadRows("skip")
    assert [r.fields["words"] for r in built.records("train", bad)] == [("d",)] and bad.count == 1


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt: the file holds no rows"):
        fields(source(tmp_path, "\n\n", "text"))
    with pytest.raises(UserError, match=r"a\.txt: the file holds no rows"):
        fields(source(tmp_path, "text\tlabel\n", "tsv", header=True))
    with pytest.raises(UserError, match="no rows but 1 bad ones"):
        fields(source(tmp_path, b"\xff\n", "text", on_bad_row="skip"))


def test_splits(tmp_path):
    built = source(tmp_path, "x\n", "text")
    assert built.splits() == ("train",)
    with pytest.raises(UserError, match="no split 'dev'; known: train"):
        built.records("dev")
    with pytest.raises(UserError, match="no files at all"):
        data.registry.build("text").records("train")


def test_several_files_in_order(tmp_path):
    (tmp_path / "b").write_text("two\n")
    (tmp_path / "a").write_text("one\n")
    built = data.registry.build({"name": "text", "train": (str(tmp_path / "b"), str(tmp_path / "a"))})
    assert [r.fields["text"] for r in built.records("train")] == ["two", "one"]


def test_fingerprint_follows_content_and_reading_not_place(tmp_path):
    one = source(tmp_path, "x\ty\n", "tsv")
    moved = source(tmp_path, "x\ty\n", "tsv", file="b.txt")
    changed = source(tmp_path, "x\tz\n", "tsv", file="c.txt")
    read_otherwise = source(tmp_path, "x\ty\n", "tsv", file="b.txt", text=1)
    assert one.fingerprint() == moved.fingerprint()
    assert len({s.fingerprint() for s in (one, changed, read_otherwise)}) == 3


def test_texts_of_records():
    records = [
        data.Record({"text": "a", "text_pair": "b", "label": "1"}, "f", 1),
        data.Record({"words": ("c", "d"), "tags": ("O", "O")}, "f", 2),
    ]
    assert list(data.texts(records)) == ["a", "b", "c d"]
