"""`init_checkpoint`: a model on disk becomes residual and adapter on disk, a few weights in memory at a time.

    read → split → write       several weights at once, each on one thread: reading, splitting and writing overlap
                 → journal     what is on the disk is noted: whoever is stopped continues there

The largest weights come first. How many are worked on at once is bounded by their memory as well as by the threads.
Every weight is split by `split_weight` on one thread, from a seed of its own; so the bytes depend neither on the order
nor on how many processes there are.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ...config import PissaConfig
from ...errors import ConfigError, Interrupted, OutputError
from ..disk.distribute import JOINED, Team, assemble
from ..disk.journal import Journal
from ..disk.outputs import Commits, Outputs
from ..disk.write import explained
from ..manifest import MANIFEST, read_manifest
from ..saved_residual import check_is_base
from ..source.reader import Source, open_source
from .activations import Moments
from .dtypes import DTYPES
from .jobs import Job
from .plan import StreamPlan, make_plan
from .run_identity import identity
from .unfinished import Workspace
from .work import Record, do

POLL = 0.2
"""Seconds between two looks at signals and other processes."""
SAME_REQUEST_SECONDS = 1.0
MATRICES = 4
"""How many times the memory of the largest job all together may take."""


@dataclass(frozen=True)
class Step:
    """How far an `init_checkpoint` is, after each tensor of the base."""

    module: str
    """What was just finished."""
    certificate: dict[str, Any] | None
    """Of its split; None for a copy."""
    tensors: int
    """How many are done, by this process and by earlier runs."""
    all_tensors: int
    size: int
    """Their bytes in the base."""
    all_size: int


@dataclass(frozen=True)
class InitResult:
    """A finished `init_checkpoint`."""

    path: Path
    """The directory."""
    manifest: dict[str, Any]
    """What its pissa.json holds."""
    seconds: float
    """How long this run took; 0 where an earlier one had finished."""
    continued: int
    """How many tensors of the base earlier runs had done."""
    processes: int
    threads: int
    """Of this process; each weight is split on one."""


Progress = Callable[[Step], None]


def init_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PissaConfig,
    *,
    dtype: str | None = None,
    memory: int | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> InitResult:
    """Split a model on disk into a residual and an initial adapter on disk, without ever holding it.

    `out` becomes a directory that `AutoModelForCausalLM.from_pretrained(out)` loads, with the initial adapter in
    `out/pissa_init` and the manifest `out/pissa.json`: the bits that `adapt` and `save_residual` give. Called again, it
    continues what was stopped. Under `torchrun` the processes share the work.

    Args:
        source: the base: a directory or a hub id.
        out: new, empty, or that of the same run.
        config: rank, method, targets, quantisation.
        dtype: "fp32", "bf16" or "fp16" for the weights; None for what transformers would load them in.
        memory: bytes that the weights in work may take together; at least one is worked on. None for four times what
            the largest takes.
        batches: keyword arguments of the model's forward, tensors by name: text that a quantisation is fitted to. It
            goes through the model block by block, each layer's weights read when it is called.
        progress: called after each tensor.

    Returns:
        The directory, its manifest, and what the run took.

    Raises:
        CheckpointError: the base cannot be read, is not whole, or was changed since the run began.
        TargetError, ConfigError, WeightError: as `adapt`.
        OutputError: `out` holds something else, another run, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, or another process ended; what was done is saved.

    Example:
        >>> from pissa import PissaConfig, init_checkpoint
        >>> made = init_checkpoint("base", "split", PissaConfig(rank=8))
        >>> max(module["rounding"] for module in made.manifest["modules"].values()) < 1e-6  # in fp32
        True
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    _check_fitted(config, batches)
    start = time.perf_counter()
    out = Path(os.path.realpath(out))
    threads = max(1, torch.get_num_threads())
    check_is_base(source)
    with open_source(source) as base:
        workspace = Workspace(out, identity(source, base, config, dtype, batches))
        finished = workspace.finished()
        if finished is not None:
            return InitResult(out, finished, 0.0, len(finished["base_tensors"]), 1, threads)
        plan = make_plan(base, config, out, dtype, as_it_runs=batches is not None)
        team = assemble(workspace.path)
        memory = memory or MATRICES * max(t.memory for t in plan.jobs)
        run = _Run(base, workspace, plan, team, memory, progress, batches)
        run.complete()
    seconds = time.perf_counter() - start
    return InitResult(out, read_manifest(out) or {}, seconds, run.continued, team.size, threads)


