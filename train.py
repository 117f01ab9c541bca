"""Pretrains and fine-tunes: config → data → model → step → loop.

    python train.py --config=configs/nezha.py:pretrain --workdir=runs/pretrain
    python train.py --config=configs/nezha.py:lcqmc --workdir=runs/lcqmc --config.init_from=runs/pretrain

The same command resumes a run that was stopped, byte for byte, and exits with 0 when the run is finished. Start-up order:
this run's newest checkpoint, else `config.init_from`, else from scratch. Exit codes: 0 finished, 2 something given is
wrong, 3 the loss is not finite, 4 something could not be written (disk full, folder read-only), 69 another process of the
run is lost, 75 asked to stop (SIGTERM) and saved.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from zoo.command_line import Parser, outcome, run_main, split_overrides
from zoo.config import load_config
from zoo.data.pipeline import Batch, Pipeline, evaluation_batches
from zoo.errors import RunStopped, UserError
from zoo.models.parameters import has_layer_axis
from zoo.registry import make
from zoo.run import (
    CHECKPOINTS,
    Parts,
    assemble,
    check_same_data,
    check_workdir,
    load_parameters,
    process_settings,
    save_run,
    without_processes,
)
from zoo.training.checkpoints import Checkpoints
from zoo.training.flops import FORWARD_AND_BACKWARD, forward_flops, peak_flops
from zoo.training.host_memory import keep_freed_memory
from zoo.training.keys import key_for
from zoo.training.optimizer import registry as optimizers
from zoo.training.orbax_errors import say_errors_once
from zoo.training.pace import Pace
from zoo.training.plots import plot_curves
from zoo.training.processes import Processes, joined
from zoo.training.program_memory import program_bytes
from zoo.training.progress import Progress
from zoo.training.records import METRICS, Records, read_records
from zoo.training.schedules import registry as schedules
from zoo.training.settings import MeshSettings, RunSettings
from zoo.training.sharding import (
    batch_part,
    make_mesh,
    parameter_shardings,
    put_batch,
    replicated,
    state_shardings,
    with_shardings,
)
from zoo.training.signals import STOPPED_EXIT_CODE, StopRequested, sigterm_exits
from zoo.training.stages import Stage
from zoo.training.step import TrainState, initial_state, make_eval_step, make_train_step

logger = logging.getLogger("train")

NONFINITE_EXIT_CODE = 3
# The device may run this many steps ahead of the host; further ahead, queued batches would only take memory.
STEPS_AHEAD = 2


class NotFinite(RunStopped):
    """The loss, a gradient or an update of a step was not finite and the policy is to stop."""

    exit_code = NONFINITE_EXIT_CODE


class Stopped(RunStopped):
    """The run was asked to stop; it has saved and can be resumed."""

    exit_code = STOPPED_EXIT_CODE


class Evaluation(NamedTuple):
    """What scoring needs: the compiled step, how it takes the parameters, and the size of its batches."""

    parts: Parts
    mesh: Mesh
    shardings: Any
    batch_size: int
    step: Any


class StageTrainer(NamedTuple):
    """One stage of a run, which for most runs is all of it: its task and model, its batches, its update."""

    parts: Parts
    last_step: int
    pipeline: Pipeline
    train_step: Any
    flops_per_step: float

    @property
    def tokens_per_step(self) -> int:
        return self.pipeline.batch_size * self.parts.task.max_length


class Trainer(NamedTuple):
    """Everything the loop needs, compiled or ready to compile. It is scored on `parts.task` throughout, whatever the stage."""

    parts: Parts
    settings: RunSettings
    mesh: Mesh
    stages: tuple[StageTrainer, ...]
    shapes: TrainState
    shardings: TrainState
    optimizer: optax.GradientTransformation
    evaluation: Evaluation
    dev: Sequence | None

    @property
    def total_steps(self) -> int:
        return self.stages[-1].last_step

    def batches(self, step: int) -> Iterator[tuple[StageTrainer, Batch]]:
        """The batches from `step` to the end, each with the stage it belongs to; close it to stop the threads."""
        for stage in self.stages:
            if step < stage.last_step:
                with contextlib.closing(stage.pipeline.iterate(step)) as batches:
                    yield from ((stage, batch) for _, batch in itertools.islice(batches, stage.last_step - step))
                step = stage.last_step

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index) of each example in batch `step`."""
        return next(stage for stage in self.stages if step < stage.last_step).pipeline.locate(step)


