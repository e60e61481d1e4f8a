"""Parts of a network that only some runs reach: several traces are united, and every path is exact after a shrink."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.errors import ConfigurationError, TraceError
from lightning_prune.graph.program import Example, Program, module_programs
from lightning_prune.surgery import shrink, trace_programs
from tests.helpers import Net, difference, masked_copy, random_keep, run

INPUTS = torch.randn(5, 4)


def traced(net, inputs, *more):
    return trace_programs(net, module_programs(net, inputs, more))


def widths(graph):
    return {name: group.width for name, group in graph.groups.items()}


def unused(graph):
    return {r.path.partition(" ")[0] for r in graph.refused if r.reason == "is not used by any program that was run"}


def exact_on(net, graph, *paths, share=0.5):
    """Shrink at random; every path (a function of a network) must give what it gives when units are switched off."""
    keep = random_keep(graph, share)
    masked = masked_copy(net, graph, keep)
    shrink(net, graph, keep)
    for path in paths:
        with torch.no_grad():
            assert difference(path(masked), path(net)) < 1e-5
    assert any(len(units) < graph.groups[name].width for name, units in keep.items())


class Auxiliary(nn.Module):
    """A second head that is used in training only, on what lies in the middle."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.side, self.side_head = nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.head(F.relu(self.body(x)))
        return (out, self.side_head(F.relu(self.side(x)))) if self.training else out


def in_training(net):
    net.train()
    return list(net(INPUTS))


class TestTrainingOnly:
    def test_both_paths_are_exact(self) -> None:
        net = Auxiliary().eval()
        graph = traced(net, INPUTS)
        assert widths(graph) == {"stem": 8, "body": 6, "side": 10}
        assert {slot.tensor for slot in graph.groups["stem"].slots} >= {"body.weight", "side.weight"}
        exact_on(net, graph, lambda n: run(n, INPUTS), in_training)

    def test_without_the_training_program_it_is_reported(self) -> None:
        net = Auxiliary()
        evaluation, _ = module_programs(net, INPUTS)
        graph = trace_programs(net, [evaluation])
        assert unused(graph) == {"side.weight", "side.bias", "side_head.weight", "side_head.bias"}
        assert "side" not in graph.groups


class Skipping(nn.Module):
    """Blocks that training leaves out at random; the second one is never run in evaluation mode."""

    def __init__(self, chance):
        super().__init__()
        self.chance = chance
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.first = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.noise = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))

    def drawn(self):
        return torch.rand(()).item()

    def forward(self, x):
        x = self.stem(x)
        if not self.training or self.drawn() > self.chance:
            x = x + self.first(x)
        if self.training and self.drawn() > self.chance:
            x = x + self.noise(x)
        return self.head(x)


class SkippingByPython(Skipping):
    def drawn(self):
        return random.random()


class SkippingByNumpy(Skipping):
    def drawn(self):
        return np.random.rand()


def with_all_blocks(net):
    chance, net.chance = net.chance, -1
    net.train()
    result = [net(INPUTS)]
    net.chance = chance
    return result


class TestSkippedLayers:
    def test_a_block_that_training_skips_is_seen_in_evaluation(self) -> None:
        net = Skipping(chance=2)
        graph = traced(net, INPUTS)
        assert widths(graph) == {"stem": 8, "first.0": 12}
        assert unused(graph) == {"noise.0.weight", "noise.0.bias", "noise.2.weight", "noise.2.bias"}

    @pytest.mark.parametrize("kind", [Skipping, SkippingByPython, SkippingByNumpy])
    def test_further_runs_take_other_courses(self, kind) -> None:
        net = kind(chance=0.5)
        graph = traced(net, INPUTS, *[INPUTS] * 9)
        assert widths(graph) == {"stem": 8, "first.0": 12, "noise.0": 6}
        assert unused(graph) == set()
        assert {"noise.0.weight", "noise.2.weight"} <= {slot.tensor for slot in graph.groups["stem"].slots}
        exact_on(net, graph, lambda n: run(n, INPUTS), with_all_blocks)

    @pytest.mark.parametrize("empty", [False, True])
    def test_what_is_skipped_does_not_hang_on_how_many_numbers_dropout_draws(self, empty) -> None:
        blocks = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)) for _ in range(12)]

        def forward(net, x):
            for number in range(12):
                drawn = torch.empty(()).uniform_() if empty else torch.rand(())
                if not net.training or drawn > 0.5:
                    x = x + getattr(net, f"block{number}")(x)
            return x

        torch.manual_seed(0)
        net = Net(forward, **{f"block{number}": block for number, block in enumerate(blocks)})
        graph = traced(net, INPUTS)
        assert len(graph.groups) == 12
        exact_on(net, graph, lambda n: run(n, INPUTS))

    def test_each_run_is_the_same_again_and_leaves_the_random_numbers_alone(self) -> None:
        noise = Net(lambda n, x: n.a(x) + torch.rand(1) + random.random() + np.random.rand(), a=nn.Linear(4, 2))
        programs = module_programs(noise, INPUTS, [INPUTS, INPUTS])
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        results = [program.run() for program in programs]
        assert all(torch.equal(program.run(), result) for program, result in zip(programs, results, strict=True))
        assert torch.equal(results[0], results[1])
        assert len({float(result[0, 0]) for result in results}) == 3
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])


