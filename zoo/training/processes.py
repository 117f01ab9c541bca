"""The processes of one run: how they find each other, wait for each other, and end together.

Every process runs the same program over one mesh. What all would write, process 0 writes: it goes first, the others
follow and read. They wait on the key-value store of `jax.distributed`, not by a collective, so that waiting can be
interrupted, ends by a time-out that names who is missing, and needs no device.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from zoo.errors import RunStopped, UserError
from zoo.training.settings import ProcessSettings
from zoo.training.watch import LOST_EXIT_CODE, AbortHandler, Watch, end

Outcome = Callable[[BaseException], tuple[int, str]]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks at the store


class ProcessMissing(RunStopped):
    """A process did not come to where the others waited for it; the message names it."""

    exit_code = LOST_EXIT_CODE


class Processes:
    """This process among those of the run. One alone (the default) waits for nobody, and every call here is free.

    Attributes:
      index, count: of this process; 0 of 1 where there is one.
    """

    def __init__(
        self, index: int = 0, count: int = 1, *, client: Any = None, watch: Watch | None = None, wait: float = 0.0
    ):
        self.index, self.count = index, count
        self._client, self._watch, self._wait = client, watch, wait
        self._uses: dict[str, int] = {}

    @property
    def primary(self) -> bool:
        """Whether this process writes what all share, and prints."""
        return self.index == 0

    @contextlib.contextmanager
    def primary_first(self, name: str) -> Iterator[None]:
        """Process 0 goes through the block first, then the others do; all leave it together.

        Together, since the first collective of a program fails on a CPU where one process comes to it 30 s after another.

        Raises:
          ProcessMissing: not all were done in time; names them.
        """
        key = self._key("done", name)
        if not self.primary:
            self._await(name, lambda: [] if self._get(key) is not None else [0])
        yield
        if self.primary:
            self._set(key, "")
        self.barrier(name)

    def barrier(self, name: str) -> None:
        """Returns when all processes have come here.

        Raises:
          ProcessMissing: not all came in time; names them.
        """
        if self.count == 1:
            return
        key = self._key("here", name)
        self._set(f"{key}/{self.index}", "")
        opened = self._key("open", name)

        def missing() -> list[int]:
            here = {int(k.rpartition("/")[2]) for k, _ in self._client.key_value_dir_get(f"{key}/")}
            return [i for i in range(self.count) if i not in here]

        if self.primary:
            self._await(name, missing)
            self._set(opened, "")
        else:
            # Asks for one key, not for all: a pod has a thousand processes.
            self._await(name, lambda: [0] if self._get(opened) is None else [], names=missing)

    def share(self, name: str, value: Any) -> Any:
        """Process 0's `value` (of JSON), in every process; that of the others is not looked at.

        Raises:
          ProcessMissing: process 0 did not say it in time.
        """
        if self.count == 1:
            return value
        key = self._key("value", name)
        if self.primary:
            self._set(key, json.dumps(value))
            return value
        self._await(name, lambda: [] if self._get(key) is not None else [0])
        return json.loads(self._get(key))

    def stop_at(self, asked: str | None, step: int, ahead: int) -> tuple[int, str] | None:
        """(step, why) at which all stop; None while no process has been asked to. `asked` is what asks this one.

        To be called at every step; no process may be more than `ahead` steps further than process 0.
        """
        if self._watch is None:
            return None if asked is None else (step, asked)
        return self._watch.stop_at(asked, step, ahead)

    def _key(self, kind: str, name: str) -> str:
        """A key of its own for every use of a name: the processes go through the same uses in the same order."""
        use = self._uses[f"{kind}/{name}"] = self._uses.get(f"{kind}/{name}", 0) + 1
        return f"zoo/{kind}/{name.replace(' ', '_')}/{use}"

    def _set(self, key: str, value: str) -> None:
        if self.count > 1:
            self._client.key_value_set(key, value)

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _await(self, name: str, missing: Callable[[], list[int]], names: Callable[[], list[int]] | None = None) -> None:
        """Returns when nobody is missing. Signals are handled meanwhile, and the watch ends a process that waits for a lost one."""
        end, pause = time.monotonic() + self._wait, _FIRST_PAUSE
        while missing():
            if time.monotonic() > end:
                who = ", ".join(self._watch.name(i) for i in (names or missing)())
                raise ProcessMissing(
                    f"waited {self._wait:g} s at {name!r} for {who}; see its log, or raise --config.processes.wait"
                )
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, 1.5 * pause)


@contextlib.contextmanager
def joined(settings: ProcessSettings, outcome: Outcome) -> Iterator[Processes]:
    """This process joined with the others of the run, to whose end all go together. Before anything else asks for a device.

    An error that leaves the block ends all processes: this one with the (exit code, message) that `outcome` makes of it, the
    others with the same code and the name of this one; an error that all meet is printed by process 0. A process that is lost
    ends the others with `LOST_EXIT_CODE`, within `lost_after` and some seconds.

    Raises:
      UserError: no cluster to be detected, or a coordinator that cannot be one.
    """
    if settings.count == 1 and not settings.detect:
        yield Processes()
        return
    client = _connect(settings)
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        yield Processes()
        return
    watch = Watch(client, index, count, settings.lost_after)
    watch.start()
    processes = Processes(index, count, client=client, watch=watch, wait=settings.wait)
    with AbortHandler(watch.coordinator_aborts) if index else contextlib.nullcontext():
        try:
            yield processes
            processes.barrier("end")
        except BaseException as error:
            watch.leave(*outcome(error), perhaps_lost=_may_be_an_echo(error))
        watch.close()
        jax.distributed.shutdown()


def _may_be_an_echo(error: BaseException) -> bool:
    """Whether it may come from a collective, which fails where a peer has died: as whatever the layers above make of it."""
    known = (UserError, RunStopped, OSError, SystemExit, KeyboardInterrupt)
    own = isinstance(error, known) or "RESOURCE_EXHAUSTED" in str(error) or "os_error_code" in str(error)
    return not own and (error.__cause__ is None or _may_be_an_echo(error.__cause__))


def _connect(settings: ProcessSettings) -> Any:
    """The client of `jax.distributed`, once all processes have come."""
    where = f"process {settings.index} of {settings.count}" if settings.index is not None else "this process"

    def too_late() -> None:
        who = "all others" if settings.index == 0 else f"process 0 at {settings.coordinator} and all others"
        text = (
            f"stopped: {where} waited {settings.start_within:g} s for {who} to start; start each with the same count and "
            "coordinator and an index of its own"
        )
        end(LOST_EXIT_CODE, text)

    # Our own handling of SIGTERM must stay, and JAX's own health check must not come before ours.
    jax.config.update("jax_enable_preemption_service", False)
    given = {} if settings.detect else {"cluster_detection_method": "deactivate"}
    try:
        with AbortHandler(too_late):
            jax.distributed.initialize(
                settings.coordinator,
                None if settings.detect else settings.count,
                settings.index,
                initialization_timeout=max(1, round(settings.start_within)),
                heartbeat_timeout_seconds=max(100, round(10 * settings.lost_after)),
                shutdown_timeout_seconds=max(1, round(settings.lost_after)),
                **given,
            )
    except (ValueError, RuntimeError) as error:
        if settings.detect:
            raise UserError(
                f"processes.detect found no cluster that JAX knows ({error}); give processes.count, index and coordinator"
            ) from error
        raise UserError(f"processes.coordinator={settings.coordinator!r} cannot be used: {error}") from error
    from jax._src import distributed  # the client has no public name; Orbax takes it from here too

    return distributed.global_state.client
