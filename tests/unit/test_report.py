"""The report: its exact text, its files, and its way there and back."""

from __future__ import annotations

import builtins
import csv
import json

import pytest

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import Refusal
from lightning_prune.report import GroupWidth, PruneReport, Request, Round, Totals

REPORT = PruneReport(
    groups=(GroupWidth("net.stem", 32, 8), GroupWidth("net.stage1.0.conv1", 64, 64)),
    before=Totals(
        channels=96, parameters=701_466, macs=12_345_678, checkpoint_bytes=2_807_100, latency_seconds=0.00152
    ),
    after=Totals(channels=72, parameters=120_300, macs=4_100_000, checkpoint_bytes=481_200, latency_seconds=0.00083),
    requested=Request(0.6, "macs"),
    reached=0.6679,
    refused=(Refusal("net.head", "its output leaves the network"),),
    notes=("the first note",),
    history=(Round(2, 38, 0.3), Round(8, 152, 0.6679)),
)

TABLE = """\
channel group       before  after  removed
net.stem                32      8    75.0%
net.stage1.0.conv1      64     64     0.0%

whole network    before     after  removed
channels             96        72    25.0%
parameters      701.5 k   120.3 k    82.9%
MACs            12.35 M   4.100 M    66.8%
checkpoint     2.807 MB  0.481 MB    82.9%
latency        1.520 ms  0.830 ms    45.4%

requested 60.0% of MACs, reached 66.8%
in 2 rounds, epoch 2 (step 38) to epoch 8 (step 152)

stays whole
  net.head: its output leaves the network

notes
  the first note"""


def without(monkeypatch, package):
    """Make the import of a package fail, as where it is not installed."""
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_table_is_exactly_this_text():
    assert REPORT.table() == TABLE == str(REPORT)


def test_table_of_a_network_without_groups_says_so_and_leaves_out_what_is_unknown():
    report = PruneReport(groups=(), before=Totals(0, 50), after=Totals(0, 50))
    assert report.table() == (
        "no channel group: nothing in this network can be pruned\n\n"
        "whole network  before  after  removed\n"
        "channels            0      0        -\n"
        "parameters         50     50     0.0%"
    )


def test_table_fits_100_columns_however_long_names_and_reasons_are():
    name = "backbone." + "very_long_name." * 9 + "conv1"
    report = PruneReport(
        groups=(GroupWidth(name, 100_000, 50_000),),
        before=Totals(1, 1),
        after=Totals(1, 1),
        refused=(Refusal("fc", "because of this " * 20),),
        notes=("so it is " * 30,),
    )
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("backbone.very_long_…")
    assert lines[1].endswith("_long_name.conv1  100000  50000    50.0%")


def test_one_round_is_told_once():
    report = PruneReport((), Totals(1, 1), Totals(1, 1), history=(Round(3, 40, 0.5),))
    assert report.table().endswith("in 1 round, epoch 3 (step 40)")


def test_csv_holds_groups_and_totals_in_plain_units(tmp_path):
    REPORT.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[:3] == [
        ["kind", "name", "before", "after", "removed"],
        ["group", "net.stem", "32", "8", "0.75"],
        ["group", "net.stage1.0.conv1", "64", "64", "0.0"],
    ]
    assert rows[3] == ["total", "channels", "96", "72", "0.25"]
    assert rows[-1] == ["total", "latency_seconds", "0.00152", "0.00083", "0.453947"]


def test_json_gives_the_same_report_back(tmp_path):
    REPORT.to_json(tmp_path / "report.json")
    assert PruneReport.from_json(tmp_path / "report.json") == REPORT


def test_report_without_optional_parts_gives_itself_back():
    report = PruneReport(groups=(), before=Totals(0, 50), after=Totals(0, 50))
    assert PruneReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_report_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read a pruning report from .*nowhere: No such file"):
        PruneReport.from_json(tmp_path / "nowhere")
    (tmp_path / "pruned.ckpt").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ConfigurationError, match=r"pruned\.ckpt does not hold a pruning report"):
        PruneReport.from_json(tmp_path / "pruned.ckpt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "does not hold a pruning report"),
        ("[]", "does not hold a pruning report"),
        ('{"version": 7}', "its version is 7"),
        ('{"version": 1}', "damaged: 'groups'"),
    ],
)
def test_a_file_that_is_no_report_is_named(tmp_path, text, words):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"other\.json") as caught:
        PruneReport.from_json(path)
    assert words in str(caught.value)


def test_figure_draws_each_width_and_each_cost():
    totals, widths = REPORT.figure().axes
    assert [label.get_text() for label in widths.get_yticklabels()] == ["net.stem", "net.stage1.0.conv1"]
    assert [bar.get_width() for bar in widths.patches] == [32, 64, 8, 64]
    assert [text.get_text() for text in widths.texts] == ["32 → 8", "64"]
    assert [bar.get_width() for bar in totals.patches[5:7]] == pytest.approx([0.75, 120_300 / 701_466])
    assert totals.texts[4].get_text() == "1.520 ms → 0.830 ms"


def test_save_writes_the_four_files(tmp_path):
    assert REPORT.save(tmp_path / "new" / "folder") == []
    written = {file.name: file for file in (tmp_path / "new" / "folder").iterdir()}
    assert written.keys() == {"report.txt", "report.csv", "report.json", "widths.png"}
    assert written["report.txt"].read_text(encoding="utf-8") == TABLE + "\n"
    assert written["widths.png"].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_figure_names_the_extra_and_save_goes_on(tmp_path, monkeypatch):
    without(monkeypatch, "matplotlib")
    with pytest.raises(ConfigurationError, match=r"lightning-prune\[plots\]"):
        REPORT.figure()
    (note,) = REPORT.save(tmp_path)
    assert "widths.png" in note
    assert {file.name for file in tmp_path.iterdir()} == {"report.txt", "report.csv", "report.json"}