class ByShape(nn.Module):
    """Sequences and single vectors take different ways, and long batches yet another."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.over_time, self.in_bulk = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, double=False):
        x = F.relu(self.stem(x))
        if x.dim() == 3:
            x = F.relu(self.over_time(x)).mean(1)
        if len(x) > 7:
            x = F.relu(self.in_bulk(x))
        return self.head(x) * (2 if double else 1)


class TestFurtherInputs:
    def test_a_branch_on_rank_and_one_on_size(self) -> None:
        net, sequences, many = ByShape(), torch.randn(3, 6, 4), torch.randn(9, 4)
        graph = traced(net, INPUTS)
        assert unused(graph) == {"over_time.weight", "over_time.bias", "in_bulk.weight", "in_bulk.bias"}
        graph = traced(net, INPUTS, (sequences, True), {"x": many, "double": True})
        assert unused(graph) == set()
        assert widths(graph) == {"stem": 8}
        assert {"over_time.weight", "in_bulk.weight"} <= {slot.tensor for slot in graph.groups["stem"].slots}
        exact_on(net, graph, *[lambda n, x=x: run(n, x) for x in (INPUTS, sequences, many)])

    def test_what_is_cut_belongs_together_on_every_path(self) -> None:
        def branching(net, x):
            left = net.a(x)
            return net.c(left + net.b(x)) if x.dim() == 3 else net.c(left)

        def made():
            return Net(branching, a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))

        assert {slot.tensor for slot in traced(made(), INPUTS).groups["a"].slots} == {"a.weight", "a.bias", "c.weight"}
        net, deep = made(), torch.randn(2, 3, 4)
        graph = traced(net, INPUTS, deep)
        assert {s.tensor for s in graph.groups["a"].slots} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
        exact_on(net, graph, lambda n: run(n, INPUTS), lambda n: run(n, deep), share=0.3)

    def test_one_path_may_keep_whole_what_another_would_cut(self) -> None:
        def forward(net, x):
            hidden = net.a(x)
            return hidden if x.dim() == 3 else net.b(hidden)

        net = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
        assert widths(traced(net, INPUTS)) == {"a": 8}
        graph = traced(net, INPUTS, torch.randn(2, 3, 4))
        assert graph.groups == {}
        assert ("a.weight (dim 0)", "is an output of the network") in [tuple(refusal) for refusal in graph.refused]

    def test_the_first_example_is_the_one_whose_cost_counts(self) -> None:
        assert traced(ByShape(), INPUTS, torch.randn(9, 4)).batch_size == 5


class Coder(nn.Module):
    """Three methods that share parts."""

    def __init__(self):
        super().__init__()
        self.enter, self.code = nn.Linear(4, 8), nn.Linear(8, 3)
        self.leave, self.out = nn.Linear(3, 8), nn.Linear(8, 4)

    def encode(self, x):
        return self.code(F.relu(self.enter(x)))

    def decode(self, z, scale=1.0):
        return self.out(F.relu(self.leave(z))) * scale

    def forward(self, x):
        return self.encode(x)


class TestMethods:
    def test_a_second_method(self) -> None:
        net, codes = Coder(), torch.randn(5, 3)
        assert unused(traced(net, INPUTS)) == {"leave.weight", "leave.bias", "out.weight", "out.bias"}
        graph = traced(net, INPUTS, Example({"z": codes, "scale": 2.0}, "decode"))
        assert widths(graph) == {"enter": 8, "leave": 8}
        exact_on(net, graph, lambda n: run(n, INPUTS), lambda n: [n.decode(codes)], lambda n: [n.decode(n(INPUTS))])

    def test_what_one_method_hands_out_stays_whole_in_all(self) -> None:
        net = Coder()
        net.forward = lambda x: net.decode(net.encode(x))
        assert widths(traced(net, INPUTS)) == {"enter": 8, "code": 3, "leave": 8}
        graph = traced(net, INPUTS, Example(INPUTS, "encode"))
        assert widths(graph) == {"enter": 8, "leave": 8}

    def test_a_program_of_ones_own(self) -> None:
        net, codes = Coder(), torch.randn(5, 3)
        decode = Program("decode (by hand)", lambda: net.decode(codes))
        graph = traced(net, INPUTS, decode)
        assert [run.program for run in graph.evidence.runs][-1] is decode
        assert widths(graph) == {"enter": 8, "leave": 8}

    def test_instead_of_forward(self) -> None:
        net = Coder()
        graph = traced(net, Example(torch.randn(5, 3), "decode"))
        assert widths(graph) == {"leave": 8}

    def test_an_unknown_method(self) -> None:
        with pytest.raises(ConfigurationError, match="Coder has no method 'decod' to run it by"):
            module_programs(Coder(), INPUTS, [Example(INPUTS, "decod")])


class TestNames:
    def test_all_are_different(self) -> None:
        net = Coder()
        programs = module_programs(net, INPUTS, [INPUTS, Example(torch.randn(5, 3), "decode"), (INPUTS,)])
        assert [program.name for program in programs] == [
            f"{name} ({mode} mode)"
            for name in ("forward", "forward#2", "decode", "forward#3")
            for mode in ("evaluation", "train")
        ]
        assert [program.training for program in programs] == [False, True] * 4

    def test_an_example_that_fails_is_named_and_not_passed_over(self) -> None:
        with pytest.raises(TraceError, match=r"failed in forward#2 \(evaluation mode\): RuntimeError: .*multiplied"):
            traced(Coder(), INPUTS, torch.randn(5, 7))