def _check_fitted(config: PissaConfig, batches: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse text that nothing is fitted to, and a configuration that asks for text where there is none."""
    quantization = config.quantization
    if batches is None:
        if quantization is not None and (quantization.calibration is not None or quantization.rounding == "gptq"):
            raise ConfigError(
                "the quantisation is fitted to text: pass it as batches (--calibration FILE), or leave calibration out"
            )
    elif quantization is None or not quantization.is_fitted:
        raise ConfigError("batches are for a quantisation that is fitted to them; leave them out")


class _Run:
    """One process's part of the work."""

    def __init__(
        self,
        source: Source,
        workspace: Workspace,
        plan: StreamPlan,
        team: Team,
        memory: int,
        progress: Progress | None,
        batches: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self.source, self.workspace, self.plan, self.team = source, workspace, plan, team
        self.memory, self.progress = memory, progress
        self.threads = max(1, torch.get_num_threads())
        self.done: dict[str, Record] = {}
        self.continued = self.size = self.whole = 0
        self.stopping = threading.Event()
        self.moments: Moments | None = None
        if batches is not None:
            self.moments = Moments(source, batches, plan.jobs, plan.dtype, self.stopping)

    def complete(self) -> None:
        """Do what is left, and publish."""
        with ExitStack() as held:
            held.enter_context(_signals(self.stopping))
            try:
                with explained(self.workspace.out):
                    self._complete(held)
            except Exception as error:
                # the others have to hear of it before the journal's lock is let go
                self.team.fail(" ".join(str(error).split()) or type(error).__name__)
                if self.team.rank == 0:
                    self.workspace.discard_unbegun()
                raise
            except KeyboardInterrupt as interrupt:
                raise Interrupted(f"{interrupt or 'interrupted'}; {self._what_is_saved()}") from None

    def _complete(self, held: ExitStack) -> None:
        workspace, team = self.workspace, self.team
        if team.rank == 0:
            held.enter_context(workspace.resumable.held(self._check_again))
            journal = Journal(workspace.make(), 0)
            held.callback(journal.close)
            team.announce(JOINED)
            if not workspace.is_sealed:
                workspace.prepare(self.plan, self.source)
            team.announce("prepared")
        else:
            self._await("prepared")
            journal = Journal(workspace.path, team.rank)
            held.callback(journal.close)
            team.announce(JOINED)
        if workspace.is_sealed:
            self.continued = len(self.plan.jobs)
        else:
            self._work(journal)
        team.announce("worked")
        if team.rank == 0:
            self._await("worked", everyone=True)
            workspace.seal(self.plan, self.source)
            workspace.publish()
            team.announce("published")
            return
        try:
            self._await("published")
        except Interrupted:
            # whoever published does not stay until everyone has heard of it
            if not (workspace.out / MANIFEST).is_file():
                raise

    def _check_again(self) -> None:
        """Refuse to go on where another process finished the same run since this one looked."""
        if self.workspace.finished() is not None:
            raise OutputError(f"another process finished {self.workspace.out} just now; the same command shows it")

    def _await(self, what: str, *, everyone: bool = False) -> None:
        while not self.team.reached(what, everyone=everyone):
            self.team.check()
            if self.stopping.wait(POLL):
                raise Interrupted("interrupted")

    def _work(self, journal: Journal) -> None:
        """Take jobs until there are none, and note what is done."""
        self.done = self.workspace.finished_jobs(self.plan)
        self.continued = len(self.done)
        self.whole = sum(map(self._size, self.plan.jobs))
        self.size = sum(self._size(job) for job in self.plan.jobs if job.name in self.done)
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.threads + 1, initializer=torch.set_num_threads, initargs=(1,))
        running: dict[Future[Record], Job] = {}
        with Outputs(self.workspace.path, self.plan.files) as outputs:
            commits = Commits(outputs, journal)
            try:
                self._feed(pool, outputs, running, commits)
            finally:
                try:
                    pool.shutdown(cancel_futures=True)
                    torch.set_num_threads(before)
                    for future, job in running.items():  # what was in hand when it stopped
                        if not future.cancelled() and future.exception() is None:
                            commits.add(future.result(), _written(job))
                finally:
                    commits.close()

    def _feed(
        self, pool: ThreadPoolExecutor, outputs: Outputs, running: dict[Future[Record], Job], commits: Commits
    ) -> None:
        computing = threading.Semaphore(self.threads)
        queue = self._queue()
        waiting = next(queue, None)
        while waiting is not None or running:
            while waiting is not None and self._fits(waiting, running):
                moment = None if self.moments is None else self.moments.of(waiting)
                running[pool.submit(do, waiting, self.plan.model, self.source, outputs, computing, moment)] = waiting
                waiting = next(queue, None)
            finished, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in finished:
                record = future.result()
                job = running.pop(future)
                self.done[job.name] = record
                self.size += self._size(job)
                commits.add(record, _written(job))
                self._show(job, record)
            self.team.check()
            if self.stopping.is_set():
                raise Interrupted("interrupted")

    def _queue(self) -> Iterator[Job]:
        while (number := self.team.claim()) < len(self.plan.jobs):
            if self.plan.jobs[number].name not in self.done:
                yield self.plan.jobs[number]

    def _fits(self, job: Job, running: dict[Future[Record], Job]) -> bool:
        taken = sum(other.memory for other in running.values())
        return not running or (len(running) <= self.threads and taken + job.memory <= self.memory)

    def _show(self, job: Job, record: Record) -> None:
        if self.progress is None:
            return
        certificate, count = record.get("certificate"), len(self.plan.jobs)
        self.progress(Step(job.name, certificate, len(self.done), count, self.size, self.whole))

    def _size(self, job: Job) -> int:
        return sum(self.source.entries[name].nbytes for name in job.sources)

    def _what_is_saved(self) -> str:
        saved = len(self.workspace.finished_jobs(self.plan))
        return (
            f"{saved} of {len(self.plan.jobs)} tensors are saved in {self.workspace.out}: the same command continues "
            "from there"
        )


def _written(job: Job) -> int:
    return sum(kind.nbytes for kind in job.outputs.values())


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the work in good order, and a second one stop it at once.

    Launchers pass a signal on that the terminal has sent already: what follows within a moment is still the first.
    """
    asked = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if not stopping.is_set():
            asked = now
            stopping.set()
            os.write(2, b"\nstopping when the weights in work are done; once more to stop at once\n")
        elif now - asked > SAME_REQUEST_SECONDS:
            os.write(2, b"\npissa: stopped; what is noted is saved, and the same command continues\n")
            os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
