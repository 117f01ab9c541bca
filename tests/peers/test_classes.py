"""Every class of every family: what the source library saves is loaded, and what we export has every tensor that it wants, and no other.

What is computed is compared in `test_checkpoints.py`; here nothing is compiled. Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import pytest

import zoo
from zoo.interop.architectures import ARCHITECTURES

transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

from tests.peers.checkpoints import CASES  # noqa: E402

pytestmark = pytest.mark.peers

CLASSES = [
    (case, name)
    for case in CASES
    if "," not in case
    for name in ARCHITECTURES[getattr(transformers, CASES[case].config).model_type].classes
    if hasattr(transformers, name)
]


@pytest.mark.parametrize(("case", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_names_of_tensors(case, name, tmp_path):
    theirs = getattr(transformers, name)
    theirs(getattr(transformers, CASES[case].config)(**CASES[case].sizes)).save_pretrained(tmp_path / "theirs")
    ours = zoo.load_pretrained(tmp_path / "theirs")
    exported = zoo.export(ours, tmp_path / "ours")
    _, report = theirs.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
