"""Pruning through norms in a whole fit."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune import (
    BayesianPruning,
    BudgetError,
    ChannelPruning,
    ConfigurationError,
    EvolutionarySearch,
    OneShot,
    ScoringNetPruning,
    SearchAndTrain,
    SoftFilterPruning,
    load_pruned,
)
from lightning_prune.surgery import shrink, trace
from tests.helpers import difference, masked_copy, random_keep, randomise, run


class Stream(L.LightningModule):
    """A residual stream of 12 channels under layer norms, beside a hidden layer of 20."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.last = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        stream = self.embed(x)
        stream = stream + self.down(torch.relu(self.up(self.norm(stream))))
        return self.head(self.last(stream))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module, callback, tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(48, 5), torch.randint(0, 3, (48,)))
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))


def fitted(tmp_path, **arguments):
    L.seed_everything(0)
    module = Stream()
    callback = ChannelPruning(remove=0.5, of="channels", scope="group", schedule=OneShot(0.5), **arguments)
    fit(module, callback, tmp_path)
    return module, callback


def test_the_stream_stays_whole_by_default(tmp_path):
    module, callback = fitted(tmp_path)
    assert (module.embed.out_features, module.up.out_features) == (12, 10)
    assert not any("normalised over" in note for note in callback.report.notes)


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_the_stream_goes_where_approximate_norms_are_allowed(tmp_path, shrink):
    module, callback = fitted(tmp_path, norms="approximate", shrink=shrink)
    assert (module.embed.out_features, module.up.out_features) == (6, 10)
    assert module.norm.normalized_shape == module.last.normalized_shape == (6,)
    assert any("normalised over" in note for note in callback.report.notes)
    again = load_pruned(next(tmp_path.rglob("pruned.ckpt")), Stream)
    x = torch.randn(7, 5)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_a_budget_that_norms_keep_out_of_reach_is_refused_with_the_remedy(tmp_path):
    L.seed_everything(0)
    callback = ChannelPruning(remove=0.9, of="params", schedule=OneShot(0.5))
    with pytest.raises(BudgetError, match=r"norms='approximate' .* \(here embed.weight \(dim 0\)\)"):
        fit(Stream(), callback, tmp_path)
    fit(Stream(), ChannelPruning(remove=0.9, of="params", schedule=OneShot(0.5), norms="approximate"), tmp_path)


def test_no_remedy_is_named_that_is_none(tmp_path):
    callback = ChannelPruning(remove=0.999, of="params", schedule=OneShot(0.5), norms="approximate")
    with pytest.raises(BudgetError, match=r"limits\. Among what stays whole: embed\.weight \(dim 1\): "):
        fit(Stream(), callback, tmp_path)


class Attending(Stream):
    """An attention of three heads on the stream, whose width is that of its heads."""

    def __init__(self):
        super().__init__()
        del self.up, self.down
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        stream = self.norm(self.embed(x)).unflatten(0, (4, -1))
        return self.head(self.last(self.attention(stream, stream, stream, need_weights=False)[0])).flatten(0, 1)


METHODS = {
    "bayesian": lambda **more: BayesianPruning(rounds=2, **more),
    "evolution": lambda **more: EvolutionarySearch(population=4, generations=2, batches=1, **more),
    "scoring net": lambda **more: ScoringNetPruning(steps=6, rehearse=2, batches=2, **more),
    "search and train": lambda **more: SearchAndTrain(coarse=0.1, at=0.6, iterations=1, **more),
    "soft filters": lambda **more: SoftFilterPruning(at=0.9, **more),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_narrow_streams_and_heads_alike(method, tmp_path):
    L.seed_everything(0)
    module = Attending()
    with pytest.warns(UserWarning, match="nothing in Attending can be pruned"):
        fit(module, method(remove=0.5), tmp_path)
    assert module.attention.embed_dim == 12
    callback = method(
        remove=0.5, of="params", norms="approximate", inner="attention", include="*attention*", directory=str(tmp_path)
    )
    fit(module, callback, tmp_path)
    width = module.attention.embed_dim
    assert width in (3, 6, 9)
    assert module.attention.num_heads == 3
    assert module.embed.out_features == module.norm.normalized_shape[0] == width
    x = torch.randn(8, 5)
    torch.testing.assert_close(load_pruned(tmp_path / "pruned.ckpt", Attending)(x), module(x), rtol=0, atol=0)


def test_the_name_is_checked():
    with pytest.raises(ConfigurationError, match="approximate"):
        ChannelPruning(norms="aproximate")


class OneHead(nn.Module):
    """An attention that scales by the width of its queries, unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10)
        self.head, self.scale = nn.Linear(10, 3), None

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale))


def test_the_scale_of_an_attention_follows_where_approximate_results_are_allowed():
    net, x = OneHead(), torch.randn(2, 7, 6)
    assert trace(net, x).widths == {"v": 10}
    graph = trace(net, x, norms="approximate")
    assert {name: (group.width, group.approximate) for name, group in graph.groups.items()} == {
        "q": (8, True),
        "v": (10, False),
    }
    keep = random_keep(graph)
    masked = masked_copy(net, graph, keep)
    masked.scale = 4**-0.5
    expected = run(masked, x)
    assert shrink(net, graph, keep).error < 1e-5
    assert difference(expected, run(net, x)) < 1e-5


class Mixed(nn.Module):
    """Batch-norm, a group norm of single channels, and a layer norm."""

    def __init__(self, first=8, second=8):
        super().__init__()
        self.first, self.single = nn.Conv2d(2, first, 3), nn.GroupNorm(first, first)
        self.second, self.batch = nn.Conv2d(first, second, 3), nn.BatchNorm2d(second)
        self.layer, self.head = nn.LayerNorm(second), nn.Linear(second, 3)

    def forward(self, x):
        x = self.batch(self.second(self.single(self.first(x)).relu())).relu()
        return self.head(self.layer(x.mean((2, 3))))


def test_statistics_over_kept_channels_beside_norms_of_other_kinds():
    torch.manual_seed(0)
    net, x = Mixed(), torch.randn(2, 2, 9, 9)
    randomise(net)
    graph = trace(net, x, norms="approximate")
    assert {name: (group.width, group.approximate) for name, group in graph.groups.items()} == {
        "first": (8, False),
        "second": (8, True),
    }
    keep = {"first": torch.tensor([0, 2, 3, 6, 7]), "second": torch.tensor([1, 2, 5])}
    small = Mixed(5, 3)
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            value, (layer, _) = net.state_dict()[name], name.split(".")
            if layer != "head" and value.dim():
                value = value[keep["first" if layer in ("first", "single") else "second"]]
            read = {"second": "first", "head": "second"}.get(layer)
            tensor.copy_(value[:, keep[read]] if read and value.dim() > 1 else value)
    assert shrink(net, graph, keep).error < 1e-5
    assert net.single.num_groups == 5
    assert difference(run(small, x), run(net, x)) < 1e-5


class Experts(nn.Module):
    """Each row goes through the one of three layers that a gate behind a norm chooses."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.gate = nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.embed(x)
        normed = self.norm(x)
        chosen = self.gate(normed).argmax(1)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            x = x.index_add(0, rows, self.experts[number](normed[rows]))
        return self.head(x)


@pytest.mark.parametrize("seed", range(5))
def test_who_is_chosen_is_chosen_with_other_statistics_too(seed):
    torch.manual_seed(seed)
    net, x = Experts(), torch.randn(9, 5)
    graph = trace(net, x, norms="approximate")
    assert graph.groups["embed"].approximate
    shrink(net, graph, random_keep(graph))
    assert net.norm.normalized_shape == (6,)
