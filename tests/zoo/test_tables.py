"""The zoo's tables: what is counted, and which runs are compared with each other."""

from __future__ import annotations

import gzip
import json

from examples.benchmarks.zoo_parts.tables import read_rows, table


def row(model, backend="ours", verdict="exact", **more):
    settings = {"suite": "timm", "ratio": 0.5, "norms": "exact", "seed": 0, "timeout": 90, "memory": 11.0}
    reached = {"traced": True, "shrunk": True, "forward_runs": True, "verified": verdict == "exact"}
    seconds = {"forward_seconds": 0.1, "trace_seconds": 0.3, "shrink_seconds": 0.2}
    measured = {"relative_error": 1e-16, "share_removed": 0.5, "parameters": 2_000_000}
    own = {"model": model, "backend": backend, "verdict": verdict}
    return {**settings, **reached, **seconds, **measured, **own, **more}


def lines_with(text, *starts):
    return [line for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |")]


def test_verdicts_are_counted_for_each_backend():
    rows = [row("a"), row("b", verdict="WRONG"), row("a", "kirigami", "failed", shrunk=False)]
    text = table(rows)
    (ours,) = lines_with(text, "timm", "ours", "2", "2", "2", "2")
    (theirs,) = lines_with(text, "timm", "kirigami", "1", "1", "0", "1")
    assert ours.split(" | ")[6] == "1"  # exact
    assert ours.split(" | ")[10] == "1"  # WRONG
    assert theirs.split(" | ")[6] == "0"


def test_only_runs_of_one_ratio_are_compared():
    rows = [row("a"), row("a", "kirigami", "failed"), row("a", ratio=0.9), row("b", "kirigami")]
    text = table(rows)
    assert lines_with(text, "timm", "ours / kirigami", "1", "1", "0", "a", "-")
    assert "ours / ours" not in text


def test_a_model_that_was_run_twice_counts_once_as_it_came_out_last():
    assert lines_with(table([row("a", verdict="failed"), row("a")]), "timm", "ours", "1", "1", "1", "1", "1")


def test_the_commands_name_the_models_of_a_part_of_a_suite():
    commands = [line for line in table([row("a"), row("b"), row("a", ratio=0.1)]).splitlines() if "zoo.py --su" in line]
    assert "--models" not in commands[0]
    assert "--ratio 0.1" in commands[1]
    assert "--models a " in commands[1]


def test_a_model_that_was_too_large_at_first_counts_as_it_came_out_with_room():
    text = table([row("a"), row("b", verdict="skipped"), row("b", max_params=700_000_000)])
    commands = [line for line in text.splitlines() if "zoo.py --su" in line]
    assert ["--models" in command for command in commands] == [False, True]
    assert "--max-params 700000000 --models b " in commands[1].replace(" --timeout 90 --memory 11", "")
    assert lines_with(text, "timm", "ours", "2", "2", "2", "2", "2")


def test_records_are_read_compressed_or_not(tmp_path):
    text = json.dumps(row("a")) + "\n"
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = read_rows([tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz", tmp_path / "missing.jsonl"])
    assert found == [row("a"), row("a")]
