"""Exports of pruned networks: who can load them, what they compute, and that the network stays as it was."""

from __future__ import annotations

import copy
import os
import signal
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune import ConfigurationError, load_pruned
from lightning_prune.cli import main
from lightning_prune.export import export
from tests.fits import SmallNet, equal, fit, images, pruning, small_net, surface
from tests.helpers import difference, run

SAMPLES = images(seed=5).tensors[0][:3]


class Habits(SmallNet):
    """Logs, reads the Trainer, counts and collects in ``forward``, and keeps a frozen part in evaluation mode."""

    def __init__(self, width=12, optimizer="adamw"):
        super().__init__(width, optimizer)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, images):
        self.log("mean", images.mean())
        self.calls += 1
        self.seen.append(images)
        self.last = self.net(images)
        return self.last * self.trainer.max_epochs


@pytest.fixture(scope="module")
def pruned():
    """A pruned module, still attached to its Trainer."""
    return fit(pruning(), module=Habits(), epochs=2)[0]


def onnx_outputs(path, *inputs):
    """What onnxruntime makes of a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


def outputs(network, *args, **kwargs):
    """All tensors among the outputs of anything that can be called."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(network(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def pt2_outputs(path, *args, **kwargs):
    """What torch makes of an exported program."""
    return outputs(torch.export.load(path).module(), *args, **kwargs)


def left_in(folder):
    """Names of all files in a folder, with those of folders in it."""
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture
def quiet():
    """Any warning of ours is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*(export|compared)")
        yield


class Chain(SmallNet):
    """A network whose class can be built in any widths."""

    def __init__(self, widths=(12, 24)):
        super().__init__()
        first, second = widths
        self.net = nn.Sequential(
            nn.Conv2d(2, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 3),
        )  # fmt: skip


def test_a_state_dict_loads_into_the_class_built_small_and_into_full_width(tmp_path):
    module, _ = fit(pruning(), module=Chain(), epochs=2)
    file = export(module, "state_dict", None, tmp_path / "new" / "small.ckpt")
    assert file == tmp_path / "new" / "small.pt"
    assert file.stat().st_size < 4 * sum(t.numel() for t in module.state_dict().values()) + 10_000
    state = torch.load(file, weights_only=True)
    assert equal(dict(state), dict(module.state_dict()))
    assert state._metadata == module.state_dict()._metadata
    found = module.net[0].out_channels, module.net[3].out_channels
    assert sum(found) < 36
    small = Chain(found)
    small.load_state_dict(state)
    torch.save({"state_dict": state}, tmp_path / "wrapped.ckpt")
    full = load_pruned(tmp_path / "wrapped.ckpt", Chain())
    for loaded in (small, full):
        assert equal(run(loaded, SAMPLES), run(module, SAMPLES))


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_a_fitted_network_is_exported_exactly_and_left_as_it_was(pruned, form, tmp_path, quiet):
    module = pruned
    module.train()
    module.net[1].eval()
    before, state = surface(module), copy.deepcopy(module.state_dict())
    modes = {name: part.training for name, part in module.named_modules()}
    attached, seen, random = module._trainer, list(module.seen), torch.get_rng_state()
    last = module.last
    file = export(module, form, SAMPLES[:1], tmp_path / "net.ckpt")
    assert left_in(tmp_path) == [f"net.{form}"]
    assert surface(module) == before
    assert equal(module.state_dict(), state)
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert module._trainer is attached
    assert module.last is last
    assert len(module.seen) == len(seen)
    assert torch.equal(torch.get_rng_state(), random)
    reference = copy.deepcopy(module.net)
    for batch in (1, 3, 7):
        inputs = torch.randn(batch, *SAMPLES.shape[1:])
        expected = [2 * output for output in run(reference, inputs)]
        if form == "pt2":
            assert equal(pt2_outputs(file, inputs), expected)
        else:
            assert difference(expected, onnx_outputs(file, inputs)) <= 1e-5


class Nested(nn.Module):
    """Takes tokens and a dict, one of them by keyword only; returns nested things, not all of them tensors."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens, mask=None, *, extra, scale=None):
        hidden = (self.embedding(tokens) * mask["keep"][..., None]).mean(1) + extra
        return {"logits": self.head(hidden), "hidden": [hidden, None, tokens.shape[0]]}

    def example(self, batch):
        keep = torch.ones(batch, 5)
        return {
            "extra": torch.rand(batch, 1),
            "mask": {"keep": keep},
            "tokens": torch.arange(5 * batch).view(-1, 5) % 7,
        }


