"""The demo: PiSSA and LoRA side by side, from the same base, on the same batches, with everything that was seen.

Three runs: PiSSA, LoRA at PiSSA's learning rate (the paper's comparison), and LoRA at ten times that rate, which is
near its own best (arXiv 2602.04998), so that the picture is honest. Then held-out problems before and after, and the
proof that PiSSA's result is an ordinary LoRA: plain PEFT loads it on the untouched base in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from ...checkpoint.adapter_config import read_adapter_config
from ...checkpoint.disk.resumable import Resumable
from ...checkpoint.disk.write import explained, output_files, write_json
from ...checkpoint.saved_residual import check_is_base
from ...checkpoint.source.load import check_model_directory, load_base, load_tokenizer
from ...data.conversation import Example
from ...data.encode import token_ids
from ...data.prompts import Template, prompt_text, resolve_template
from ...data.read import read_examples
from ...data.rows import example_from_row
from ...errors import DataError, OutputError
from ...evaluation.loss import held_out_loss
from ...evaluation.samples import SampleLog
from ...evaluation.tasks.registry import Evaluation, EvaluationOptions, find_task
from ...outside.documents import read_document
from ...outside.text import on_one_line
from ...provenance import hardware, package_versions
from ...stages import stage
from ...training.bar import make_progress
from ...training.recipe import Recipe
from ...training.run import RunResult, quieten, train
from ..figures import draw_curves
from ..models import smollm2
from .arithmetic import make_problems
from .report import demo_report

LEARNING_RATE = 2e-4
BATCH = 8
"""Held-out problems that are put to a model at once."""
LONGEST = 200
"""Characters of an answer that are shown."""
SETTINGS = "demo.json"
HELD_OUT = "held_out.json"
FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, run, prompts, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run).eval()
with torch.no_grad():
    logits = {name: model(input_ids=ids).logits.contiguous() for name, ids in load_file(prompts).items()}
save_file(logits, out)
"""


@dataclass(frozen=True)
class DemoSettings:
    """What demo.json holds is compared as it is; any object is a record."""


@dataclass(frozen=True)
class Solved:
    """Whether one held-out problem was solved."""

    correct: bool


@dataclass(frozen=True)
class HeldOut:
    """What held_out.json holds of a run."""

    loss: float
    samples: list[Solved]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    steps: int
    batch_size: int
    train: int
    held_out: int
    new_tokens: int
    rank: int = 32

    def recipe(self, method: str, learning_rate: float, seed: int) -> Recipe:
        """One run's settings; fp32, so that the exported LoRA can be compared to the last digit."""
        return Recipe(
            method=method,  # pyright: ignore[reportArgumentType]
            rank=self.rank,
            learning_rate=learning_rate,
            batch_size=self.batch_size,
            micro_batch_size=self.batch_size,
            max_steps=self.steps,
            epochs=1000,
            max_length=256,
            dtype="fp32",
            save_every=self.steps,
            seed=seed,
        )


FULL = Plan(steps=32, batch_size=6, train=400, held_out=48, new_tokens=64)
QUICK = Plan(steps=6, batch_size=4, train=80, held_out=6, new_tokens=64)


@dataclass(frozen=True)
class Task:
    """What is learned, and what it is tested on."""

    name: str
    train: list[Example]
    held_out: list[Example]
    unseen: tuple[bool, ...] | None = None
    """Per held-out problem: whether its template never occurs in training. None where that is unknown."""
    template: Template = "auto"
    """The prompt template in which it is learned and tested."""


