"""Checkpoints of pruned networks: what is in them, who can load them, who is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import ConfigurationError, Linear, WeightPruning, load_pruned
from lightning_prune.checkpoint import KEY, unwrap_hooks, wrap_hooks
from tests.fits import SmallNet, equal, fit, images, loader, pruning, small_net, surface, trainer, widths
from tests.helpers import disagreeing_attributes, run

SAMPLES = images(seed=5).tensors[0]
HALF = [6, 12, 12]


class Named(SmallNet):
    """One more hyperparameter, and one that only matters for how it was made."""

    def __init__(self, width=12, optimizer="adamw", label="none"):
        super().__init__(width, optimizer)
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned module and the folder with its checkpoint."""
    torch.manual_seed(0)
    module = Named(label="trained")
    folder = tmp_path_factory.mktemp("pruned")
    fit(pruning(scope="group", directory=str(folder)), module=module, epochs=2)
    return module, folder / "pruned.ckpt"


def changed(path, folder, **changes):
    """A copy of the file whose record differs."""
    content = torch.load(path, weights_only=True)
    content[KEY].update(changes)
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_an_instance_is_loaded_in_place_whatever_its_width(pruned):
    module, path = pruned
    for width in (12, 6, 20):
        instance = Named(width=width)
        assert load_pruned(path, instance) is instance
        assert widths(instance) == HALF
        assert equal(run(instance, SAMPLES), run(module, SAMPLES))
        assert disagreeing_attributes(instance) == []


def test_a_class_gives_its_own_type_and_hyperparameters(pruned):
    module, path = pruned
    loaded = load_pruned(path, Named)
    assert type(loaded) is Named
    assert loaded.hparams == module.hparams
    assert equal(run(loaded, SAMPLES), run(module, SAMPLES))
    assert disagreeing_attributes(loaded) == []
    assert surface(loaded) == surface(Named())


def test_hyperparameters_can_be_overridden(pruned):
    loaded = load_pruned(pruned[1], Named, label="mine", map_location="cpu")
    assert loaded.hparams.label == "mine"
    with pytest.raises(ConfigurationError, match="label cannot be given when loading into an instance"):
        load_pruned(pruned[1], Named(), label="mine")


def test_strict_is_passed_on(pruned):
    class Extended(Named):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.extra = nn.Linear(2, 2)

    for model in (Extended, Extended()):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*extra\.weight"):
            load_pruned(pruned[1], model)
        assert widths(load_pruned(pruned[1], model, strict=False)) == HALF
    lenient = Extended()
    lenient.strict_loading = False
    assert widths(load_pruned(pruned[1], lenient)) == HALF


def test_map_location_is_passed_on(pruned):
    seen = []

    def location(storage, where):
        seen.append(where)
        return storage

    for model in (Named, Named()):
        seen.clear()
        load_pruned(pruned[1], model, map_location=location)
        assert seen


def test_a_class_is_left_as_it_was(pruned):
    before = dict(vars(Named))
    load_pruned(pruned[1], Named)
    with pytest.raises(ConfigurationError, match="No such file"):
        load_pruned("nowhere.ckpt", Named)
    assert dict(vars(Named)) == before


@pytest.mark.parametrize("as_class", [True, False])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, ["record is version 2", "reads version 1"]),
        ({"version": None}, ["record is version None"]),
        ({"cut": ["net.0.weight", "other.weight"]}, ["another network than this Named", "no other.weight"]),
        ({"settings": [["net.0", "sides", None, 3, 4]]}, ["this one has no number net.0.sides"]),
        ({"settings": [["other", "groups", None, 3, 4]]}, ["this one has no number other.groups"]),
    ],
)
def test_a_record_that_does_not_fit_is_refused_and_nothing_loaded(pruned, tmp_path, changes, words, as_class):
    path, instance = changed(pruned[1], tmp_path, **changes), Named()
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(ConfigurationError) as raised:
        load_pruned(path, Named if as_class else instance)
    assert [word for word in words if word not in str(raised.value)] == []
    assert equal(instance.state_dict(), before)
    assert disagreeing_attributes(instance) == []


def test_a_foreign_file_is_refused_by_the_trainer_too(pruned, tmp_path):
    class Other(SmallNet):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Sequential(self.net[4])

    module = Other()
    before, hung = copy.deepcopy(module.state_dict()), surface(module)
    with pytest.raises(ConfigurationError, match=r"another network than this Other: this one has no net\.4\.weight"):
        trainer(pruning()).fit(module, loader(), ckpt_path=pruned[1])
    assert equal(module.state_dict(), before)
    assert surface(module) == hung


def test_a_tensor_of_another_kind_is_refused(pruned):
    class Flat(Named):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.net[0] = nn.Conv1d(2, 12, 3)

    with pytest.raises(ConfigurationError, match=r"net\.0\.weight has 3 dimensions here and 4 in the file"):
        load_pruned(pruned[1], Flat())