def main(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="path.py or path.py:task,key=value")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run; made if missing")
    flags = parser.read(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    say_errors_once()
    with sigterm_exits():
        config = load_config(flags.config, overrides)
        with joined(process_settings(config), outcome) as processes:
            if not processes.primary:
                logging.getLogger().setLevel(logging.ERROR)  # process 0 says it
            train(config, flags.workdir, processes)
    return 0


def train(config: ConfigDict, workdir: Path, processes: Processes | None = None) -> dict[str, float]:
    """Runs `config` in `workdir` to its end and returns the scores of the last evaluation.

    Raises:
      UserError: something in the config, the data or the folder is wrong; nothing was trained or overwritten.
      NotFinite, Stopped: see there; the same command goes on from the newest checkpoint.
      WriteFailed: a checkpoint, a record or another file could not be written; the same command goes on likewise.
    """
    began = time.monotonic()
    processes = Processes() if processes is None else processes
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    config = without_processes(config)
    with processes.primary_first("preparation"):
        check_workdir(config, workdir)
        parts = assemble(config, workdir)
        check_same_data(parts, workdir)
        trainer = build_trainer(parts, workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=trainer.settings.keep, processes=processes)
    try:
        state, step = start(trainer, checkpoints)
        if step < trainer.total_steps:
            trainer = with_compiled_steps(trainer, step)
        with processes.primary_first("config"):
            # From here on the folder is this run's: whatever can be wrong was found before.
            save_run(parts, workdir, primary=processes.primary)
        records = Records(workdir, tensorboard=trainer.settings.tensorboard, primary=processes.primary)
        records.cut(step)
        console = Console(stderr=True, quiet=not processes.primary)
        try:
            with Progress(trainer.total_steps, start=step, title=workdir.name, console=console) as progress:
                pace = Pace(began=began, peak=peak_of(trainer.mesh), program_bytes=bytes_of_update(trainer, step))
                loop(trainer, state, step, checkpoints, records, progress, pace)
        finally:
            records.close()
    finally:
        checkpoints.close()
    processes.barrier("records")
    pictures = plot_curves(workdir) if processes.primary else ()
    scores = last_scores(workdir)
    logger.info("finished %d steps in %s; %s", trainer.total_steps, workdir, ", ".join(map(str, pictures)))
    for name, value in scores.items():
        logger.info("  dev %s %.4f", name, value)
    return scores


def last_scores(workdir: Path) -> dict[str, float]:
    """The scores of the newest evaluation on the dev split, from the records; empty where there was none."""
    lines = [r for r in read_records(workdir / METRICS) if any(name.startswith("dev/") for name in r)]
    return {n.removeprefix("dev/"): v for n, v in lines[-1].items() if n != "step"} if lines else {}


# --- config → data → model → step


def build_trainer(parts: Parts, workdir: Path) -> Trainer:
    """Data, optimizer, shardings and the compiled functions of a run."""
    config = parts.config
    settings, mesh = settings_and_mesh(config)
    data = stage_data(parts, settings, mesh, workdir)
    evaluated = settings.evaluate_every is not None and "dev" in parts.source.splits()
    dev = parts.examples("dev", workdir) if evaluated else None
    optimizer = optimizers.build(config.optimizer.to_dict())
    schedule = schedules.build(config.schedule.to_dict()).build(optimizer.learning_rate, data[-1][0].last_step)
    transformation = optimizer.build(schedule, has_layer_axis=has_layer_axis)
    shapes = state_shapes(data, transformation)
    shardings = state_shardings(shapes, mesh, has_layer_axis=has_layer_axis)
    stages = []
    for stage, own, pipeline in data:
        train_step = make_train_step(
            own.module.apply,
            transformation,
            schedule=schedule,
            coefficients=own.task.coefficients,
            shardings=shardings,
            seed=config.seed,
            accumulation=stage.accumulation,
            nonfinite=settings.nonfinite,
            scaling=settings.scaling(config.model.dtype),
        )
        flops = step_flops(own, pipeline, shapes) if peak_of(mesh) else 0.0  # traces the model, which takes a second
        stages.append(StageTrainer(own, stage.last_step, pipeline, train_step, flops))
    evaluation = build_evaluation(parts, shapes.params)
    return Trainer(parts, settings, mesh, tuple(stages), shapes, shardings, transformation, evaluation, dev)


def stage_data(parts: Parts, settings: RunSettings, mesh: Mesh, workdir: Path) -> list[tuple[Stage, Parts, Pipeline]]:
    """Each stage with its parts and its batches, which go on in the data where those of the stage before it end."""
    examples = {parts.task: parts.examples("train", workdir)}
    made = []
    part, num_parts = batch_part(mesh)
    for stage in settings.plan(len(examples[parts.task])):
        own = parts.at(stage.task)
        if own.task not in examples:
            examples[own.task] = own.examples("train", workdir)
        pipeline = Pipeline(
            examples[own.task],
            own.features,
            seed=parts.config.seed,
            batch_size=stage.batch_size,
            first_step=stage.first_step,
            first_example=stage.first_example,
            process_index=part,
            process_count=num_parts,
        )
        made.append((stage, own, pipeline))
    return made


def state_shapes(data: Sequence[tuple[Stage, Parts, Pipeline]], optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes of the state, which are the same in every stage.

    Raises:
      UserError: a stage replaces a value of the task that other parameters hang on.
    """
    shapes = [jax.eval_shape(functools.partial(fresh_state, own, pipeline, optimizer)) for _, own, pipeline in data]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            raise UserError(
                f"train.stages[{number}].task makes other parameters than the first stage has; a run has one model"
            )
    return shapes[0]


def step_flops(parts: Parts, pipeline: Pipeline, shapes: TrainState) -> float:
    """Model FLOPs of one update: the matrix products of the forward pass, thrice, without what is computed again."""
    row = pipeline.one_row.items()
    batch = {name: jax.ShapeDtypeStruct((pipeline.batch_size, *leaf.shape[1:]), leaf.dtype) for name, leaf in row}
    losses = functools.partial(parts.unfused().apply, train=False)
    return FORWARD_AND_BACKWARD * forward_flops(losses, {"params": shapes.params}, batch)


def peak_of(mesh: Mesh) -> float | None:
    """What the devices of the mesh could do together, FLOP/s; None where it is not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


def settings_and_mesh(config: ConfigDict) -> tuple[RunSettings, Mesh]:
    """The run's scalars, and the mesh it trains and evaluates on."""
    mesh = make_mesh(**vars(make(MeshSettings, config.mesh.to_dict(), "mesh")))
    return run_settings(config), mesh


def run_settings(config: ConfigDict) -> RunSettings:
    return make(RunSettings, config.train.to_dict(), "train")


def with_compiled_steps(trainer: Trainer, step: int) -> Trainer:
    """The trainer with its evaluation and the updates after `step` compiled, which refuses a batch or a sequence that does
    not fit, of whatever stage."""
    state, stages = with_shardings(trainer.shapes, trainer.shardings), []
    for stage in trainer.stages:
        if step < stage.last_step:
            batch = put_batch(stage.pipeline.batch(stage.pipeline.first_step), trainer.mesh)
            stage = stage._replace(train_step=stage.train_step.lower(state, batch).compile())
        stages.append(stage)
    trainer = trainer._replace(stages=tuple(stages))
    if trainer.dev is None:
        return trainer
    evaluation = trainer.evaluation
    batch = put_batch(next(batches_in_order(evaluation, trainer.dev)), evaluation.mesh)
    step = evaluation.step.lower(state.params, batch).compile()
    return trainer._replace(evaluation=evaluation._replace(step=step))


def bytes_of_update(trainer: Trainer, step: int) -> int | None:
    """What the largest update after `step` needs of a device's memory; None where it is not known."""
    needed = [program_bytes(stage.train_step) for stage in trainer.stages if step < stage.last_step]
    return None if None in needed else max(needed, default=None)


def build_evaluation(parts: Parts, params: Any) -> Evaluation:
    """The compiled evaluation of a run, on the mesh it trains on; `params` may be arrays or shapes."""
    settings, mesh = settings_and_mesh(parts.config)
    laid_out = parameter_shardings(params, mesh, has_layer_axis=has_layer_axis)
    shardings = TrainState(step=replicated(mesh), params=laid_out, opt_state=(), extra={})
    step = make_eval_step(parts.module.apply, shardings=shardings)
    return Evaluation(parts, mesh, laid_out, settings.evaluation_batch_size or settings.batch_size, step)


def fresh_state(parts: Parts, pipeline: Pipeline, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update, of random parameters."""
    row = jax.tree.map(jnp.zeros_like, pipeline.one_row)
    variables = parts.module.init({"params": key_for(parts.config.seed, "parameters")}, row, train=False)
    scaling = run_settings(parts.config).scaling(parts.config.model.dtype)
    return initial_state(variables["params"], optimizer, scaling)


def start(trainer: Trainer, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The state to go on from and its step: this run's newest checkpoint, else `init_from`, else from scratch."""
    restored = checkpoints.restore(with_shardings(trainer.shapes, trainer.shardings))
    if restored is not None:
        logger.info("resuming at step %d of %d", restored.step, trainer.total_steps)
        return restored.state, restored.step
    state = initial(trainer)
    init_from = trainer.parts.config.init_from
    if init_from is not None:
        state = state.replace(params=load_parameters(init_from, state.params))
    return state, 0


def initial(trainer: Trainer) -> TrainState:
    """The state of random parameters, made in its shards."""
    first = trainer.stages[0]
    make_state = functools.partial(fresh_state, first.parts, first.pipeline, trainer.optimizer)
    return jax.jit(make_state, out_shardings=trainer.shardings)()


# --- loop


def loop(
    trainer: Trainer,
    state: TrainState,
    step: int,
    checkpoints: Checkpoints,
    records: Records,
    progress: Progress,
    pace: Pace,
) -> None:
    """Updates until the last step; writes records, evaluations and checkpoints on the way.

    A checkpoint of a step holds less than the records up to that step, so that a resume can cut them back to it.
    """
    settings, total = trainer.settings, trainer.total_steps
    extra = trainer.parts.fingerprints()
    watched: list[tuple[int, jax.Array]] = []
    with StopRequested() as stop, contextlib.closing(trainer.batches(step)) as batches:
        stopping, why = False, ""
        while step < total and not stopping:
            stage, batch = next(batches)
            state, metrics = stage.train_step(state, put_batch(batch, trainer.mesh))
            step += 1
            checkpoints.check()
            pace.step(stage.tokens_per_step, stage.flops_per_step)
            watched.append((step, metrics["finite"]))
            watched[max(0, len(watched) - STEPS_AHEAD)][1].block_until_ready()
            # Read once: a signal that comes later in this turn must not end the loop before it is saved.
            if agreed := checkpoints.processes.stop_at(stop.signal and stop.signal.name, step, STEPS_AHEAD):
                stopping, why = step >= agreed[0], agreed[1]
            logging_now = due(step, settings.log_every, total)
            saving_now = due(step, settings.checkpoint_every, total) or stopping
            if logging_now or saving_now:
                check_finite(watched, trainer, records)
                watched.clear()
            if logging_now:
                values = jax.device_get(metrics)
                records.metrics(step, {name: value for name, value in values.items() if name != "finite"})
                progress.update(step, loss=float(values["loss"]), tokens=pace.tokens)
                records.timing(step, pace.line())
            if trainer.dev is not None and due(step, settings.evaluate_every, total):
                with pace.elsewhere():
                    scores = evaluate(trainer.evaluation, state.params, trainer.dev)
                records.metrics(step, {f"dev/{name}": value for name, value in scores.items()})
            if saving_now:
                with pace.elsewhere():
                    records.sync()
                    checkpoints.save(step, state, extra)
        checkpoints.wait()
    if step < total:
        raise Stopped(f"{why} at step {step} of {total}, which is saved; the same command resumes")


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every so many steps, and at the end, is done now."""
    return step == total or (every > 0 and step % every == 0)


def check_finite(watched: list[tuple[int, jax.Array]], trainer: Trainer, records: Records) -> None:
    """Writes down the examples of every batch whose loss, gradient or update was not finite.

    Raises:
      NotFinite: there was one, and the policy is to stop. The state is that before it.
    """
    flags = jax.device_get([finite for _, finite in watched])
    for (step, _), finite in zip(watched, flags, strict=True):
        if finite:
            continue
        where = trainer.locate(step - 1)
        path = records.report_nonfinite(step, *where, {"policy": trainer.settings.nonfinite})
        if trainer.settings.nonfinite == "stop":
            raise NotFinite(
                f"the loss, a gradient or an update of step {step} is not finite; its examples are listed in {path}. Lower "
                "the learning rate or mend the data and start in another --workdir, or go on here with "
                "--config.train.nonfinite=skip"
            )
        logger.warning("step %d is not finite and was skipped; its examples are listed in %s", step, path)


def evaluate(evaluation: Evaluation, params: Any, examples: Sequence) -> dict[str, float]:
    """The task's scores over all the examples, in the training mesh."""
    return evaluation.parts.task.score(predict(evaluation, params, examples), examples)


def predict(evaluation: Evaluation, params: Any, examples: Sequence) -> dict[str, np.ndarray]:
    """The predictions of the task's module, a row for each example."""
    batches = batches_in_order(evaluation, examples)
    gathered = [evaluation.step(params, put_batch(batch, evaluation.mesh))[1] for batch in batches]
    return {n: np.concatenate([np.asarray(p[n]) for p in gathered])[: len(examples)] for n in gathered[0]}


def batches_in_order(evaluation: Evaluation, examples: Sequence) -> Iterator[Batch]:
    """This process's part of the batches that an evaluation goes through."""
    part, num_parts = batch_part(evaluation.mesh)
    return evaluation_batches(
        examples,
        evaluation.parts.features,
        batch_size=evaluation.batch_size,
        seed=evaluation.parts.config.seed,
        process_index=part,
        process_count=num_parts,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