def test_tokens_keyword_arguments_and_nested_outputs(tmp_path, quiet):
    net = Nested()
    net.example_input_array = net.example(2)
    file = export(net, "pt2", None, tmp_path / "nested")
    for example in (net.example(1), net.example(5)):
        assert equal(pt2_outputs(file, **example), outputs(net, **example))
    file = export(net, "onnx", None, tmp_path / "nested")
    inputs = [example["tokens"], example["mask"]["keep"], example["extra"]]
    assert difference(outputs(net, **example), onnx_outputs(file, *inputs)) <= 1e-5


class OneDict(nn.Linear):
    """Takes a batch that is a dict."""

    def forward(self, batch):
        return super().forward(batch["x"])


class OneTuple(nn.Linear):
    """Takes a batch that is a tuple."""

    def forward(self, batch):
        return super().forward(batch[0]) + batch[1]


class WithTable(nn.Linear):
    """Takes a tensor that is no batch."""

    def forward(self, x, table):
        return super().forward(x) @ table


class WithRow(nn.Linear):
    """Takes a tensor that serves the whole batch."""

    def forward(self, x, row):
        return (super().forward(x) + row).masked_fill(x[:, :3] > 0.5, float("-inf"))


@pytest.mark.parametrize(
    ("kind", "example", "other"),
    [
        (OneDict, {"x": torch.rand(2, 4)}, ({"x": torch.rand(5, 4)},)),
        (OneTuple, (torch.rand(2, 4), torch.rand(2, 3)), ((torch.rand(5, 4), torch.rand(5, 3)),)),
        (WithTable, (torch.rand(1, 4), torch.rand(3, 3)), (torch.rand(5, 4), torch.rand(3, 3))),
        (WithRow, [torch.rand(4, 4), torch.rand(1, 3)], (torch.rand(6, 4), torch.rand(1, 3))),
        (nn.LSTM, torch.rand(1, 6, 4), (torch.rand(5, 6, 4),)),
    ],
)
def test_what_a_forward_may_take(kind, example, other, tmp_path, quiet):
    net = nn.LSTM(4, 3, batch_first=True) if kind is nn.LSTM else kind(4, 3)
    file = export(net, "pt2", example, tmp_path / "net")
    assert equal(pt2_outputs(file, *other), outputs(net, *other))
    if kind is nn.LSTM:
        assert net._flat_weights[0] is net.weight_ih_l0


class Pair(nn.Module):
    """Can only take two samples at once."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x).reshape(2, 3)


def test_a_network_that_fixes_its_batch_size_says_so_once_and_is_exported(tmp_path):
    net, x = Pair(), torch.rand(2, 4)
    with pytest.warns(UserWarning, match="Pair is exported only for the sizes of the example: .*'x'.*fixed") as said:
        file = export(net, "pt2", x, tmp_path / "pair")
    assert len([warning for warning in said if "exported" in str(warning.message)]) == 1
    assert said[0].filename == __file__
    assert equal(pt2_outputs(file, x), run(net, x))


def test_limits_of_the_batch_size_are_told(tmp_path):
    net = Choosy()
    with pytest.warns(UserWarning, match="only for some batch sizes: the size of 'x' must be at least 4"):
        file = export(net, "pt2", torch.rand(6, 4), tmp_path / "choosy")
    assert equal(pt2_outputs(file, torch.ones(9, 4)), run(net, torch.ones(9, 4)))


class Choosy(nn.Module):
    """Computes something else for small batches."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) if x.shape[0] > 3 else -self.fc(x)


def test_sizes_are_fixed_on_request_without_a_warning(tmp_path, quiet):
    x = torch.rand(2, 4)
    file = export(Pair(), "pt2", x, tmp_path / "pair", dynamic_batch=False)
    program = torch.export.load(export(nn.Linear(4, 3), "pt2", x, tmp_path / "fixed", dynamic_batch=False))
    assert pt2_outputs(file, x)[0].shape == (2, 3)
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(torch.rand(3, 4))


def test_what_was_compiled_is_exported_as_it_was_before(tmp_path, quiet):
    module = small_net()
    names = set(module.state_dict())
    module.net[3] = torch.compile(module.net[3], backend="eager")
    compiled = torch.compile(module, backend="eager")
    state = torch.load(export(compiled, "state_dict", None, tmp_path / "net"), weights_only=True)
    assert set(state) == names
    assert equal(run(small_net_from(state), SAMPLES), run(module, SAMPLES))
    file = export(compiled, "pt2", SAMPLES, tmp_path / "net")
    assert set(torch.export.load(file).state_dict) == names
    assert equal(pt2_outputs(file, SAMPLES), run(module, SAMPLES))
    assert "_orig_mod" in module.net[3]._modules


