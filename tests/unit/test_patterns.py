"""Decision trees over signatures, the patterns in them, and what they say of units: by hand and by scikit-learn."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from lightning_prune import ConfigurationError, PatternMining, PruneError, trace
from lightning_prune.graph.program import module_programs
from lightning_prune.patterns import STATUSES, Evidence, Pattern, PatternError, evidence_of, grow_tree, mine
from lightning_prune.patterns.evidence import information
from lightning_prune.patterns.signatures import class_scores, signatures_of
from lightning_prune.probe import Probe

FEW = PatternMining(samples=8, min_samples=1, min_support=0.0)


def on(*rows):
    return torch.tensor([[int(entry) for entry in row] for row in rows], dtype=torch.bool)


# Trees ---------------------------------------------------------------------------------------------------------------


def test_a_tree_by_hand():
    # Unit 1 tells most: of four with it on three are hits, of four with it off one is. Then unit 0 tells the rest.
    signatures = on("00", "00", "00", "10", "01", "11", "11", "11")
    tree = grow_tree(signatures, torch.tensor([0, 0, 0, 1, 0, 1, 1, 1]))
    assert tree.unit == [0, -1, -1]  # unit 0 alone tells all
    assert (tree.samples, tree.hits) == ([8, 4, 4], [4, 0, 4])
    tree = grow_tree(signatures, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))
    assert tree.unit == [0, 1, -1, -1, -1]
    assert tree.children[:2] == [(1, 2), (3, 4)]
    assert [tuple(leaf) for leaf in tree.leaves()] == [
        (((0, False), (1, False)), 3, 0),
        (((0, False), (1, True)), 1, 1),
        (((0, True),), 4, 4),
    ]


def test_a_split_that_tells_nothing_by_itself_is_made_if_there_is_no_better():
    exclusive_or = grow_tree(on("00", "01", "10", "11"), torch.tensor([0, 1, 1, 0]))
    assert exclusive_or.unit == [0, 1, 1, -1, -1, -1, -1]
    assert sorted(leaf.hits for leaf in exclusive_or.leaves()) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("limits", "units"), [({"max_depth": 1}, [0, -1, -1]), ({"least": 2}, [0, -1, -1]), ({"least": 5}, [-1])]
)
def test_depth_and_size_of_leaves_are_limited(limits, units):
    signatures = on("00", "00", "00", "10", "01", "11", "11", "11")
    assert grow_tree(signatures, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), **limits).unit == units


def leaves_of_sklearn(tree):
    """Path, samples and hits of each leaf."""
    pending, found = [(0, ())], set()
    while pending:
        node, path = pending.pop()
        unit = int(tree.feature[node])
        if unit < 0:
            samples = int(tree.n_node_samples[node])
            found.add((path, samples, round(float(tree.value[node][0][1]) * samples)))
        else:
            pending.append((int(tree.children_left[node]), (*path, (unit, False))))
            pending.append((int(tree.children_right[node]), (*path, (unit, True))))
    return found


@pytest.mark.parametrize(("seed", "depth", "least"), [(0, 3, 1), (1, 5, 70), (2, 8, 100), (3, 8, 5)])
def test_the_tree_is_that_of_scikit_learn(seed, depth, least):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(12, generator=generator) * 0.8 + 0.1
    signatures = torch.rand(3000, 12, generator=generator) < rates
    evidence = signatures.double() @ torch.randn(12, generator=generator, dtype=torch.float64)
    wanted = evidence + torch.randn(3000, generator=generator) > evidence.mean()
    oracle = DecisionTreeClassifier(criterion="entropy", max_depth=depth, min_samples_leaf=least, random_state=seed)
    oracle.fit(signatures.numpy(), wanted.numpy())
    found = {tuple(leaf) for leaf in grow_tree(signatures, wanted, depth, least).leaves()}
    expected = leaves_of_sklearn(oracle.tree_)
    assert len(expected) > 6
    if seed < 3:
        assert found == expected
    else:  # small leaves make ties, which scikit-learn breaks by chance
        assert entropy(found) == pytest.approx(entropy(expected), rel=1e-2)


def entropy(leaves):
    sizes = torch.tensor([[hits, samples - hits] for _, samples, hits in leaves], dtype=torch.float64)
    shares = sizes / sizes.sum(1, keepdim=True)
    return float(-torch.xlogy(shares, shares).sum(1) @ sizes.sum(1)) / float(sizes.sum())


# Patterns ------------------------------------------------------------------------------------------------------------


def test_patterns_lose_the_units_that_they_do_not_need():
    # The tree for class 1 asks for unit 0 first (five of six right); where that is on it needs unit 1 as well.
    signatures = on("00", "00", "01", "10", "11", "11")
    patterns = mine(signatures, torch.tensor([0, 0, 0, 0, 1, 1]), FEW)
    assert patterns == [
        Pattern(((0, False),), 0, 3, 1.0),
        Pattern(((1, False),), 0, 3, 1.0),  # on the way to this leaf unit 0 was on, which does not matter
        Pattern(((0, True), (1, True)), 1, 2, 1.0),
    ]


def test_a_pattern_may_be_impure_to_the_degree_that_is_allowed():
    signatures = on(*["1"] * 10, *["0"] * 10)
    predictions = torch.tensor([1] * 9 + [0] + [0] * 10)
    assert [p.predicted for p in mine(signatures, predictions, FEW)] == [0]
    found = mine(signatures, predictions, PatternMining(8, 1, purity=0.9, min_support=0.0))
    assert found == [Pattern(((0, False),), 0, 10, 1.0), Pattern(((0, True),), 1, 10, 0.9)]


def test_a_pattern_covers_what_it_must():
    signatures = on(*["1"] * 3, *["0"] * 17)
    predictions = torch.tensor([1] * 3 + [0] * 17)
    for support, count in ((0.15, 2), (0.16, 0)):
        assert len(mine(signatures, predictions, PatternMining(8, 1, min_support=support))) == count


def test_patterns_are_what_they_say_and_none_of_their_units_is_needless():
    generator = torch.Generator().manual_seed(0)
    signatures = torch.rand(2000, 10, generator=generator) < 0.4
    predictions = (signatures[:, :4].long() * torch.tensor([1, 1, 2, 2])).sum(1)
    predictions = predictions.where(torch.rand(2000, generator=generator) > 0.02, 0)
    how = PatternMining(purity=0.95, min_support=0.01)
    patterns = mine(signatures, predictions, how)
    assert len(patterns) > 5

    def covered(literals):
        return torch.stack([signatures[:, unit] == on for unit, on in literals]).all(0)

    for pattern in patterns:
        found = predictions[covered(pattern.literals)] == pattern.predicted
        assert (pattern.support, pattern.confidence) == (len(found), pytest.approx(float(found.double().mean())))
        assert pattern.confidence >= 0.95
        assert pattern.support >= 20
        for needless in pattern.literals:
            rest = [literal for literal in pattern.literals if literal != needless]
            assert not rest or float((predictions[covered(rest)] == pattern.predicted).double().mean()) < 0.95


def test_what_is_always_predicted_needs_no_pattern():
    assert mine(on("01", "10", "11"), torch.tensor([4, 4, 4]), FEW) == []


# Units ---------------------------------------------------------------------------------------------------------------


def test_significance_by_hand():
    # Unit 0 is the prediction, one bit: two patterns that cover half of the samples each. Unit 1 is on in one of four
    # that are predicted 0 and in all that are predicted 1: H(5/8) - H(1/4)/2 bits.
    signatures = on("00", "00", "00", "01", "11", "11", "11", "11")
    predictions = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    bits = 0.954434 - 0.811278 / 2
    assert information(signatures, predictions).tolist() == pytest.approx([1.0, bits], abs=1e-6)
    found = evidence_of(signatures, predictions, FEW)
    assert found.significance.tolist() == pytest.approx([1.1, 0.1 * bits], abs=1e-6)
    assert found.mentions.tolist() == [2, 0]
    assert float(found.patterns) == 2
    assert found.on_rate.tolist() == [0.5, 0.625]
    assert found.agreement.tolist() == [[1, 0.875], [0.875, 1]]


def test_the_status_of_units_and_their_order():
    # on: the prediction, its copy, its opposite, never, always, noise, more noise
    predictions = torch.arange(400) % 2
    yes = predictions.bool()
    noise = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    never, always = torch.zeros(400, dtype=torch.bool), torch.ones(400, dtype=torch.bool)
    found = evidence_of(torch.stack([yes, yes, ~yes, never, always, *noise.T], 1), predictions)
    kinds = [STATUSES[status] for status in found.statuses()]
    assert kinds == ["significant", "duplicate", "idle", "dead", "saturated", "idle", "idle"]
    counts = {"dead": 1, "duplicate": 1, "idle": 3, "saturated": 1, "significant": 1}
    assert found.counts() == counts
    order = found.scores().argsort().tolist()
    assert order[:2] == [3, 1]
    assert sorted(order[2:4]) == [5, 6]  # noise tells less than the opposite, which no pattern needs
    assert order[4:] == [2, 4, 0]


def test_of_equal_units_the_first_stays_whatever_their_number():
    twins = torch.arange(300)[:, None].expand(-1, 3) % 2 == 0
    found = evidence_of(twins, torch.arange(300) % 2)
    assert [STATUSES[status] for status in found.statuses()] == ["significant", "duplicate", "duplicate"]


def test_units_of_which_nothing_can_be_said_are_refused():
    predictions = torch.arange(400) % 2
    for constant, never in ((True, "off"), (False, "on")):
        signatures = torch.full((400, 3), constant)
        with pytest.raises(PatternError, match=f"no unit of channel group 'net.0' is ever {never}"):
            evidence_of(signatures, predictions).check("net.0")
    noise = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(PatternError, match=r"no pattern of the units of channel group 'net.0' implies a prediction"):
        evidence_of(noise, predictions).check("net.0")
    with pytest.raises(PatternError, match=r"400 training samples are too few .*min_samples=500"):
        PatternMining().check(400)


def test_evidence_of_several_processes_is_averaged():
    one = evidence_of(on("0", "1"), torch.tensor([0, 1]), FEW)
    mean = one.averaged(lambda value: value / 2)
    assert isinstance(mean, Evidence)
    assert float(mean.on_rate) == 0.25
    assert float(mean.patterns) == float(one.patterns) / 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"purity": 0.5}, "purity must be a share"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"min_support": 1.0}, "min_support must be a share"),
        ({"positive": -0.1}, "positive must be a share"),
        ({"samples": 100}, "min_samples must be at least 1 and no more than samples"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        PatternMining(**wrong)


# Signatures ----------------------------------------------------------------------------------------------------------


class Net(L.LightningModule):
    def __init__(self, *layers, images):
        super().__init__()
        self.net, self.example_input_array = nn.Sequential(*layers), images

    def forward(self, images):
        return self.net(images)


def seen(module, **how):
    graph = trace(module, module.example_input_array)
    probe = Probe(None, module)
    # The graph must know the programs by the names that the probe gives them.
    assert probe.evaluations(1)[0].name in {p.name for p in module_programs(module, module.example_input_array)}
    settings = PatternMining(samples=len(module.example_input_array), min_samples=1, **how)
    return signatures_of(graph, probe.evaluations, list(graph.groups), settings)


def test_units_are_on_where_the_next_layer_reads_more_than_zero():
    torch.manual_seed(0)
    module = Net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), images=torch.randn(20, 4))
    found = seen(module)
    hidden = module.net[0](module.example_input_array)
    assert torch.equal(found.units["net.0"], hidden > 0)
    assert torch.equal(found.predictions, module(module.example_input_array).argmax(1))


@pytest.mark.parametrize("positive", [0.0, 0.4])
def test_a_map_is_on_where_enough_of_it_is(positive):
    torch.manual_seed(0)
    images = torch.randn(20, 1, 4, 4)
    module = Net(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3), images=images)
    maps = module.net[0](images).flatten(2)
    expected = torch.stack([(maps > 0)[..., p] for p in range(4)]).sum(0) > 4 * positive
    assert 0 < expected.float().mean() < 1
    assert torch.equal(seen(module, positive=positive).units["net.0"], expected)


def test_tokens_in_one_row_are_refused_because_they_belong_to_no_sample():
    class Tokens(Net):
        def forward(self, images):
            return self.net(images.reshape(-1, 4)).reshape(len(images), 3, 3).mean(1)

    module = Tokens(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), images=torch.randn(20, 3, 4))
    with pytest.raises(PruneError, match=r"'net.0' is given 60 rows for 20 samples.*exclude"):
        seen(module)


def test_class_scores_are_the_last_output_of_their_shape():
    body, head, other = torch.zeros(5, 64), torch.zeros(5, 3), torch.zeros(5, 4)
    outputs = {"body": body, "head": (head, {"more": torch.zeros(5, 1)}), "loss": torch.tensor(0.0)}
    assert class_scores(outputs, 5) is not None
    assert class_scores(outputs, 5).shape == (5, 3)
    assert class_scores({**outputs, "other": other}, 5).shape == (5, 4)
    assert class_scores({**outputs, "other": other}, 5, "head").shape == (5, 3)
    with pytest.raises(ConfigurationError, match="outputs='tail' is no output of this network; there are: body, head"):
        class_scores(outputs, 5, "tail")
    for shape in ((5, 1), (5, 3, 8, 8), (4, 3)):
        with pytest.raises(ConfigurationError, match=r"none of its outputs is of shape \[5, classes\].*'head'"):
            class_scores({"head": torch.zeros(shape)}, 5)
