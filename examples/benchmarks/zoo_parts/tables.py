"""The records of all backends side by side, as Markdown."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
_WORDS = (
    "exact",
    "norm-exact",
    "scale-exact",
    "norm-inexact",
    "WRONG",
    "unconfirmed",
    "no evidence",
    "nothing removed",
    "other",
)
_ATTENTION = re.compile(
    r"vit|former|swin|beit|deit|cait|coat|convit|crossvit|davit|eva|focalnet|gcvit|hiera|levit|maxv|mvit|nest|pit_|pvt|"
    r"tnt|twins|volo|xcit|botnet|Attention|MHA|Transformer",
    re.IGNORECASE,
)
_LONGEST_REASONS = 4
MOST_PARAMETERS = 400_000_000
"""Size of the largest models that are looked at unless told otherwise."""


def read_rows(files: Iterable[Path]) -> list[Row]:
    """All records of some JSON lines files, compressed or not; a file that is not there has none."""
    texts = [
        gzip.decompress(f.read_bytes()).decode() if f.suffix == ".gz" else f.read_text() for f in files if f.exists()
    ]
    return [json.loads(line) for text in texts for line in text.splitlines() if line]


def table(rows: Sequence[Row]) -> str:
    """The whole page. Of several records of the same model, backend and settings the last one counts."""
    records = rows
    rows = list({(row["suite"], _backend(row), row["model"]): row for row in rows}.values())
    if not rows:
        return "# Model zoos\n\nNo records.\n"
    parts = [
        "# Model zoos: every backend, one judge",
        _introduction(rows),
        "## Commands\n\n" + _commands(records),
        "## Pass counts\n\n" + _pass_counts(rows),
        "## Same models\n\n" + _same_models(rows),
        "## Time, memory and what was removed\n\n" + _medians(rows),
        "## Failures by cause\n\n" + _failures(rows),
        "## Networks with attention: what can be pruned, what stays whole and why\n\n" + _attention(rows),
        "## Every model\n\n" + _appendix(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(rows: Sequence[Row]) -> str:
    versions = {package: number for row in rows for package, number in row.get("versions", {}).items()}
    return f"""Each model was pruned in its own process and judged by the same code, which finds surviving entries by \