@pytest.mark.parametrize("as_class", [True, False])
def test_a_module_made_with_other_arguments_is_refused(pruned, as_class):
    """The number of classes is no width of a channel group, so pruning cannot have changed it."""

    class TenClasses(Named):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.net[9] = nn.Linear(self.net[9].in_features, 10)

    instance = TenClasses()
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(ConfigurationError, match=r"net\.9\.weight has shape \[10, 24\] here and \[3, 12\] in the file"):
        load_pruned(pruned[1], TenClasses if as_class else instance)
    assert equal(instance.state_dict(), before)


def test_a_hook_of_the_modules_own_may_bring_a_file_into_shape(pruned):
    class TakesTheFirst(Named):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.net[9] = nn.Linear(self.net[9].in_features, 2)

        def on_load_checkpoint(self, checkpoint):
            for name in ("net.9.weight", "net.9.bias"):
                checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:2]

    assert load_pruned(pruned[1], TakesTheFirst).net[9].weight.shape == (2, 12)


def test_a_plain_module_takes_a_plain_state(tmp_path, pruned):
    torch.save(pruned[0].net.state_dict(), tmp_path / "plain.pt")
    plain = Named().net
    assert load_pruned(tmp_path / "plain.pt", plain) is plain
    assert equal(plain.state_dict(), pruned[0].net.state_dict())
    with pytest.raises(ConfigurationError, match=r"none of the names of this Sequential, but names such as 'net\.0"):
        load_pruned(pruned[1], Named().net)
    with pytest.raises(ConfigurationError, match="is not a LightningModule class"):
        load_pruned(tmp_path / "plain.pt", nn.Sequential)


@pytest.mark.parametrize("loads", [False, True])
def test_what_another_callback_prunes_afterwards_can_be_loaded(pruned, tmp_path, loads):
    """The depthwise convolution was given fewer groups by a callback that the second fit knows nothing of."""
    module = Named(label="trained")
    if loads:
        load_pruned(pruned[1], module)
    else:
        fit(pruning(scope="group"), module=module, epochs=2)
    fit(WeightPruning(remove=0.3, directory=str(tmp_path)), module=module, epochs=1)
    for again in (load_pruned(tmp_path / "pruned.ckpt", Named), load_pruned(tmp_path / "pruned.ckpt", Named())):
        assert disagreeing_attributes(again) == []
        assert equal(run(again, SAMPLES), run(module, SAMPLES))