def small_net_from(state):
    """A network with the weights of a state dict."""
    module = small_net(seed=9)
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype, tmp_path, quiet):
    module = small_net().to(dtype)
    state = torch.load(export(module, "state_dict", None, tmp_path / "net"), weights_only=True)
    assert state["net.0.weight"].dtype is dtype
    file = export(module, "pt2", SAMPLES, tmp_path / "net")  # the example is in single precision
    assert equal(pt2_outputs(file, SAMPLES.to(dtype)), run(module, SAMPLES.to(dtype)))


def test_half_precision_is_compared_as_far_as_it_goes(tmp_path, quiet):
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).half()
    x = torch.rand(2, 4).half()
    assert (
        difference(
            [t.float() for t in run(net, x)],
            [t.float() for t in onnx_outputs(export(net, "onnx", x, tmp_path / "net"), x)],
        )
        < 0.01
    )


def test_in_inference_mode(tmp_path, quiet):
    module = small_net()
    with torch.inference_mode():
        file = export(module, "pt2", torch.rand_like(SAMPLES), tmp_path / "net")
    assert equal(pt2_outputs(file, SAMPLES), run(module, SAMPLES))


class Noisy(nn.Module):
    """Random in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) + torch.rand(3)


def test_a_random_network_is_not_compared(tmp_path):
    with pytest.warns(UserWarning, match="Noisy draws random numbers"):
        assert export(Noisy(), "pt2", torch.rand(2, 4), tmp_path / "noisy").is_file()


class TwoFaced(nn.Module):
    """Computes a little more when it is compiled or exported."""

    def __init__(self, more):
        super().__init__()
        self.fc, self.more = nn.Linear(4, 3), more

    def forward(self, x):
        return self.fc(x) * (1 + self.more) if torch.compiler.is_compiling() else self.fc(x)


@pytest.mark.parametrize(("form", "more"), [("pt2", 2e-5), ("pt2", 0.5), ("onnx", 2e-5)])
def test_a_difference_is_an_error_that_names_the_figure_and_keeps_the_old_file(form, more, tmp_path):
    (tmp_path / f"net.{form}").write_text("old")
    figure = {2e-5: r"(1\.9|2|2\.1)e-05", 0.5: r"0\.5"}[more]
    words = rf"exported TwoFaced does not compute the same.*\(2, 4\) its outputs differ by {figure} of the largest"
    with pytest.raises(ConfigurationError, match=words):
        export(TwoFaced(more), form, torch.rand(2, 4), tmp_path / "net")
    assert left_in(tmp_path) == [f"net.{form}"]
    assert (tmp_path / f"net.{form}").read_text() == "old"


class Stateful(nn.Module):
    """Has a state that only pickling could keep."""

    def get_extra_state(self):
        return pytest.raises

    def set_extra_state(self, state):
        pass


def lazy():
    """A network that does not know its sizes."""
    return nn.LazyLinear(3)


def on_meta():
    """A network without values."""
    return nn.Linear(4, 3, device="meta")


@pytest.mark.parametrize(
    ("make", "form", "example", "words"),
    [
        (Pair, "onx", torch.rand(2, 4), "unknown export format 'onx': did you mean 'onnx'"),
        (Pair, "pt2", None, "give an example input of Pair.forward, or set `example_input_array`"),
        (
            Pair,
            "pt2",
            torch.rand(2, 5),
            r"Pair.forward failed on the example, \(2, 5\) of torch.float32: mat1 and mat2",
        ),
        (Nested, "pt2", torch.rand(2, 5), r"Nested.forward\(tokens, .*does not take the example: .*'extra'"),
        (lazy, "state_dict", None, "'weight' of LazyLinear has no values yet, for it is lazy: run one batch"),
        (on_meta, "state_dict", None, "'weight' of Linear has no values yet, for it is on the meta device"),
        (Stateful, "state_dict", None, "state of Stateful holds more than tensors and plain values"),
    ],
)
def test_refusals_leave_no_file(make, form, example, words, tmp_path):
    with pytest.raises(ConfigurationError, match=words):
        export(make(), form, example, tmp_path / "net")
    assert left_in(tmp_path) == []


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"folder.*it is a folder; name a file in it"):
        export(Pair(), "state_dict", None, tmp_path / "folder")
    with pytest.raises(ConfigurationError, match=r"cannot write .*file"):
        export(Pair(), "state_dict", None, tmp_path / "file" / "net.pt")
    assert export(Pair(), "state_dict", None, tmp_path / "net.pth").name == "net.pth"


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf'\({package}\): pip install "lightning-prune\[export\]"'):
        export(Pair(), "onnx", torch.rand(2, 4), tmp_path / "net")
    assert left_in(tmp_path) == []


class Deadly(torch.Tensor):
    """Ends the process in the middle of writing a file."""

    def __reduce_ex__(self, protocol):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "net.pt").write_text("old")
    net = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500))
    net.register_buffer("deadly", torch.rand(3).as_subclass(Deadly))
    child = os.fork()
    if not child:
        export(net, "state_dict", None, tmp_path / "net.pt")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "net.pt").read_text() == "old"


def said(capsys, *words):
    """Exit status of the command, what it printed, and what it complained about."""
    try:
        status = main(["export", *words])
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    return status, out.strip(), err


OWN = """
import lightning as L, torch