the values of the weights alone, zeroes the others in the original, and compares outputs (detectors: the outputs of \
every module whose shape is unchanged, the heads' among them, up to the first selection that near ties decide).

* *exact*: the largest difference is below 1e-7 of the largest output in float64 (1e-4 in float32 where only that runs).
* *unconfirmed*: below 1e-4 in float32, above 1e-7 in float64: a very faint error, or float32 steps inside the network.
* *norm-exact*: so once LayerNorm, GroupNorm, RMSNorm of the masked original take their statistics over kept channels.
* *scale-exact*: and attention uses the scale of the pruned head width.
* *norm-inexact*: norms were pruned and even that differs. *WRONG*: runs, and computes something else.
* *no evidence*: equal, but masking changed the outputs by less than 1e-3. *other*: not judged, with the reason below.
* *verified*: one of the three kinds of exact, and something was removed; *partial*: verified, less than 30 % removed.
* *train step*: in train mode with two samples every parameter that had a gradient has one, and a step of SGD runs; \
only of models whose original can.

Versions: {", ".join(f"{package} {number}" for package, number in versions.items())}."""


def _commands(rows: Sequence[Row]) -> str:
    suites: dict[str, set[str]] = {}
    models: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        options = "".join(
            f" --{key} {row[key]}"
            for key, usual in (("ratio", 0.5), ("norms", "exact"), ("seed", 0), ("max_params", MOST_PARAMETERS))
            if row.get(key, usual) != usual
        ).replace("_", "-")
        limits = f" --timeout {row['timeout']} --memory {row['memory']:g}"
        line = f"python examples/benchmarks/zoo.py --suite {row['suite']} --backend {row['backend']}{options}{limits}"
        suites.setdefault(row["suite"], set()).add(row["model"])
        models.setdefault((row["suite"], line), {})[row["model"]] = None
    runs = [
        line + ("" if len(found) == len(suites[suite]) else " --models " + ",".join(found)) + f" --out {number}.jsonl"
        for number, ((suite, line), found) in enumerate(models.items())
    ]
    last = "python examples/benchmarks/zoo.py --table *.jsonl --out examples/results/zoo.md"
    return "```\npip install 'lightning-prune[zoo,peers]'\n" + "\n".join([*runs, last]) + "\n```"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[Any]], numbers_from: int = 2) -> str:
    marks = ["---" if column < numbers_from else "--:" for column in range(len(header))]
    cells = [header, marks, *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _backend(row: Row) -> str:
    extras = [row["norms"] + " norms"] if row["norms"] != "exact" else []
    extras += [f"{row['ratio']:.0%}"] if row["ratio"] != 0.5 else []
    extras += [f"seed {row['seed']}"] if row["seed"] != 0 else []
    return row["backend"] + (f" ({', '.join(extras)})" if extras else "")


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _by_suite_and_backend(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    return _grouped(rows, lambda row: (row["suite"], _backend(row)))


def _pass_counts(rows: Sequence[Row]) -> str:
    header = ["suite", "backend", "models", "traced", "shrunk", "forward runs", *_WORDS, "failed", "timeout", "skipped"]
    header += ["train step", "traced again", "**verified**", "partial"]
    lines = []
    for (suite, backend), found in _by_suite_and_backend(rows).items():
        words = Counter(row["verdict"] for row in found)
        steps = [row["train_step"] for row in found if row.get("train_step") is not None]
        again = [row["retraced"] for row in found if row.get("retraced") is not None]
        counts = [sum(bool(row.get(key)) for row in found) for key in ("traced", "shrunk", "forward_runs")]
        counts += [words[word] for word in (*_WORDS, "failed", "timeout", "skipped")]
        shares = [f"{sum(steps)} of {len(steps)}", f"{sum(again)} of {len(again)}" if again else "-"]
        verified, partial = (sum(bool(row.get(key)) for row in found) for key in ("verified", "partial"))
        lines.append([suite, backend, len(found), *counts, *shares, f"**{verified}**", partial])
    return _markdown(header, lines)


def _same_models(rows: Sequence[Row]) -> str:
    header = [
        "suite",
        "backends",
        "common models",
        "verified by the first",
        "by the second",
        "only first",
        "only second",
    ]
    lines = []
    for (suite, _, _), found in _grouped(rows, lambda row: (row["suite"], row["ratio"], row["norms"])).items():
        results = {
            backend: {row["model"]: bool(row.get("verified")) for row in own if row["verdict"] != "skipped"}
            for backend, own in _grouped(found, _backend).items()
        }
        for (first, a), (second, b) in combinations(results.items(), 2):
            common = sorted(set(a) & set(b))
            only = [[m for m in common if a[m] and not b[m]], [m for m in common if b[m] and not a[m]]]
            counts = [len(common), sum(a[m] for m in common), sum(b[m] for m in common)]
            lines.append([suite, f"{first} / {second}", *counts, *(", ".join(names) or "-" for names in only)])
    return _markdown(header, lines) if lines else "One backend only."


def _middle(rows: Iterable[Row], read: Callable[[Row], float | None], form: str) -> str:
    values = [value for row in rows if (value := read(row)) is not None]
    return format(median(values), form) if values else "-"


def _seconds(row: Row) -> float | None:
    parts = [row.get("trace_seconds"), row.get("shrink_seconds")]
    return None if None in parts else sum(parts)


def _forwards(row: Row) -> float | None:
    seconds = _seconds(row)
    return None if seconds is None else seconds / max(row["forward_seconds"], 1e-3)


def _medians(rows: Sequence[Row]) -> str:
    header = [
        "suite",
        "backend",
        "trace s",
        "shrink s",
        "both s",
        "both, longest s",
        "both / forward",
        "extra memory MB",
    ]
    header += ["share removed", "share prunable"]
    lines = []
    for (suite, backend), found in _by_suite_and_backend(rows).items():
        done = [row for row in found if row.get("shrunk")]
        verified = [row for row in found if row.get("verified")]
        lines.append(
            [
                suite,
                backend,
                _middle(done, lambda row: row["trace_seconds"], ".2f"),
                _middle(done, lambda row: row["shrink_seconds"], ".2f"),
                _middle(done, _seconds, ".2f"),
                f"{max((_seconds(row) for row in done), default=0):.1f}",
                _middle(done, _forwards, ".1f"),
                _middle(done, lambda row: row.get("peak_extra_mb"), ".0f"),
                _middle(verified, lambda row: row.get("share_removed"), ".2f"),
                _middle(done, lambda row: row.get("share_prunable"), ".2f"),
            ]
        )
    return (
        "Medians over the models whose pruning call returned (share removed: over the verified ones). CPU seconds of "
        "one thread; memory is the peak resident size above that before the call. How both compare at 224 x 224 "
        "pixels, measured in turns in one process, is in [speed.md](speed.md).\n\n" + _markdown(header, lines)
    )


def _cause(row: Row) -> str:
    verdict = row["verdict"]
    if verdict in ("WRONG", "norm-inexact", "unconfirmed", "no evidence", "nothing removed", "skipped"):
        return verdict
    text = re.sub(r"[\[(][-\d\s,x.]*[\])]", "[..]", str(row.get("error")).splitlines()[0] if row.get("error") else "")
    text = re.sub(r"'[^']*'", "'..'", re.sub(r"\d+(\.\d+)?", "N", text))[:140]
    place = f" ({row['error_at']})" if row.get("error_at") else ""
    kind = f"{row['error_type']}: " if row.get("error_type") else ""
    return f"{verdict} in {row.get('stage', 'start')}: {kind}{text}{place}"


def _failures(rows: Sequence[Row]) -> str:
    parts = []
    for (suite, backend), found in _by_suite_and_backend(rows).items():
        failed = _grouped((row for row in found if not row.get("verified")), _cause)
        lines = [
            f"* **{len(group)}** × `{cause}`: {', '.join(sorted(row['model'] for row in group))}"
            for cause, group in sorted(failed.items(), key=lambda item: -len(item[1]))
        ]
        trained = [row for row in found if row.get("train_step") is False]
        lines += [f"* train step: {row['model']}: `{row.get('train_error')}`" for row in trained]
        again = [row["model"] for row in found if row.get("retraced") is False]
        lines += [f"* traced again, other groups: {', '.join(again)}"] if again else []
        if lines:
            parts.append(f"### {suite}, {backend}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) or "None."


def _attention(rows: Sequence[Row]) -> str:
    header = ["suite", "model", "backend", "share prunable", "share removed", "what stays whole: most frequent reasons"]
    lines = []
    for row in rows:
        if row.get("share_prunable") is None or not _ATTENTION.search(row["model"]):
            continue
        reasons = Counter(_reason(reason) for _, reason in row.get("refusals", []))
        examples = {_reason(reason): path for path, reason in reversed(row.get("refusals", []))}
        said = "; ".join(
            f"{count} × {reason} (e.g. `{examples[reason]}`)" for reason, count in reasons.most_common(_LONGEST_REASONS)
        )
        shares = [f"{row['share_prunable']:.2f}", f"{row.get('share_removed', 0):.2f}"]
        lines.append([row["suite"], row["model"], _backend(row), *shares, said or "-"])
    return _markdown(header, lines, 3) if lines else "None among the records."


def _reason(reason: str) -> str:
    """The reason without sizes, so that equal ones count as one."""
    return re.sub(r"[\[(][-\d\s,]*[\])]", "[..]", reason)


def _appendix(rows: Sequence[Row]) -> str:
    backends = list(dict.fromkeys(_backend(row) for row in rows))
    parts = []
    for suite, found in _grouped(rows, lambda row: row["suite"]).items():
        lines = []
        for model, own in _grouped(found, lambda row: row["model"]).items():
            cells = {_backend(row): _cell(row) for row in own}
            sizes = [row["parameters"] for row in own if "parameters" in row]
            size = f"{sizes[0] / 1e6:.1f}" if sizes else "-"
            lines.append([model, size, *(cells.get(backend, "") for backend in backends)])
        parts.append(f"### {suite}\n\n" + _markdown(["model", "million parameters", *backends], lines, 1))
    legend = "verdict, relative error; share removed; CPU seconds of trace + shrink / forward; T: no train step."
    return legend + "\n\n" + "\n\n".join(parts)


def _cell(row: Row) -> str:
    said = row["verdict"]
    if row.get("relative_error") is not None:
        said += f" {row['relative_error']:.0e}; {row['share_removed']:.0%}"
    if (seconds := _seconds(row)) is not None:
        said += f"; {seconds:.1f}/{row['forward_seconds']:.2f} s"
    return said + (" T" if row.get("train_step") is False else "")
