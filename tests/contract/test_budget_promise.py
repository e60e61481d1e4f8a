"""What was asked is what went: channels to one, parameters and MACs to 2 %, counted without this library."""

from __future__ import annotations

import pytest

from lightning_prune import Linear
from tests.fits import fit, images, loader, macs, parameters, pruning, small_net, widths

SAMPLES = images(seed=5).tensors[0]
CRITERIA = ["l1", "l2", "bn_scale", "taylor", "fpgm", "random"]
SCOPES = ["global", "group", "isomorphic"]


def prune(**arguments):
    module = small_net(width=40)
    before = {"channels": sum(widths(module)), "params": parameters(module), "macs": macs(module, SAMPLES)}
    callback = pruning(**arguments)
    fit(callback, module=module, data=loader(2), epochs=1)
    after = {"channels": sum(widths(module)), "params": parameters(module), "macs": macs(module, SAMPLES)}
    return before, after, callback.report


@pytest.mark.parametrize("of", ["channels", "params", "macs"])
@pytest.mark.parametrize(("criterion", "scope"), zip(CRITERIA, SCOPES * 2, strict=True))
def test_the_request_is_met(of, criterion, scope):
    schedule = Linear(0, 1, 1, "step")
    before, after, report = prune(remove=0.6, of=of, criterion=criterion, scope=scope, schedule=schedule)
    if of == "channels":
        assert abs(after["channels"] - 0.4 * before["channels"]) <= 1
    else:
        assert 1 - after[of] / before[of] == pytest.approx(0.6, abs=0.02)
    assert report.reached == pytest.approx(1 - after[of] / before[of], abs=1e-9)


@pytest.mark.parametrize("of", ["params", "macs"])
def test_what_is_reported_is_what_is_there(of):
    before, after, report = prune(remove=0.3, of=of, schedule=Linear(0, 1, 1, "step"), shrink="end")
    assert (report.before.channels, report.after.channels) == (before["channels"], after["channels"])
    assert (report.before.parameters, report.after.parameters) == (before["params"], after["params"])
    assert (report.before.macs, report.after.macs) == (before["macs"], after["macs"])
    assert sum(group.after for group in report.groups) == after["channels"]


def test_masks_alone_make_nothing_smaller_and_the_report_says_so():
    before, after, report = prune(remove=0.5, of="macs", schedule=Linear(0, 1, 1, "step"), shrink="never")
    assert after == before
    assert report.after.macs == before["macs"]
    assert report.reached == pytest.approx(0.5, abs=0.02)
    assert sum(group.after for group in report.groups) < before["channels"]
    assert any("masks only" in note for note in report.notes)
