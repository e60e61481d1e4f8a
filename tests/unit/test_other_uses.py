"""Uses of the network beside the training step: what else hands something out, and parts that only later steps use."""

from __future__ import annotations

import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel

from lightning_prune import ConfigurationError, GReg, GrowAndPrune, OneShot, WeightPruning
from tests.fits import BATCHES, CLASSES, SmallNet, fit, loader, pruning, small_net, trainer, widths


class Encoder(L.LightningModule):
    """Trained to give back its input; what it is wanted for is what its encoder makes of one."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 10))
        self.decoder = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 72))

    def training_step(self, batch, batch_idx):
        return mse_loss(self.decoder(self.encoder(batch[0])), batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Forward(Encoder):
    def forward(self, images):
        return self.encoder(images)


class Validation(Encoder):
    def validation_step(self, batch):
        self.log("ninth", self.encoder(batch[0])[:, 9].mean())


class Prediction(Encoder):
    def predict_step(self, images, batch_idx):
        return self.encoder(images)


@pytest.mark.parametrize(("module", "codes"), [(Encoder, 5), (Forward, 10), (Validation, 10), (Prediction, 10)])
def test_what_only_something_else_hands_out_keeps_its_size(module, codes):
    torch.manual_seed(0)
    found, _ = fit(pruning(scope="group"), module=module(), epochs=2)
    assert found.encoder(torch.zeros(1, 2, 6, 6)).shape == (1, codes)
    assert found.decoder[0].out_features < 16


class Gallery(L.LightningModule):
    """In train mode it returns logits of two kinds, in evaluation mode the embedding that one searches with."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU())
        self.embedding, self.classes, self.parts = nn.Linear(16, 10), nn.Linear(10, CLASSES), nn.Linear(16, CLASSES)

    def forward(self, images):
        features = self.body(images)
        embedding = self.embedding(features)
        return (self.classes(embedding), self.parts(features)) if self.training else embedding

    def training_step(self, batch, batch_idx):
        logits, parts = self(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]) + nn.functional.cross_entropy(parts, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_forward_returns_in_evaluation_mode_keeps_its_size_where_the_step_works_in_train_mode_only():
    torch.manual_seed(0)
    found, _ = fit(pruning(scope="group"), module=Gallery(), epochs=2)
    assert found.eval()(torch.zeros(1, 2, 6, 6)).shape == (1, 10)
    assert found.body[1].out_features < 16


class Blind(Gallery):
    """Nothing of it runs in evaluation mode."""

    def forward(self, images):
        assert self.training
        return super().forward(images)


def test_a_network_of_which_nothing_runs_in_evaluation_mode_is_warned_of():
    with pytest.warns(UserWarning, match="nothing of the module could be run in evaluation mode.*example_input_array"):
        found, _ = fit(pruning(scope="group"), module=Blind(), epochs=2)
    assert found.body[1].out_features < 16


class Critic(L.LightningModule):
    """Another network that looks at the same images, in validation alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("quality", self.critic(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_what_only_validation_uses_is_not_pruned():
    module, _ = fit(pruning(), module=Critic(), epochs=2)
    assert module.net[1].out_features < 8
    assert module.critic[1].out_features == 8


class Unfit(SmallNet):
    """Validation wants another kind of batch."""

    def validation_step(self, batch, batch_idx):
        self.log("sum", batch["images"].sum())


def test_a_validation_step_that_takes_other_batches_is_only_noted():
    callback = pruning()
    module, _ = fit(callback, module=Unfit(), epochs=2)
    assert widths(module) != widths(small_net())
    assert any(
        reason.startswith("could not be run") for path, reason in callback.report.refused if "validation" in path
    )


class Short(SmallNet):
    """Validation works in the first epochs only."""

    def validation_step(self, batch, batch_idx):
        self.log("value", self(batch[0]).mean() * [1.0, 2.0][self.current_epoch])


def test_a_validation_step_that_fails_later_does_not_keep_the_network_whole():
    module, _ = fit(pruning(scope="group", schedule=OneShot(3, "epoch")), module=Short(), epochs=4)
    assert widths(module) == [6, 12, 12]


class Slow(Encoder):
    def predict_step(self, images, batch_idx):
        for _ in range(1000):
            images = images + 0
        return self.encoder(images)


def test_what_takes_much_longer_than_training_is_not_looked_at():
    with pytest.warns(UserWarning, match="predict_step of Slow executes more than 20 times as many operators"):
        module, _ = fit(pruning(scope="group"), module=Slow(), epochs=2)
    assert module.encoder[3].out_features == 5


class Late(SmallNet):
    """A second head joins at some epoch."""

    def __init__(self, joins):
        super().__init__()
        self.joins, self.second = joins, nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        hidden = self.net[:9](batch[0])
        loss = nn.functional.cross_entropy(self.net[9:](hidden), batch[1])
        return loss + self.second(hidden).square().mean() if self.current_epoch >= self.joins else loss


def warned_in(joins, at):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = pruning(schedule=OneShot(at, "epoch"), scope="group")
        module, _ = fit(callback, module=Late(joins), epochs=4)
    return module, callback, " ".join(str(warning.message) for warning in caught)


def test_a_part_that_joined_before_the_round_is_cut_along_and_keeps_its_own_channels():
    module, callback, said = warned_in(joins=1, at=2)
    assert widths(module) == [6, 12, 12]
    assert (module.second[0].in_features, module.second[0].out_features) == (12, 8)
    assert "did not use second.0.weight, second.0.bias" in said
    assert ("second.0.weight (dim 0)", "was not used when the fit began") in callback.report.refused
    assert callback.report.after.channels == 30


def test_a_part_that_joins_after_the_round_was_warned_of():
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        pytest.warns(UserWarning, match="did not use"),
    ):
        fit(pruning(schedule=OneShot(1, "epoch")), module=Late(joins=2), epochs=4)


class Averaged(SmallNet):
    """Averages its own weights, and validates with the average."""

    def __init__(self):
        super().__init__()
        self.average = AveragedModel(self.net)

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.net)


def test_an_average_that_no_cut_reaches_is_refused_at_the_start():
    module = Averaged()
    with pytest.raises(ConfigurationError, match=r"Averaged.average averages weights of the module by itself"):
        fit(pruning(), module=module, epochs=2)
    assert widths(module) == widths(small_net())
    fit(pruning(shrink="end"), module=module, epochs=2)
    assert module.average.module[0].out_channels == 12


def test_one_callback_serves_a_network_after_the_other():
    callback = pruning()
    for seed in range(2):
        module = small_net(seed)
        trainer(callback, epochs=2, num_sanity_val_steps=1).fit(module, loader(), loader(1))
        assert widths(module) != widths(small_net())


def test_a_second_fit_of_the_same_network_says_that_nothing_is_left_to_do(caplog):
    caplog.set_level("INFO")
    callback, module = pruning(), small_net()
    for told in (False, True):
        trainer(callback, epochs=2).fit(module, loader())
        assert ("no round is left, as all that was to go is gone" in caplog.text) == told


@pytest.mark.parametrize("other", [WeightPruning(remove=0.5), GrowAndPrune(), GReg(remove=0.5)])
def test_a_fit_is_not_resumed_by_another_method(tmp_path, other):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=BATCHES + 3)
    fit(pruning(schedule=OneShot(1, "epoch")), save, epochs=2, enable_checkpointing=True)
    name = re.escape(type(other).__name__)
    with pytest.raises(ConfigurationError, match=f"that ChannelPruning has written, but has {name} for a callback"):
        trainer(other, epochs=3).fit(small_net(), loader(), ckpt_path=tmp_path / f"step={BATCHES + 3}.ckpt")


class OtherBatches(Validation):
    """Is validated on batches of another kind than those of training."""

    def validation_step(self, batch, batch_idx):
        self.log("ninth", self.encoder(batch["images"])[:, 9].mean())


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("own_loader", [True, False])
def test_validation_steps_are_looked_at_on_batches_of_their_own(sanity, own_loader):
    held_out = torch.utils.data.DataLoader([{"images": torch.randn(2, 6, 6)} for _ in range(8)], batch_size=4)
    module, how = OtherBatches(), {"epochs": 2, "num_sanity_val_steps": sanity}
    if own_loader:
        module.val_dataloader = lambda: held_out
    fitting = trainer(callback := pruning(scope="group"), **how)
    fitting.fit(module, loader(), *([] if own_loader else [held_out]))
    assert module.encoder[3].out_features == 10
    assert module.decoder[0].out_features < 16
    assert not any("validation_step" in path for path, _ in callback.report.refused)


def test_a_validation_step_that_cannot_be_looked_at_is_warned_of():
    with pytest.warns(UserWarning, match="validation_step could not be run on a batch"):
        fit(pruning(scope="group"), module=OtherBatches(), epochs=2, limit_val_batches=0)
