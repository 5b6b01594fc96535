"""One process's part of `init_checkpoint`: jobs are taken one after the other until there are none.

    read → split → write       several weights at once, each on one thread: reading, splitting and writing overlap
                 → journal     what is on the disk is noted: whoever is stopped continues there

The largest weights come first. How many are worked on at once is bounded by their memory as well as by the threads.
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
from types import FrameType
from typing import Any

import torch

from ...errors import Interrupted, OutputError
from ..disk.distribute import JOINED, Team
from ..disk.journal import Journal
from ..disk.outputs import Commits, Outputs
from ..disk.write import explained
from ..manifest import MANIFEST
from ..source.reader import Source
from .activations import Moments
from .jobs import Job
from .plan import StreamPlan
from .unfinished import Workspace
from .work import Record, do

POLL = 0.2
"""Seconds between two looks at signals and other processes."""
SAME_REQUEST_SECONDS = 1.0


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


Progress = Callable[[Step], None]


class Process:
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
