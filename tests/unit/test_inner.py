"""Equal positions of every head (or block) instead of whole ones, where the user chooses so."""

from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_prune import ChannelPruning, ConfigurationError, OneShot, load_pruned
from lightning_prune.cli import main
from lightning_prune.cost import CostModel
from lightning_prune.errors import ShrinkError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.surgery import shrink, trace
from lightning_prune.surgery.transaction import Transaction
from tests.helpers import Net, difference, masked_copy, random_keep, randomise, run

HEADS, HEAD_DIM = 3, 8


class Fused(nn.Module):
    """Queries, keys and values from one layer; the scale is that of the heads' width unless one is given."""

    def __init__(self, attend, scale=None):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, 5)
        self.heads, self.scale, self.attend = HEADS, scale, attend

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v, self.scale).transpose(1, 2).reshape(b, n, -1))


class Separate(nn.Module):
    """A layer each for queries, keys and values; all are reshaped without the width of a head being remembered."""

    def __init__(self, attend, scale=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, HEADS * HEAD_DIM) for _ in range(3))
        self.proj = nn.Linear(HEADS * HEAD_DIM, 5)
        self.heads, self.scale, self.attend = HEADS, scale, attend

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj(self.attend(q, k, v, self.scale).transpose(1, 2).flatten(2))


class OneHeadDim(Separate):
    """All three are reshaped by the width that the module remembers."""

    def __init__(self, attend, scale=None):
        super().__init__(attend, scale)
        self.head_dim = HEAD_DIM

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)


def fused_attention(q, k, v, scale):
    return functional.scaled_dot_product_attention(q, k, v, scale=scale)