def test_a_pruned_module_takes_a_file_from_before_with_another_callback(tmp_path):
    module = Named()
    dense = trainer()
    dense.fit(module, loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    expected = run(module, SAMPLES)
    fit(pruning(scope="group"), module=module, epochs=2)
    trainer(WeightPruning(remove=0.3)).validate(module, loader(1), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert disagreeing_attributes(module) == []
    assert equal(run(module, SAMPLES), expected)


def test_a_file_without_a_record_is_fitted_by_its_shapes(tmp_path):
    torch.save({"state_dict": Named(width=6).state_dict()}, tmp_path / "bare.ckpt")
    loaded = load_pruned(tmp_path / "bare.ckpt", Named())
    assert loaded.net[4].out_channels == 12
    assert loaded.net[9].in_features == 12


def test_a_file_that_was_never_pruned_loads_as_ever(tmp_path):
    module, used = fit(module=Named(), epochs=1)
    used.save_checkpoint(tmp_path / "dense.ckpt", weights_only=False)
    for model in (Named, Named()):
        assert equal(load_pruned(tmp_path / "dense.ckpt", model).state_dict(), module.state_dict())


@pytest.mark.parametrize("model", [Named, small_net()])
def test_a_path_without_a_checkpoint_is_refused(model, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    for path, words in [
        (
            tmp_path / "nope.ckpt",
            r"cannot read a checkpoint from .*nope\.ckpt: No such file or directory\. Give",
        ),
        (tmp_path, "cannot read a checkpoint from .*: Is a directory"),
        (__file__, r"test_checkpoint\.py is no checkpoint: it was not written by torch\.save"),
        (tmp_path / "empty.ckpt", "is damaged"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            load_pruned(path, model)


class Unsaved(SmallNet):
    """Made with what is not among the hyperparameters."""

    def __init__(self, backbone, scale):
        super().__init__()
        self.backbone, self.scale = backbone, scale()


def test_an_argument_that_is_no_hyperparameter_is_asked_for(pruned):
    words = r"does not hold backbone, scale, which Unsaved is .*load_pruned\(path, Unsaved, backbone=\.\.\., scale="
    with pytest.raises(ConfigurationError, match=words):
        load_pruned(pruned[1], Unsaved)
    assert widths(load_pruned(pruned[1], Unsaved, backbone=None, scale=int)) == HALF
    with pytest.raises(TypeError, match=r"<lambda>\(\) missing"):
        load_pruned(pruned[1], Unsaved, backbone=None, scale=lambda missing: missing)


def test_the_users_own_hook_sees_a_module_of_the_right_width(pruned):
    seen = []

    class Hooked(Named):
        def on_load_checkpoint(self, checkpoint):
            mine = self.state_dict()
            seen.append([n for n, v in checkpoint["state_dict"].items() if v.shape != mine[n].shape])
            checkpoint["state_dict"] = {name: value + 0 for name, value in checkpoint["state_dict"].items()}

    assert widths(load_pruned(pruned[1], Hooked())) == HALF
    assert widths(load_pruned(pruned[1], Hooked)) == HALF
    module = Hooked()
    trainer(pruning()).fit(module, loader(), ckpt_path=pruned[1])
    assert widths(module) == HALF
    assert seen == [[], [], []]


def test_buffers_that_are_in_no_checkpoint_come_back_too(tmp_path):
    class Scaled(Named):
        """A buffer by channel that is not saved."""

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.register_buffer("scale", torch.linspace(1, 2, 24), persistent=False)

        def forward(self, x):
            return self.net[9](self.net[:9](x) * self.scale)

    module = Scaled()
    fit(pruning(scope="group", directory=str(tmp_path)), module=module, epochs=2)
    assert module.scale.shape == (12,)
    for model in (Scaled, Scaled()):
        loaded = load_pruned(tmp_path / "pruned.ckpt", model)
        assert torch.equal(loaded.scale, module.scale)
        assert equal(run(loaded, SAMPLES), run(module, SAMPLES))
    resumed = Scaled()
    trainer(pruning(scope="group")).fit(resumed, loader(), ckpt_path=tmp_path / "pruned.ckpt")
    assert torch.equal(resumed.scale, module.scale)


def test_what_was_cut_before_a_resume_is_remembered_after_it(tmp_path):
    def one_group_in_each_round(network, level):
        name = "net.3.expand" if level <= 0.5 else "net.0"
        return {name: torch.arange(network.graph.widths[name]) % 2 == 0}

    def train(module, **arguments):
        callback = pruning(schedule=Linear(1, 2, 1, "epoch"), directory=str(tmp_path))
        callback.select = one_group_in_each_round
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer(callback, keep, enable_checkpointing=True).fit(module, loader(), **arguments)

    train(small_net())
    train(small_net(), ckpt_path=tmp_path / "epoch=1.ckpt")
    loaded = load_pruned(tmp_path / "pruned.ckpt", SmallNet)
    assert disagreeing_attributes(loaded) == []
    assert widths(loaded) == [6, 12, 24]


def test_a_subclass_named_in_the_file_is_made(pruned, tmp_path):
    content = torch.load(pruned[1], weights_only=True)
    content["hyper_parameters"].update(_instantiator="lightning.pytorch.cli.instantiate_module")
    content["hyper_parameters"]["_class_path"] = f"{Named.__module__}.{Named.__qualname__}"
    torch.save(content, tmp_path / "cli.ckpt")
    loaded = load_pruned(tmp_path / "cli.ckpt", LightningModule)
    assert type(loaded) is Named
    assert widths(loaded) == HALF


def test_hooks_set_on_the_instance_come_back():
    module, calls = small_net(), []
    module.on_save_checkpoint = own = calls.append
    before = surface(module)
    record = {"version": 1}
    for _ in range(2):
        wrap_hooks(module, record, lambda module: [])
    module.on_save_checkpoint(checkpoint := {})
    assert calls == [checkpoint]
    assert checkpoint[KEY] == record
    unwrap_hooks(module)
    assert module.on_save_checkpoint is own
    assert surface(module) == before


def test_the_record_is_plain_data(pruned):
    def kinds(value):
        if isinstance(value, dict):
            return set().union(*(kinds(item) for pair in value.items() for item in pair))
        if isinstance(value, list):
            return set().union(*map(kinds, value))
        return {type(value)}

    assert kinds(torch.load(pruned[1], weights_only=True)[KEY]) <= {str, int, float, bool, type(None), torch.Tensor}


class Holder(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


def test_a_network_among_the_hyperparameters_is_read_only_on_request(tmp_path):
    net = nn.Linear(3, 2)
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"net": net}}, tmp_path / "a.ckpt")
    for model in (Holder, Holder(nn.Linear(3, 2))):
        with pytest.raises(ConfigurationError, match=r"more than tensors and plain values.*weights_only=False"):
            load_pruned(tmp_path / "a.ckpt", model)
    loaded = load_pruned(tmp_path / "a.ckpt", Holder(nn.Linear(3, 2)), weights_only=False)
    assert torch.equal(loaded.net.weight, net.weight)