def run_demo(
    out: Path, *, model: str | None = None, data: str | None = None, quick: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Run the demo and write results.json, curves.png and report.md.

    Args:
        out: directory; the runs lie in it, and a demo that was stopped goes on from them.
        model: a directory or hub id; None for SmolLM2-135M-Instruct.
        data: a data file or hub id with answers marked "The answer is: N" or "#### N"; None for generated problems.
        quick: a reduced pass.
        seed: of data, order and initial factors.

    Returns:
        What results.json holds.

    Raises:
        PissaError: the input is wrong, or `out` holds another demo or something else.
    """
    quieten()
    start = time.perf_counter()
    plan = QUICK if quick else FULL
    settings = {"model": model, "data": data, "quick": quick, "seed": seed}
    _check_output(out, settings)
    task = _task(data, plan, seed)
    base = str(model or smollm2())
    check_model_directory(base)
    check_is_base(base)
    with make_progress() as progress:
        tokenizer = load_tokenizer(base)
        task = replace(task, template=resolve_template("auto", tokenizer))
        untouched = load_base(base, dtype=torch.float32).eval()
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / SETTINGS, settings)
        before = _scores(untouched, tokenizer, task, plan, progress, "base")
        del untouched
        runs = []
        for name, method, learning_rate in _arms():
            recipe = replace(plan.recipe(method, learning_rate, seed), template=task.template)
            result = train(base, task.train, out / name, recipe, label=_label(method, learning_rate), progress=progress)
            runs.append(_run_record(name, method, result, before, tokenizer, task, plan, progress))
        export = _check_export(base, out / "pissa", tokenizer, task, progress)
        learned = _learned(task, before[0].samples, _measured(out / "pissa")["samples"])
    results = {
        "runs": runs,
        "learned": learned,
        "export": export,
        "seconds": time.perf_counter() - start,
        "peak_memory_gib": _peak_memory_gib(),
        "task": {
            "name": task.name,
            "held_out": len(task.held_out),
            "new_tokens": _longest(task, plan),
            "base_cut": sum(not sample["ended"] for sample in before[0].samples),
            "settings": settings,
        },
        "versions": package_versions(),
        "hardware": hardware(),
    }
    with output_files(out, last="results.json") as partial:
        draw_curves(runs, partial / "curves.png", title=f"{task.name}, rank {plan.rank}, seed {seed}")
        (partial / "report.md").write_text(demo_report(results), encoding="utf-8")
        write_json(partial / "results.json", results)
    return results


def _arms() -> tuple[tuple[str, str, float], ...]:
    return (
        ("pissa", "pissa", LEARNING_RATE),
        ("lora", "lora", LEARNING_RATE),
        ("lora-tuned", "lora", 10 * LEARNING_RATE),
    )


def _label(method: str, learning_rate: float) -> str:
    return f"{ {'pissa': 'PiSSA', 'lora': 'LoRA'}[method] } lr {learning_rate:g}"


def _check_output(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a directory that holds something other than this demo. Nothing is written."""
    resumable = Resumable(out, out / SETTINGS, "demo", "writing", DemoSettings)
    before = resumable.read()
    if before is not None:
        resumable.check_same(before, settings)


def _peak_memory_gib() -> float:
    """The largest resident memory that this process and its finished children had, in GiB."""
    import resource

    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * (1 if sys.platform == "darwin" else 1024) / 2**30


def _task(data: str | None, plan: Plan, seed: int) -> Task:
    if data is None:
        rows, held_out = make_problems(seed, plan.train, plan.held_out)
        unseen = tuple(not row["seen_template"] for row in held_out)
        examples, tested = ([example_from_row(row) for row in each] for each in (rows, held_out))
        return Task("arithmetic word problems", examples, tested, unseen)
    examples = read_examples(data)
    if len(examples) < plan.held_out + plan.batch_size:
        raise DataError(f"{data} has {len(examples)} rows; the demo needs {plan.held_out + plan.batch_size} or more")
    return Task(Path(data).name, examples[: -plan.held_out], examples[-plan.held_out :])


def _scores(
    model: Any, tokenizer: Any, task: Task, plan: Plan, progress: Progress, label: str
) -> tuple[Evaluation, float]:
    """Exact match and mean loss on the held-out problems; adapters are merged, which doubles the speed."""
    if isinstance(model, PeftModel):
        model.merge_adapter()  # pyright: ignore[reportCallIssue] -- LoraModel's, reached through PeftModel
    bar = progress.add_task(f"{label}, test", total=len(task.held_out), note="")
    log = SampleLog()

    def advance(done: int, _: int) -> None:
        if done <= BATCH:  # the first ones: something to see while the others are made
            sample = log.in_order()[0]
            said = f"{question(task, sample)}\n  {label}: {_verdict(sample)}"
            progress.console.print(said, markup=False, highlight=False, soft_wrap=True)
        progress.update(bar, completed=done)

    options = EvaluationOptions(max_new_tokens=_longest(task, plan), batch_size=BATCH, template=task.template)
    with stage(f"{label}, test"):
        match = find_task("gsm8k").run(model, tokenizer, task.held_out, options, log=log, progress=advance)
        progress.update(bar, note=f"{match.value:.0%} right")
        return match, held_out_loss(model, tokenizer, task.held_out, template=task.template).mean


def _longest(task: Task, plan: Plan) -> int:
    """Tokens after which an answer is cut: worked solutions of the generated problems are short."""
    return plan.new_tokens if task.unseen is not None else 256


def question(task: Task, sample: Mapping[str, Any]) -> str:
    """What the held-out problem of a sample asks, in one line."""
    messages = task.held_out[sample["index"]].messages
    return on_one_line(messages[-2].content) if len(messages) > 1 else f"problem {sample['index'] + 1}"


def _verdict(sample: Mapping[str, Any]) -> str:
    """What a model answered, in one line, and whether that is right."""
    return f"{on_one_line(sample['generated'])[:LONGEST]} ({'right' if sample['correct'] else 'wrong'})"


def _learned(task: Task, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first held-out problem that the base gets wrong and the trained model right: the question, and what each
    answers; nothing where there is none."""
    for base, trained in zip(before, after, strict=True):
        if trained["correct"] and not base["correct"]:
            return [question(task, base), _verdict(base), _verdict(trained)]
    return []


def _run_record(
    name: str,
    method: str,
    result: RunResult,
    before: tuple[Evaluation, float],
    tokenizer: Any,
    task: Task,
    plan: Plan,
    progress: Progress,
) -> dict[str, Any]:
    seen = result.results
    path = result.directory / HELD_OUT
    if not path.is_file():
        model = result.model if result.model is not None else _load_run(result)
        match, loss = _scores(model, tokenizer, task, plan, progress, _label(method, seen["learning_rate"]))
        write_json(path, {"loss": loss, "samples": match.samples})
    after = _measured(result.directory)
    correct = [sample["correct"] for sample in after["samples"]]
    return {
        "name": name,
        "label": _label(method, seen["learning_rate"]),
        "method": method,
        "learning_rate": seen["learning_rate"],
        "rank": seen["rank"],
        "seed": seen["seed"],
        "losses": seen["losses"],
        "grad_norms": seen["grad_norms"],
        "tokens_per_second": seen["tokens_per_second"],
        "init_seconds": seen["init_seconds"],
        "exact_match_before": before[0].value,
        "exact_match_after": statistics.fmean(correct),
        "exact_match_after_by_template": _by_template(correct, task),
        "held_out_loss_before": before[1],
        "held_out_loss_after": after["loss"],
    }


def _measured(run: Path) -> dict[str, Any]:
    """What a finished run's held_out.json holds."""
    remedy = "remove it, and the same command measures again"
    return read_document(run / HELD_OUT, HeldOut, error=OutputError, remedy=remedy)


def _load_run(result: RunResult) -> Any:
    from ...adapted.load import load

    return load(result.directory, load_base(result.results["base"], dtype=torch.float32)).eval()


def _by_template(correct: Sequence[bool], task: Task) -> dict[str, float] | None:
    if task.unseen is None:
        return None
    groups: Mapping[str, list[bool]] = {
        "seen": [c for c, unseen in zip(correct, task.unseen, strict=True) if not unseen],
        "unseen": [c for c, unseen in zip(correct, task.unseen, strict=True) if unseen],
    }
    return {name: statistics.fmean(values) for name, values in groups.items() if values}


def _check_export(base: str, run: Path, tokenizer: Any, task: Task, progress: Progress) -> dict[str, Any]:
    """Logits of the trained model (residual and adapter) against those of plain PEFT on the untouched base."""
    from ...adapted.load import load

    label = "export, loaded by PEFT"
    bar = progress.add_task(label, total=1, note="")
    texts = [prompt_text(example, tokenizer, task.template) for example in task.held_out[:4]]
    prompts = {str(i): torch.tensor([ids]) for i, ids in enumerate(token_ids(texts, tokenizer))}
    trained = load(run, load_base(base, dtype=torch.float32)).eval()
    with torch.no_grad():
        expected = {name: trained(input_ids=ids).logits for name, ids in prompts.items()}
    with stage(label), tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "prompts.safetensors"), Path(scratch, "logits.safetensors")
        save_file(prompts, asked)
        command = [sys.executable, "-c", FRESH_PROCESS, base, str(run), str(asked), str(answered)]
        outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise RuntimeError(f"plain PEFT could not load {run}:\n{outcome.stderr}")
        found = load_file(answered)
    progress.update(bar, completed=1)
    config = read_adapter_config(run)
    return {
        "max_abs_logit_difference": max(float((found[name] - expected[name]).abs().max()) for name in prompts),
        "max_abs_logit": max(float(logits.abs().max()) for logits in expected.values()),
        "rank": config.r,
        "directory": run.name,
    }
