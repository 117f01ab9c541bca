"""WordPiece over jieba's words against transformers' RoFormerTokenizer, with jieba in the place of its port to Rust.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import random
import sys
import types

import jieba
import pytest

from zoo.data.jieba_wordpiece import jieba_wordpiece

transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

pytestmark = pytest.mark.peers

WORDS = [
    "今天",
    "天气",
    "非常",
    "好",
    "我们",
    "去",
    "公园",
    "玩",
    "位置",
    "编码",
    "模型",
    "北京大学",
    "的",
    "了",
    ",",
    "。",
    "!",
    "(",
    ")",
    "model",
    "2021",
    "U.S.",
    "naïve\t",
    "café",
    "ｆｕｌｌ",
    "龘",
    "𠀀",
    "-",
    "don't",
    "a_b",
]


def test_ids(monkeypatch):
    def tokenize(text: str, hmm: bool) -> list[tuple[str, int, int]]:
        return [tuple(found) for found in jieba.tokenize(text, HMM=hmm)]

    monkeypatch.setitem(sys.modules, "rjieba", types.SimpleNamespace(tokenize=tokenize))
    letters = sorted({c for word in WORDS for c in word.lower() if not c.isspace()} - {"龘"})
    pieces = [
        *letters,
        *(f"##{c}" for c in letters),
        "天气",
        "非常",
        "我们",
        "北京大学",
        "位置",
        "model",
        "##del",
        "202",
    ]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
    ours = jieba_wordpiece(tokens, lowercase=True, chinese_words=False, where="test")
    theirs = transformers.RoFormerTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(WORDS) + draw.choice(("", "", " ")) for _ in range(draw.randrange(12)))
        assert ours.encode(text).ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
