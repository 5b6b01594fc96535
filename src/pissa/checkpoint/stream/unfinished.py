"""The directory while it is being made, and the step in which it becomes a model.

Everything lies in OUT/.pissa-init/ until it is whole: the preallocated shards, the journals and `run.json`, which says
what run it is. Nothing in OUT itself can be loaded before that. Then `pissa.json` is written beside the shards, which
seals them, and all files move up, the manifest last. A crash between two moves leaves a sealed rest that the same
command moves.

Nothing that lies there is believed before it is shown to be of this run: without `run.json` there may be what this run
would have begun with and nothing else, a seal counts only if its digest and its run are right, and what is moved is
what the plan names.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import PissaConfig
from ...errors import OutputError, listed
from ...live.state import INITIAL
from ...outside.documents import read_document
from ..card import CARD, residual_card
from ..disk.journal import forget, is_journal, read_journals
from ..disk.layout import INDEX, FileLayout
from ..disk.resumable import Resumable, differences
from ..disk.write import TEMPORARY_PREFIX, explained, flush, flush_tree, write_json
from ..manifest import MANIFEST, Manifest
from ..saved_residual import RESIDUAL, certificate_of
from ..seal import is_intact, plain_file, tensor_file, write_sealed
from ..source.reader import Source
from .contents import base_tensors, copies, module_entries
from .plan import StreamPlan
from .run_identity import check_base_unchanged, modification_times

WORK = ".pissa-init"
RUN = "run.json"
MARGIN = 64 << 20
"""Bytes that the small files and the journals may take."""
LAST = (INDEX, "config.json", MANIFEST)
"""What makes a directory loadable comes last, in this order."""


@dataclass(frozen=True)
class InitRecord:
    """What run.json holds: the run's identity, and when the base's files were changed last."""

    base: str
    config: dict[str, Any]
    dtype: str | None
    base_files: dict[str, Any]
    versions: dict[str, str]
    times: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Workspace:
    """An output directory in the making."""

    out: Path
    """Where the model will be."""
    identity: dict[str, Any]
    """What run this is: command, base, versions."""

    @property
    def path(self) -> Path:
        """Where it is until then."""
        return self.out / WORK

    @property
    def resumable(self) -> Resumable:
        """The directory as one that only this run may continue."""
        return Resumable(self.out, self.path / RUN, "run", "writing", InitRecord, self.path)

    @property
    def is_sealed(self) -> bool:
        """Whether everything is made and only has to be moved."""
        return self._seal_of_this_run(self.path) is not None

    def finished(self) -> dict[str, Any] | None:
        """The manifest, where this very run is finished already; None where there is work to do.

        Raises:
            OutputError: the directory holds something else, or another run.
        """
        with explained(self.out):
            if self.out.exists() and not self.out.is_dir():
                raise OutputError(f"{self.out} is a file; name a directory")
            if self.path.is_symlink():
                raise OutputError(f"{self.path} is a link; remove it, or name a new directory")
            there = sorted(child.name for child in self.out.iterdir()) if self.out.exists() else []
            manifest = self._manifest_in(self.out) if MANIFEST in there else None
            if manifest is not None and manifest.get("run"):  # it is moved last
                self._check_same(manifest["run"])
                self._check_sizes(manifest)
                shutil.rmtree(self.path, ignore_errors=True)
                return manifest
            record = self._record()
            if record is not None:
                self._check_same(record)
            sealed = self._seal_of_this_run(self.path) if record is not None else None
            ours = {WORK} | {Path(name).parts[0] for name in (sealed or {}).get("files", ())}
            foreign = [name for name in there if name not in ours and not name.startswith(TEMPORARY_PREFIX)]
            if foreign:
                raise OutputError(
                    f"{self.out} already holds something ({listed(foreign)}); name a new or empty directory, or "
                    "remove it first"
                )
        return None

    def make(self) -> Path:
        """Make the work directory, if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def discard_unbegun(self) -> None:
        """Take the work directory away where nothing was begun in it."""
        if self.path.is_dir() and not any((self.path / name).is_file() for name in (RUN, MANIFEST)):
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self.out.rmdir()

    def prepare(self, plan: StreamPlan, source: Source) -> None:
        """Make the files, or check those of an earlier run and the base that it read.

        Raises:
            OutputError: the disk has no room.
            CheckpointError: the base was changed since the run began.
        """
        self._check_room(plan)
        self._check_own(plan)
        record = self._record()
        if record is None:
            forget(self.path)
        else:
            check_base_unchanged(source, plan.jobs, self.finished_jobs(plan), record.get("times", {}))
        broken = [file for file in plan.files if not _is_intact(self.path / file.name, file)]
        if broken:
            forget(self.path, {tensor for file in broken for tensor in file.offsets})
        for file in broken:
            (self.path / file.name).unlink(missing_ok=True)
            file.allocate(self.path)
        if record is None:
            flush_tree(self.path)
            write_json(self.path / RUN, {**self.identity, "times": modification_times(source)})
            flush(self.path)
            flush(self.out)
            flush(self.out.parent)

    def finished_jobs(self, plan: StreamPlan) -> dict[str, dict[str, Any]]:
        """What is finished: job -> its record."""
        jobs = {job.name: job for job in plan.jobs}
        done = {}
        for record in read_journals(self.path):
            job, tensors = jobs.get(str(record.get("task"))), record.get("tensors")
            if job is not None and isinstance(tensors, dict) and tensors.keys() == job.outputs.keys():
                done[job.name] = record
        return done

    def seal(self, plan: StreamPlan, source: Source) -> None:
        """Write the small files, and the manifest, which says that all is there."""
        if self.is_sealed:
            return
        done = self.finished_jobs(plan)
        missing = [job.name for job in plan.jobs if job.name not in done]
        assert not missing, f"not done: {missing}"
        digests = {name: digest for record in done.values() for name, digest in record["tensors"].items()}
        files = {file.name: tensor_file(file, digests) for file in plan.files}
        small = {file.relative_to(source.path).as_posix(): file.read_bytes() for file in source.others}
        small |= {name: text.encode() for name, text in plan.documents.items()}
        small[CARD] = self._card(plan, done).encode()
        for name, data in sorted(small.items()):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(data)
            files[name] = plain_file(self.path / name)
        flush_tree(self.path)
        write_sealed(self.path / MANIFEST, self._manifest(plan, source, done, files))

    def publish(self) -> None:
        """Move everything up, what makes it loadable last, and take the work directory away."""
        sealed = self._seal_of_this_run(self.path)
        assert sealed is not None
        names = [*sealed["files"], MANIFEST]
        left = [name for name in names if (self.path / name).is_file()]
        for name in sorted(left, key=lambda name: LAST.index(name) if name in LAST else -1):
            if name in LAST:
                flush(self.out)
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, target)
            flush(target.parent)
        shutil.rmtree(self.path)
        flush(self.out)

    def _card(self, plan: StreamPlan, done: dict[str, dict[str, Any]]) -> str:
        config = _config(plan)
        found = {job.name: done[job.name]["certificate"] for job in plan.jobs if job.config is not None}
        certificates = {name: certificate_of(certificate) for name, certificate in sorted(found.items())}
        initial = None if config.starts_at_zero else INITIAL
        return residual_card(
            self.identity["base"], config.title, self.identity["config"]["rank"], certificates, initial
        )

    def _manifest(
        self, plan: StreamPlan, source: Source, done: dict[str, dict[str, Any]], files: dict[str, Any]
    ) -> dict[str, Any]:
        certificates = {job.name: done[job.name].get("certificate", {}) for job in plan.jobs}
        modules = {name: {**entry, **certificates[name]} for name, entry in module_entries(plan).items()}
        digests = {name: digest for record in done.values() for name, digest in record["base"].items()}
        entries = {name: source.entries[name] for name in base_tensors(plan)}
        tensors = {
            name: {"dtype": entry.kind, "shape": list(entry.shape), "sha256": digests[name]}
            for name, entry in entries.items()
        }
        return {
            "layout": RESIDUAL,
            "base": self.identity["base"],
            "method": _config(plan).title,
            "config": self.identity["config"],
            "dtype": str(plan.dtype).removeprefix("torch."),
            "threads_per_matrix": 1,
            "modules": modules,
            "copies": copies(plan),
            "base_tensors": tensors,
            "files": files,
            "run": self.identity,
            "versions": self.identity["versions"],
        }

    def _record(self) -> dict[str, Any] | None:
        """What run.json says; None where there is none."""
        path = self.path / RUN
        remedy = f"the run cannot be continued; remove {path.parent}"
        return read_document(path, InitRecord, error=OutputError, remedy=remedy) if path.is_file() else None

    def _manifest_in(self, directory: Path) -> dict[str, Any]:
        remedy = f"remove {directory}, or name a new directory"
        return read_document(directory / MANIFEST, Manifest, error=OutputError, remedy=remedy)

    def _seal_of_this_run(self, directory: Path) -> dict[str, Any] | None:
        """The manifest in a directory, if it is whole and of this very run."""
        path = directory / MANIFEST
        if not path.is_file() or path.is_symlink():
            return None
        manifest = self._manifest_in(directory)
        same = not list(differences(manifest.get("run") or {}, self.identity))
        return manifest if same and is_intact(path.read_text(encoding="utf-8")) else None

    def _check_own(self, plan: StreamPlan) -> None:
        """Refuse a work directory that holds what this run would not have put there.

        Raises:
            OutputError: naming it.
        """
        names = {file.name for file in plan.files} | {RUN}
        names |= {str(parent) for name in names for parent in Path(name).parents}
        if (self.path / RUN).is_file():
            return
        foreign = [
            name
            for child in sorted(self.path.rglob("*"))
            if (name := child.relative_to(self.path).as_posix())
            and (child.is_symlink() or name not in names)
            and not is_journal(name)
            and not child.name.startswith(TEMPORARY_PREFIX)
        ]
        if foreign:
            raise OutputError(
                f"{self.path} holds {listed(foreign)} and no {RUN}, so no run of pissa init made it; remove it, "
                "or name a new directory"
            )

    def _check_same(self, before: dict[str, Any]) -> None:
        then = {key: value for key, value in before.items() if key != "times"}
        self.resumable.check_same(then, self.identity, "the same command, base and versions")

    def _check_sizes(self, manifest: dict[str, Any]) -> None:
        """Refuse to call finished what was damaged since, as far as that is seen without reading it."""
        sizes = {name: file["size"] for name, file in manifest["files"].items()}
        wrong = [
            n for n, size in sizes.items() if not (self.out / n).is_file() or (self.out / n).stat().st_size != size
        ]
        if wrong:
            raise OutputError(
                f"{self.out} was finished and damaged since: {listed(wrong)} missing or of another size; remove "
                "it, and run the same command again"
            )

    def _check_room(self, plan: StreamPlan) -> None:
        """Refuse a disk that cannot hold the result, before the work and not after it."""
        allocated = sum(_allocated(self.path / file.name) for file in plan.files)
        needed = plan.size - allocated + MARGIN
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"the disk that holds {self.out} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; "
                "make room and run the same command again"
            )


def _config(plan: StreamPlan) -> PissaConfig:
    """The configuration, as the first module that is adapted has it."""
    return next(job.config for job in plan.jobs if job.config is not None)


def _is_intact(path: Path, file: FileLayout) -> bool:
    """Whether an earlier run left a file as long as it is to be, with its header."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(file.header)) == file.header


def _allocated(path: Path) -> int:
    """Bytes of the disk that a file, which may have holes, takes already."""
    return getattr(os.stat(path), "st_blocks", 0) * 512 if path.is_file() else 0
