"""Does input keep up? Rows per second and core that the pipeline makes, against what the tiny model takes; preparation
of text against the bare `tokenizers` library.

    python -m benchmarks.input
    python -m benchmarks.input --corpus=corpus.txt --vocabulary=vocab.txt --config.train.batch_size=64

Model, batch and length are those of `configs/nezha.py:pretrain,size=tiny`, and `--config.…` sets any of its values.
Figures are medians, by the processor time of all threads: on a machine that others use as well, the clock would
measure them, too. What the model takes is counted as if it used all cores without loss, which is in its favour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import tokenizers

import train
from benchmarks.report import surroundings, table
from zoo.command_line import Parser, run_main, split_overrides
from zoo.config import load_config, plain
from zoo.data import registry as sources
from zoo.data.chinese_words import ChineseWords
from zoo.data.pipeline import Pipeline
from zoo.data.store import BATCH_CHARACTERS, prepare
from zoo.data.tokenizer import Tokenizer
from zoo.data.tokenizers import load_tokenizer
from zoo.run import Parts, assemble
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.sharding import put_batch

CONFIG = "configs/nezha.py:pretrain,size=tiny"
BUILTIN_VOCABULARY = 8192
GOAL = 10
RUN_AHEAD = 0.5  # seconds in which the pipeline's threads fill their buffer, as full before a measurement as after it


def main(argv: list[str]) -> None:
    """Prints the two tables."""
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="benchmarks.input", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", help="text file, a sentence a line, an empty line between documents; default: built-in text"
    )
    parser.add_argument("--vocabulary", help="vocab.txt of a WordPiece; default: one learnt from the text")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of which the median counts")
    parser.add_argument("--batches", type=int, default=40, help="batches in one measurement of the pipeline")
    flags = parser.read(arguments)
    logging.disable(logging.INFO)
    config = load_config(CONFIG, overrides)
    with config.unlocked():
        config.tokenizer.path = flags.vocabulary
        config.tokenizer.size = BUILTIN_VOCABULARY
        if flags.corpus is None:
            config.data = dict(name="builtin")  # its documents are too short for sentence pairs
            kept = {key: config.task[key] for key in ("max_length", "rate", "max_predictions", "whole_word")}
            config.task = dict(name="masked_lm", **kept)
            config.model.pooler = False
        else:
            config.data.train = (flags.corpus,)
    with tempfile.TemporaryDirectory() as workdir:
        parts = assemble(config, Path(workdir))
        rows = row_rates(parts, Path(workdir), flags.repeats, flags.batches)
        text = preparation_rates(parts, Path(workdir), flags.repeats)
    cores = len(os.sched_getaffinity(0))
    taken = rows["model"] * cores
    where = "the built-in text" if flags.corpus is None else Path(flags.corpus).name
    length = f"{parts.task.max_length} tokens"
    print(f"Rows of {length} from {where}, whole words masked; goal: {GOAL} times what the model takes.\n")
    columns = ("what", "rows/s", "÷ the model")
    lines = [(f"model, all {cores} cores", taken, 1.0)]
    lines += [(f"input, one core: {name}", rate, rate / taken) for name, rate in rows.items() if name != "model"]
    print(table(columns, lines))
    print(f"\nPreparation of {where} by a WordPiece of {parts.tokenizer.vocabulary.size} pieces, per core.\n")
    peer = text["tokenizers alone"]
    print(table(("what", "MB/s", "÷ tokenizers alone"), [(name, rate, rate / peer) for name, rate in text.items()]))
    print("\n" + surroundings("jax", "numpy", "grain", "tokenizers", "jieba"))


def row_rates(parts: Parts, workdir: Path, repeats: int, batches: int) -> dict[str, float]:
    """Rows per second of processor time: "model", the trainer's own step; and the pipeline of each task, by its name."""
    trainer = train.with_compiled_steps(train.build_trainer(parts, workdir)._replace(dev=None), 0)
    stage = trainer.stages[0]
    own = parts.task
    packed = MaskedLM(
        max_length=own.max_length, rate=own.rate, max_predictions=own.max_predictions, whole_word=own.whole_word
    )
    pipelines = {own.name: stage.pipeline}
    if not isinstance(own, MaskedLM):
        pipelines[packed.name] = _pipeline(dataclasses.replace(parts, task=packed), workdir)
    rows = parts.config.train.batch_size
    state, batch = train.initial(trainer), put_batch(stage.pipeline.batch(0), trainer.mesh)
    found: dict[str, list[float]] = {"model": [], **{name: [] for name in pipelines}}
    state = jax.block_until_ready(stage.train_step(state, batch)[0])
    for _ in range(repeats):
        begin = time.process_time()
        state = jax.block_until_ready(stage.train_step(state, batch)[0])
        found["model"].append(rows / (time.process_time() - begin))
        for name, pipeline in pipelines.items():
            found[name].append(rows * batches / _seconds_of(pipeline, batches))
    return {name: statistics.median(values) for name, values in found.items()}


def _pipeline(parts: Parts, workdir: Path) -> Pipeline:
    examples = parts.examples("train", workdir)
    return Pipeline(examples, parts.features, seed=parts.config.seed, batch_size=parts.config.train.batch_size)


def _seconds_of(pipeline: Pipeline, batches: int) -> float:
    """Processor time of all threads in which the trainer's iterator brings so many batches, its start not counted."""
    with contextlib.closing(pipeline.iterate(0)) as iterator:
        next(iterator)
        time.sleep(RUN_AHEAD)
        begin = time.process_time()
        for _ in range(batches):
            next(iterator)
        time.sleep(RUN_AHEAD)
        return time.process_time() - begin


def preparation_rates(parts: Parts, workdir: Path, repeats: int) -> dict[str, float]:
    """MB of text (UTF-8) per second of processor time, by what is done with it."""
    source = sources.build(plain(parts.config.data))
    texts = [record.fields["text"] for record in source.records("train")]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    path = workdir / "vocabulary"
    parts.tokenizer.save(path)
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece.from_file(str(path / "vocab.txt"), unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer()
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def prepared(tokenizer: Tokenizer) -> Callable[[], None]:
        def call() -> None:
            with tempfile.TemporaryDirectory() as directory:
                prepare(source, "train", tokenizer, directory)

        return call

    def alone() -> None:
        for some in _in_batches(texts):
            library.encode_batch_fast(some, add_special_tokens=False)

    words = ChineseWords()

    def segmented() -> None:
        for text in texts:
            words.word_of_character(text)

    calls = {
        "tokenizers alone": alone,
        "prepared store": prepared(load_tokenizer(path, chinese_words=False)),
        "jieba alone": segmented,
        "prepared store with Chinese words by jieba": prepared(load_tokenizer(path, chinese_words=True)),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            found[name].append(megabytes / (time.process_time() - begin))
    return {name: statistics.median(values) for name, values in found.items()}


def _in_batches(texts: list[str]) -> Iterator[list[str]]:
    held: list[str] = []
    for text in texts:
        held.append(text)
        if sum(map(len, held)) >= BATCH_CHARACTERS:
            yield held
            held = []
    if held:
        yield held


if __name__ == "__main__":
    sys.exit(run_main(main))