class Tokens(L.LightningModule):
    def __init__(self, width):  # no default, not saved: only --init knows it
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(9, width), torch.nn.Flatten(), torch.nn.Linear(5 * width, 3))
    def forward(self, tokens):
        return self.net(tokens)

def make(width):
    return Tokens(width)
"""


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, used = fit(pruning(), module=SmallNet(width=8), epochs=2)
    used.save_checkpoint("epoch=1-val=0.97")
    expected = run(module, SAMPLES)
    net = ["tests.fits.SmallNet", "epoch=1-val=0.97", "--shape", "[1,2,6,6]"]
    for form, suffix in (("pt2", ".pt2"), ("onnx", ".onnx")):
        status, out, err = said(capsys, *net, "--format", form)
        assert (status, out) == (0, f"epoch=1-val=0.97{suffix}"), err
    assert equal(pt2_outputs("epoch=1-val=0.97.pt2", SAMPLES), expected)
    assert difference(expected, onnx_outputs("epoch=1-val=0.97.onnx", SAMPLES)) <= 1e-5
    assert said(capsys, *net[:2], "--format", "state_dict", "--out", "made/small.pt")[:2] == (0, "made/small.pt")
    assert equal(dict(torch.load("made/small.pt", weights_only=True)), dict(module.state_dict()))
    words = [*net, "--dynamic_batch", "false", "--out", "fixed"]
    assert said(capsys, *words)[:2] == (0, "fixed.pt2")
    with pytest.raises((AssertionError, RuntimeError)):
        pt2_outputs("fixed.pt2", SAMPLES)


def test_the_command_line_makes_what_only_the_user_knows_how_to(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_tokens.py").write_text(OWN)
    from lightning import Trainer

    monkeypatch.syspath_prepend(str(tmp_path))
    from own_tokens import Tokens

    module = Tokens(4)
    used = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=0)
    used.strategy.connect(module)
    used.save_checkpoint("net.ckpt")
    tokens = torch.arange(15).view(3, 5) % 9
    for name in ("Tokens", "make"):
        words = [f"own_tokens.{name}", "net.ckpt", "--init", '{"width": 4}', "--shape", "[1,5]", "--dtype", "int64"]
        status, out, err = said(capsys, *words)
        assert (status, out) == (0, "net.pt2"), err
        assert equal(pt2_outputs("net.pt2", tokens), run(module, tokens))
    status, _, err = said(capsys, "own_tokens.Tokens", "net.ckpt", "--shape", "[1,5]")
    assert status == 2
    assert "net.ckpt does not hold width, which Tokens is made with" in err
    assert "--init" in err
    status, _, err = said(capsys, *words[:-1], "int46")
    assert status == 2
    assert "unknown dtype 'int46'" in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["missing.ckpt"], "the checkpoint missing.ckpt does not exist"),
        (["folder"], "the checkpoint folder is a folder, not a checkpoint file"),
        (["damaged.ckpt"], "damaged.ckpt"),
        (["foreign.ckpt"], "foreign.ckpt"),
        (["other.ckpt"], "other.ckpt"),
        (["other.pt", "--format", "state_dict"], "would overwrite the checkpoint other.pt"),
        (["other.ckpt", "--format", "onx"], "did you mean 'onnx'"),
    ],
)
def test_the_command_line_says_what_is_wrong(words, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 and no more")
    torch.save([1, 2], "foreign.ckpt")
    for name in ("other.ckpt", "other.pt"):
        torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "pytorch-lightning_version": "2.6.0"}, name)
    there = left_in(tmp_path)
    status, _, err = said(capsys, "tests.fits.SmallNet", *words, "--shape", "[1,2,6,6]")
    assert status == 2
    assert err.startswith("lightning-prune: ")
    assert hint in err
    assert left_in(tmp_path) == there