def by_hand(q, k, v, scale):
    """The scale multiplies the queries."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def divided(q, k, v, scale):
    """The root of the width divides the scores."""
    root = math.sqrt(q.shape[-1]) if scale is None else 1 / scale
    return (q @ k.transpose(-2, -1) / root).softmax(-1) @ v


ATTENTIONS = [fused_attention, by_hand, divided]


def positions(graph, name, tensor):
    """Positions along the rows of a tensor of each unit of a group."""
    return next(s.index.tolist() for s in graph.groups[name].slots if (s.tensor, s.dim) == (tensor, 0))


def in_every_head(pieces=1):
    """Positions of each unit where equal positions of every head of each piece go."""
    return [[h * HEAD_DIM + d for h in range(pieces * HEADS)] for d in range(HEAD_DIM)]


def group_of(graph, tensor):
    return next(n for n, g in graph.groups.items() if any((s.tensor, s.dim) == (tensor, 0) for s in g.slots))


def shrunk_equals(net, graph, x, keep, scale=None):
    """Shrink; compare with the masked network, whose scale is given by hand if it moves. Returns the effect."""
    full = run(net, x)
    masked = masked_copy(net, graph, keep)
    if scale is not None:
        masked.scale = scale
    expected = run(masked, x)
    result = shrink(net, graph, keep)
    assert result.error is not None
    assert difference(expected, run(net, x)) < 1e-5
    return difference(full, expected)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_whole_heads_go_by_default(attend):
    graph = trace(Fused(attend), torch.randn(2, 7, 6))
    assert positions(graph, "qkv", "qkv.weight")[0][:HEAD_DIM] == list(range(HEAD_DIM))
    assert graph.groups["qkv"].width == HEADS


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_fused_heads_get_narrower_under_a_stored_scale(attend, share):
    net, x = Fused(attend, scale=HEAD_DIM**-0.5), torch.randn(2, 7, 6)
    graph = trace(net, x, inner=["qkv"])
    assert positions(graph, "qkv", "qkv.weight") == in_every_head(3)
    assert not graph.groups["qkv"].approximate
    keep = random_keep(graph, share)
    assert shrunk_equals(net, graph, x, keep) > 1e-3
    assert net.qkv.out_features == 3 * HEADS * len(keep["qkv"])
    assert net.heads == HEADS


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_values_alone_get_narrower_where_the_scale_must_not_move(attend):
    net, x = Separate(attend), torch.randn(2, 7, 6)
    graph = trace(net, x, inner=["q", "v"])
    assert list(graph.groups) == ["v"]
    assert positions(graph, "v", "v.weight") == in_every_head()
    reason = next(reason for path, reason in graph.refused if path == "q.weight (dim 0)")
    assert "computes with a number that the full network does not have there" in reason
    assert "norms='approximate'" in reason
    assert shrunk_equals(net, graph, x, random_keep(graph)) > 1e-3
    assert (net.q.out_features, net.v.out_features) == (HEADS * HEAD_DIM, HEADS * HEAD_DIM // 2)


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_scale_may_follow_the_kept_width(attend, share):
    net, x = Separate(attend), torch.randn(2, 7, 6)
    graph = trace(net, x, norms="approximate", inner=["q", "v"])
    queries, values = group_of(graph, "q.weight"), group_of(graph, "v.weight")
    assert group_of(graph, "k.weight") == queries != values
    assert positions(graph, queries, "q.weight") == positions(graph, values, "v.weight") == in_every_head()
    assert (graph.groups[queries].approximate, graph.groups[values].approximate) == (True, False)
    keep = random_keep(graph, share)
    expected_without = run(masked_copy(net, graph, keep), x)
    shrunk_equals(net, graph, x, keep, scale=len(keep[queries]) ** -0.5)
    assert difference(expected_without, run(net, x)) > 1e-4  # the scale did move


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_a_width_that_all_heads_share_is_cut_for_all(attend):
    net, x = OneHeadDim(attend), torch.randn(2, 7, 6)
    assert trace(net, x, inner=["q"]).groups == {}  # the values have the same width as the queries
    graph = trace(net, x, norms="approximate", inner=["q"])
    (name,) = graph.groups
    for layer in "qkv":
        assert positions(graph, name, f"{layer}.weight") == in_every_head()
    keep = random_keep(graph)
    shrunk_equals(net, graph, x, keep, scale=len(keep[name]) ** -0.5)
    assert net.head_dim == len(keep[name])


@pytest.mark.parametrize("named", ["q", "k", "q.weight"])
def test_any_of_those_that_meet_may_be_named(named):
    graph = trace(Separate(by_hand, 0.3), torch.randn(2, 7, 6), inner=[named])
    assert group_of(graph, "q.weight") == group_of(graph, "k.weight") != group_of(graph, "v.weight")
    assert positions(graph, group_of(graph, "k.weight"), "k.weight") == in_every_head()


def test_the_shrunk_network_is_traced_alike():
    net, x = Separate(fused_attention), torch.randn(2, 7, 6)
    graph = trace(net, x, norms="approximate", inner=["[qkv]"])
    shrink(net, graph, random_keep(graph))
    again = trace(net, x, norms="approximate", inner=["[qkv]"])
    assert again.widths == {name: width // 2 for name, width in graph.widths.items()}
    shrink(net, again, {name: [0] for name in again.groups})
    assert trace(net, x, norms="approximate", inner=["[qkv]"]).groups == {}


def wrong_power(q, k, v, scale):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.3).softmax(-1) @ v


def wrong_number(q, k, v, scale):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1] + 1)).softmax(-1) @ v


def wrong_width(q, k, v, scale):
    """What is scaled goes by another way than a product over the scaled width."""
    return (q @ k.transpose(-2, -1)).softmax(-1) @ (v * v.shape[-1] ** -0.5)


def wrong_way(q, k, v, scale):
    """The square root of the width grows where it ought to shrink."""
    return (q @ k.transpose(-2, -1) * math.sqrt(q.shape[-1])).softmax(-1) @ v


def added(q, k, v, scale):
    return ((q * q.shape[-1] ** -0.5 + k) @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize("attend", [wrong_power, wrong_number, wrong_width, wrong_way, added])
def test_a_number_that_does_not_follow_as_a_scale_does_is_refused(attend):
    net, x = Separate(attend), torch.randn(2, 7, 6)
    graph = trace(net, x, norms="approximate", inner=["q", "v"])
    whole = "v.weight" if attend is wrong_width else "q.weight"
    assert [reason for path, reason in graph.refused if path == f"{whole} (dim 0)"]
    assert not any(group.approximate for group in graph.groups.values())
    shrunk_equals(net, graph, x, random_keep(graph))


def test_the_scale_of_a_linear_layer_is_no_attention():
    net = Net(lambda n, x: n.b((y := n.a(x)) * y.shape[-1] ** -0.5), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert trace(net, torch.randn(3, 4), norms="approximate").groups == {}


def test_a_masked_network_with_another_scale_is_noticed(monkeypatch):
    """The proof by numbers stands by itself: without the new scale in the masked network it fails."""
    net, x = Separate(fused_attention), torch.randn(2, 7, 6)
    with torch.no_grad():
        net.q.weight.mul_(8)
    graph = trace(net, x, norms="approximate", inner=["q"])
    proven = Transaction.prove

    def forgets(self):
        proven(self)
        self.scales = {}

    monkeypatch.setattr(Transaction, "prove", forgets)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        shrink(net, graph, random_keep(graph))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def grouped_queries():
    """More heads of queries than of keys and values."""

    def forward(net, x):
        q = net.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for layer in (net.k, net.v))
        return net.o(((q @ k.transpose(-2, -1)) * 0.4).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    return Net(forward, q=nn.Linear(6, 24), k=nn.Linear(6, 12), v=nn.Linear(6, 12), o=nn.Linear(24, 3))


def linear_attention():
    def forward(net, x):
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return net.o((torch.relu(q) @ (torch.relu(k).transpose(-2, -1) @ v)).transpose(1, 2).flatten(2))

    return Net(forward, q=nn.Linear(6, 24), k=nn.Linear(6, 24), v=nn.Linear(6, 24), o=nn.Linear(24, 3))


def cosine_attention():
    def forward(net, x):
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        return net.o((q @ k.transpose(-2, -1) * net.heat).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(6, 24), "k": nn.Linear(6, 24), "v": nn.Linear(6, 24), "o": nn.Linear(24, 3)}
    return Net(forward, heat=nn.Parameter(torch.rand(3, 1, 1) + 1), **parts)


@pytest.mark.parametrize("make", [grouped_queries, linear_attention, cosine_attention])
def test_other_attentions(make):
    net, x = make(), torch.randn(2, 7, 6)
    graph = trace(net, x, inner=["[qkv]"])
    queries, values = group_of(graph, "q.weight"), group_of(graph, "v.weight")
    assert group_of(graph, "k.weight") == queries != values
    assert len({len(unit) for unit in positions(graph, queries, "q.weight")}) == 1
    assert positions(graph, queries, "q.weight")[0][1] == graph.groups[queries].width
    assert shrunk_equals(net, graph, x, random_keep(graph)) > 1e-3


def normed_queries():
    """A weight for each position, shared by all heads, after a norm over the positions."""

    def forward(net, x):
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        attention = (net.norm(q) @ net.norm(k).transpose(-2, -1) * 0.4).softmax(-1)
        return net.o((attention @ v).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(6, 24), "k": nn.Linear(6, 24), "v": nn.Linear(6, 24), "o": nn.Linear(24, 3)}
    return randomise(Net(forward, norm=nn.LayerNorm(8), **parts))


def test_norms_over_the_positions():
    x = torch.randn(2, 7, 6)
    exact = trace(normed_queries(), x, inner=["[qkv]"])
    assert all(graph_slot.tensor not in ("q.weight", "norm.weight") for graph_slot in exact.groups["v"].slots)
    net = normed_queries()
    graph = trace(net, x, norms="approximate", inner=["[qkv]"])
    queries = group_of(graph, "norm.weight")
    assert positions(graph, queries, "q.weight") == in_every_head()
    assert graph.groups[queries].approximate
    assert shrink(net, graph, random_keep(graph)).error < 1e-5
    assert net.norm.normalized_shape == (4,)


def test_grouped_convolutions_and_a_shuffle():
    def forward(net, x):
        y = torch.relu(net.a(x))
        y = y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return net.c(torch.relu(net.b(y)).mean((2, 3)))

    parts = {"a": nn.Conv2d(4, 16, 3, groups=2), "b": nn.Conv2d(16, 24, 3, groups=2), "c": nn.Linear(24, 3)}
    net, x = Net(forward, **parts), torch.randn(2, 4, 9, 7)
    assert trace(copy.deepcopy(net), x).widths.get("b", 0) <= 2
    graph = trace(net, x, inner=["a", "b"])
    assert positions(graph, "b", "b.weight") == [[d, 12 + d] for d in range(12)]
    assert shrunk_equals(net, graph, x, random_keep(graph)) > 1e-3
    assert (net.b.out_channels, net.b.groups) == (12, 2)


@pytest.mark.parametrize("inner", [(), ("qkv",)])
def test_what_it_costs(inner):
    net, x = Fused(by_hand, 0.3), torch.randn(2, 7, 6)
    names = [name for name, _ in net.named_parameters()]
    graph = trace(net, x, inner=inner)
    keep = random_keep(graph)
    predicted = CostModel(graph, names).macs({name: len(units) for name, units in keep.items()})
    shrink(net, graph, keep)
    again = trace(net, x, inner=inner)
    assert predicted == CostModel(again, names).macs(again.widths) > 0


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        y = self.embed(x)
        return self.head(self.attention(y, y, y, need_weights=False)[0])


def test_the_multihead_attention_of_torch():
    """Its embedding is its heads side by side, so that gets narrower with them; its scale follows their width."""
    net, x = Attending(), torch.randn(2, 7, 6)
    exact = trace(net, x, inner=["attention"])
    assert any(path == "attention.in_proj_weight (dim 0)" and reason for path, reason in exact.refused)
    assert list(exact.groups) == ["attention.out_proj"]
    graph = trace(net, x, norms="approximate", inner=["attention"])
    name = group_of(graph, "attention.in_proj_weight")
    assert positions(graph, name, "embed.weight") == [[d, 4 + d, 8 + d] for d in range(4)]
    assert graph.groups[name].approximate
    keep = random_keep(graph)
    masked = masked_copy(net, graph, keep)
    with torch.no_grad():  # the scale of two kept positions instead of four
        masked.attention.in_proj_weight[:12].mul_(math.sqrt(4 / 2))
        masked.attention.in_proj_bias[:12].mul_(math.sqrt(4 / 2))
    expected = run(masked, x)
    assert shrink(net, graph, keep).error < 1e-5
    assert difference(expected, run(net, x)) < 1e-5
    assert (net.attention.embed_dim, net.attention.num_heads) == (6, 3)


def test_the_name_is_checked():
    net, x = Separate(by_hand), torch.randn(2, 7, 6)
    with pytest.raises(ConfigurationError, match="unknown module in inner 'prok': did you mean 'proj'"):
        trace(net, x, inner=["q", "prok"])


def test_a_choice_without_effect_is_told():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = trace(net, torch.randn(3, 4), inner=["0"])
    assert graph.widths == {"0": 8}
    assert any(path == "0" and "was chosen for inner" in reason for path, reason in graph.refused)
    chosen = trace(Fused(by_hand, 0.3), torch.randn(2, 7, 6), inner=["qkv.weight"])
    assert not any("was chosen for inner" in reason for _, reason in chosen.refused)


def test_the_choice_outlives_a_second_trace():
    """What the network does is compared anew when it has moved on; the choice stays."""
    net, x = Separate(fused_attention), torch.randn(2, 7, 6)
    analysis = trace(net, x, norms="approximate", inner=["q"]).evidence
    anew = analysis.repeated()
    assert isinstance(anew, Analysis)
    assert {n: (g.width, g.approximate) for n, g in anew.groups.items()} == {
        n: (g.width, g.approximate) for n, g in analysis.groups.items()
    }


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.block = Separate(fused_attention)

    def forward(self, x):
        return self.block(x).mean(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(tmp_path, callback):
    L.seed_everything(0)
    module = Classifier()
    data = torch.utils.data.TensorDataset(torch.randn(48, 7, 6), torch.randint(0, 5, (48,)))
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
    return module


@pytest.mark.parametrize("shrunk", ["rounds", "end"])
def test_a_fit(tmp_path, shrunk):
    callback = ChannelPruning(
        remove=0.5,
        of="channels",
        scope="group",
        schedule=OneShot(0.5),
        shrink=shrunk,
        norms="approximate",
        inner=["block.[qv]"],
    )
    module = fitted(tmp_path, callback)
    assert module.block.q.out_features == module.block.v.out_features == HEADS * HEAD_DIM // 2
    assert module.block.heads == HEADS
    again = load_pruned(next(tmp_path.rglob("pruned.ckpt")), Classifier)
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_a_fit_says_which_name_is_wrong(tmp_path):
    with pytest.raises(ConfigurationError, match=r"did you mean 'block\.q'"):
        fitted(tmp_path, ChannelPruning(inner=["blok.q"]))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "attention_of_mine.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.qkv, self.o = torch.nn.Linear(6, 72), torch.nn.Linear(24, 5)\n"
        "    def forward(self, x):\n"
        "        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)\n"
        "        return self.o(((q @ k.mT) * 0.3).softmax(-1).matmul(v).transpose(1, 2).flatten(2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["inspect", "attention_of_mine.Mine", "--shape", "[2,7,6]"]
    assert main([*command, "--inner", "[qkv]"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("qkv")] == [
        ["qkv", "8"]
    ]
    assert main([*command, "--inner", "[qvk]"]) == 2
    assert "did you mean 'qkv'" in capsys.readouterr().err
