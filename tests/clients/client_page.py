"""docs/clients.md and docs/clients.json, from what the tests of the clients measured.

python tests/clients/client_page.py      writes docs/clients.md again from docs/clients.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
DATA, PAGE = DOCS / "clients.json", DOCS / "clients.md"
TITLES = {
    "vllm": "vLLM",
    "llama-cpp": "llama.cpp (and what builds on it: Ollama)",
    "peft-oldest": "PEFT, the oldest release that loads our exports",
    "peft-newest": "PEFT, the newest release",
    "llama-factory": "LLaMA-Factory",
}
HEAD = """# In the programs that people use

Written by `make test-clients`, which sets up an environment for each program, gives it exports of a short SmolLM2 run
(rank 8, 4 steps) and of tiny models with an adapter of every kind, and holds what it computes against transformers and
PEFT in fp32: log-probabilities of greedy continuations (3 prompts of 12 tokens), and the tokens themselves. "Base off
by" is the control: how far the base without the adapter is from the same reference. Figures are as measured. A GGUF in
few bits may be off by three times what the same rounding of weights, and of what goes into each layer, costs in
transformers. Of a continuation only tokens up to the first that differs are compared.
"""


@dataclass
class Check:
    """One comparison."""

    what: str
    """The way to use it, in words."""
    subject: str
    """Model and variant."""
    difference: float | None = None
    """Largest absolute difference of a log-probability, in nats; None for a check that is no comparison."""
    bound: float | None = None
    """What was allowed."""
    control: float | None = None
    """The same difference of the base alone."""
    tokens_equal: bool | None = None
    """Whether all greedy tokens are the same."""
    said: str = ""
    """What the client said, for a refusal."""
    passed: bool = True


@dataclass
class Record:
    """What one test measured in one client."""

    client: str
    test: str
    versions: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    load: float = 0.0

    def compare(
        self,
        what: str,
        subject: str,
        found: dict[str, Any],
        reference: dict[str, Any],
        *,
        bound: float,
        base: dict[str, Any] | None = None,
        tokens: bool = True,
    ) -> None:
        """Note how far a client is from the reference; a failure is noted first, then raised.

        Args:
            found: {"tokens", "logprobs"} of the client.
            reference: the same of transformers and PEFT.
            bound: the largest difference that is allowed.
            base: the reference's of the base alone, whose difference is the control: ten times the bound at least.
            tokens: whether greedy tokens must be the same (not where weights are stored in fewer bits).
        """
        difference = largest(found, reference)
        control = largest(base, reference) if base is not None else None
        equal = found["tokens"] == reference["tokens"]
        good = difference <= bound and (equal or not tokens) and (control is None or control > 10 * bound)
        self.checks.append(Check(what, subject, difference, bound, control, equal, "", good))
        assert good, f"{what}, {subject}: off by {difference:.2e} (allowed {bound:g}), base off by {control}, {equal=}"

    def note(self, what: str, subject: str, said: str, passed: bool) -> None:
        """Note a check that is no comparison."""
        self.checks.append(Check(what, subject, said=said, passed=passed))
        assert passed, f"{what}, {subject}: {said}"

    def write(self, folder: Path) -> None:
        """Put the record where the page finds it."""
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{self.client}-{self.test}")
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def largest(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest difference of a log-probability, up to and including the first token of a prompt that differs."""
    worst = 0.0
    rows = zip(found["tokens"], found["logprobs"], reference["tokens"], reference["logprobs"], strict=True)
    for tokens, values, wanted, expected in rows:
        pairs = list(zip(tokens, values, wanted, expected, strict=True))
        same = next((place + 1 for place, (a, _, b, _) in enumerate(pairs) if a != b), len(pairs))
        worst = max([worst, *(abs(value - other) for _, value, _, other in pairs[:same] if value is not None)])
    return worst


def update(folder: Path, tests: Sequence[str]) -> None:
    """Put the records into docs/clients.json, and write the page from that; tests without a record are named there."""
    from pissa.provenance import hardware, package_versions

    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    missing = sorted(set(tests) - {record["test"] for record in records})
    document = {"versions": package_versions(), "hardware": hardware(), "records": records, "not_run": missing}
    DATA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(text(document), encoding="utf-8")


def text(document: dict[str, Any]) -> str:
    """The page."""
    own = document["versions"]
    shown = ", ".join(f"{name} {own[name]}" for name in ("pissa", "torch", "transformers", "peft") if own.get(name))
    machine = ", ".join(f"{key}: {value}" for key, value in document["hardware"].items() if value)
    lines = [HEAD, f"Reference: {shown}. Machine: {machine}.", ""]
    for client, title in TITLES.items():
        records = [record for record in document["records"] if record["client"] == client]
        lines += [f"## {title}", "", *_client(records), ""]
    if document["not_run"]:
        lines += ["## Not run", "", *(f"- `{name}`" for name in document["not_run"]), ""]
    return "\n".join(lines)


def _client(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["Not run."]
    reasons = sorted({record["skipped"] for record in records if record["skipped"]})
    lines = [f"Skipped: {reason}." for reason in reasons]
    versions = next((record["versions"] for record in records if record["versions"]), {})
    if versions:
        lines += [", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    checks = [check for record in records for check in record["checks"]]
    compared = [check for check in checks if check["difference"] is not None]
    if compared:
        lines += ["| way | model | adapters | off by at most | allowed | base off by at least | greedy tokens |"]
        lines += ["|---|---|---|---|---|---|---|", *map(_row, _grouped(compared).values()), ""]
    others = [check for check in checks if check["difference"] is None]
    if others:
        lines += ["| | model | adapters | what it said | as it should be |", "|---|---|---|---|---|"]
        for group in _grouped(others, "said", "passed").values():
            first = group[0]
            model, adapters = _names(group)
            good = "yes" if first["passed"] else "**no**"
            lines.append(f"| {first['what']} | {model} | {adapters} | {first['said']} | {good} |")
    return lines


def _grouped(checks: list[dict[str, Any]], *more: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Checks of one way and one model together, in order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for check in checks:
        model = check["subject"].partition(", ")[0]
        groups.setdefault((check["what"], model, *(check[key] for key in more)), []).append(check)
    return groups


def _names(group: list[dict[str, Any]]) -> tuple[str, str]:
    """The model of a group, and its adapters."""
    parts = [check["subject"].partition(", ") for check in group]
    return parts[0][0], ", ".join(dict.fromkeys(adapter for _, _, adapter in parts if adapter))


def _row(group: list[dict[str, Any]]) -> str:
    model, adapters = _names(group)
    controls = [check["control"] for check in group if check["control"] is not None]
    control = f"{min(controls):.2g}" if controls else "–"
    worst = max(check["difference"] for check in group)
    off = f"{worst:.1e}" if all(check["passed"] for check in group) else f"**{worst:.1e}**"
    differ = sum(not check["tokens_equal"] for check in group)
    tokens = "equal" if not differ else "differ" if differ == len(group) else f"differ in {differ} of {len(group)}"
    allowed = f"{min(check['bound'] for check in group):.1g}"
    return f"| {group[0]['what']} | {model} | {adapters} | {off} | {allowed} | {control} | {tokens} |"


if __name__ == "__main__":
    PAGE.write_text(text(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
