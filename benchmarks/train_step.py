"""How fast is a step of masked-LM training beside BERT of transformers in PyTorch, of one size, on the same batch?

    make venv-peers
    .venv/bin/python -m benchmarks.train_step                     # 256 wide, 4 layers
    .venv/bin/python -m benchmarks.train_step --size=tiny
    .venv/bin/python -m benchmarks.train_step --encoding=nezha    # beside our BERT: what relative positions cost

A step is all of training: forward and backward in float32 with dropout 0.1, gradients clipped to a norm of 1, AdamW. Ours is the
compiled update of train.py. The peer has scaled-dot-product attention without a mask, fused AdamW and a thread for each core; "as it
comes" is `BertForMaskedLM(labels=…)`, which computes logits at every position, "masked positions" hands its head those alone, as ours.
Steps are taken in turn, so that what disturbs one disturbs all; a ratio is the median of the rounds' ratios. Beside the clock stands the
processor time of all threads, which others on the machine disturb less; threads that wait for each other spend it, too, so on a busy
machine give the benchmark one core (`taskset -c 0`).
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.report import surroundings, table
from benchmarks.training import LEARNING_RATE, Training, random_batch
from zoo.command_line import Parser, run_main
from zoo.errors import UserError
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.host_memory import keep_freed_memory

Step = Callable[[], None]
GOAL = 0.9


@dataclass(frozen=True)
class Size:
    """Width D and layers L of the model (heads of 64, feed-forward 4 · D), vocabulary V, batch B and length T."""

    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    heads: int | None = None

    @property
    def num_heads(self) -> int:
        return self.heads or self.width // 64


SIZES = {
    "small": Size(width=256, layers=4, vocabulary=8192, batch=32, length=128),
    "tiny": Size(width=128, layers=2, vocabulary=21128, batch=64, length=128),
    "test": Size(width=16, layers=2, vocabulary=50, batch=8, length=8, heads=2),
}


def main(argv: list[str]) -> None:
    """Prints the table."""
    parser = Parser(prog="benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--encoding", default="learned", help="ours; another than learned is put beside our learned")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each, taken in turn")
    flags = parser.read(argv)
    size = SIZES[flags.size]
    keep_freed_memory()  # as train.py does; it is the process's, so that the peer has it as well
    batch = batch_of(size)
    if flags.encoding == "learned":
        makers = {
            "transformers, as it comes": functools.partial(their_step, size, batch, gathered=False),
            "transformers, masked positions": functools.partial(their_step, size, batch, gathered=True),
        }
        packages = ("jax", "flax", "torch", "transformers")
    else:
        makers = {"ours, learned": functools.partial(our_step, size, batch, "learned")}
        packages = ("jax", "flax")
    makers[f"ours, {flags.encoding}"] = functools.partial(our_step, size, batch, flags.encoding)
    measured = take_turns({name: make() for name, make in makers.items()}, flags.rounds)
    goal = f"; goal: at most {GOAL} of the peer as it comes" if flags.encoding == "learned" else ""
    print(
        f"A step of masked LM, {size.layers} layers of width {size.width}, vocabulary {size.vocabulary}, batch "
        f"{size.batch} × {size.length}, {flags.rounds} rounds{goal}.\n"
    )
    print(table(*rows_of(measured)))
    print("\n" + surroundings(*packages))


def rows_of(measured: Mapping[str, list[tuple[float, float]]]) -> tuple[tuple[str, ...], list[tuple]]:
    """Columns and rows: by the clock and by the processor, milliseconds with quartiles, and the ratio to each peer."""
    peers = list(measured)[:-1]
    columns = ["what"]
    for measure in ("clock", "processor"):
        columns += [f"{measure}, ms", "quartiles", *(f"÷ {peer.rpartition(', ')[2]}" for peer in peers)]
    rows = []
    for name, steps in measured.items():
        row = [name]
        for measure in (0, 1):
            times = [step[measure] for step in steps]
            low, middle, high = statistics.quantiles(times, n=4)
            row += [1e3 * middle, f"{1e3 * low:.0f} … {1e3 * high:.0f}"]
            row += [
                statistics.median(a / b[measure] for a, b in zip(times, measured[peer], strict=True)) for peer in peers
            ]
        rows.append(tuple(row))
    return tuple(columns), rows


def take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds by the clock, seconds of processor time of all threads) of each step in each round.

    Raises:
      UserError: fewer than two rounds, which have no quartiles.
    """
    if rounds < 2:
        raise UserError(f"--rounds={rounds}: at least 2 are needed")
    measured = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(2):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # what the last one left in the caches, and its threads that still wait, is not this one's cost
            clock, processor = time.perf_counter(), time.process_time()
            step()
            measured[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return measured


def batch_of(size: Size) -> dict[str, np.ndarray]:
    return random_batch(MaskedLM(max_length=size.length), size.vocabulary, size.batch)


def our_step(size: Size, batch: Mapping[str, np.ndarray], encoding: str) -> Step:
    """train.py's update of a model with `encoding`, compiled."""
    config = {
        "model": {
            "vocab_size": size.vocabulary,
            "model_dim": size.width,
            "num_heads": size.num_heads,
            "num_layers": size.layers,
            "max_length": size.length,
            "pooler": False,
            "unroll": size.layers,
        },
        "encoding": {"name": encoding},
        "mixer": {"name": "softmax"},
        "feed_forward": {"name": "gelu"},
        "norm": {"name": "layernorm"},
    }
    training = Training.of(config, MaskedLM(max_length=size.length), "adamw")
    state, update = training.fresh(), training.compiled(training.put(batch))

    def step() -> None:
        nonlocal state
        state, metrics = update(state, training.put(batch))
        if not metrics["finite"]:
            raise RuntimeError("our step is not finite")

    return step


def their_step(size: Size, batch: Mapping[str, np.ndarray], *, gathered: bool) -> Step:
    """The same of transformers' BERT; `gathered`: the head sees the masked positions alone.

    Raises:
      UserError: the extra `peers` is not installed.
    """
    try:
        import torch
        from transformers import BertConfig, BertForMaskedLM
    except ImportError as error:
        raise UserError(f"the peer is not installed ({error}): make venv-peers") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.length,
        attn_implementation="sdpa",
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    at_every = np.full(batch["input_ids"].shape, -100)
    np.put_along_axis(at_every, batch["masked_positions"], batch["masked_labels"], axis=1)
    ids, at_every, positions, labels = (
        torch.tensor(array, dtype=torch.long)
        for array in (batch["input_ids"], at_every, batch["masked_positions"], batch["masked_labels"])
    )
    row = torch.arange(size.batch)[:, None]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if gathered:
            logits = model.cls(model.bert(input_ids=ids).last_hidden_state[row, positions])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            loss = model(input_ids=ids, labels=at_every).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not torch.isfinite(loss.detach()):
            raise RuntimeError("the peer's step is not finite")

    return step


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
