"""Networks and inputs that cannot be traced are refused in words, and left exactly as they were."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

from lightning_prune.errors import ConfigurationError, TraceError
from lightning_prune.graph.program import Program, module_programs
from lightning_prune.surgery import shrink, trace, trace_programs
from tests.helpers import Net, difference, masked_copy, random_keep, run

pytestmark = pytest.mark.filterwarnings("ignore")  # much of what is built here is deprecated, or a prototype


class Odd(torch.Tensor):
    """A tensor class that what is computed with it inherits."""


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def two(function, **parts):
    return Net(function, a=nn.Linear(4, 8), b=nn.Linear(8, 2), **parts)


def forward(net, x):
    return net.b(F.relu(net.a(x)))


def surface(model):
    """What can be seen of a network: its parts, the objects they are, and their numbers."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    readable = {n: t for n, t in tensors if not (t.is_meta or t.is_nested or nn.parameter.is_lazy(t))}
    scripted = torch.jit.ScriptModule
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "tensors": [(name, id(tensor), tensor.layout, tensor.requires_grad) for name, tensor in tensors],
        "gradients": [(name, tensor.grad is None) for name, tensor in tensors],
        "attributes": [list(vars(m)) for m in model.modules() if not isinstance(m, scripted)],
        "numbers": {n: t.detach().to_dense().clone() for n, t in readable.items() if type(t) is not TwoTensor},
    }


def assert_unchanged(before, model):
    after = surface(model)
    old, new = before.pop("numbers"), after.pop("numbers")
    assert before == after
    assert [name for name in old if not torch.equal(old[name], new[name])] == []


def refused(model, inputs, words, error=TraceError):
    before = surface(model)
    with pytest.raises(error, match=words):
        trace(model, inputs)
    assert_unchanged(before, model)


def whole(model, *inputs):
    """Trace a network of which a part stays whole; shrink the rest, which must be exact. The graph before that."""
    before = surface(model)
    graph = trace(model, inputs)
    assert_unchanged(before, model)
    keep = random_keep(graph)
    masked = masked_copy(model, graph, keep)
    shrink(model, graph, keep)
    assert difference(run(masked, *inputs), run(model, *inputs)) < 1e-5
    return graph


def reasons(graph):
    return {refusal.path: refusal.reason for refusal in graph.refused}


INPUTS = torch.randn(3, 4)


class TestForward:
    def test_raises(self) -> None:
        def fails(net, x):
            net.calls = net.a(x)
            net.steps.add_(1)
            raise ValueError("no such colour")

        words = r"failed in forward \(evaluation mode\): ValueError: no such colour"
        refused(two(fails, steps=torch.zeros(1), calls=0), INPUTS, words)

    @pytest.mark.parametrize(
        ("give", "kind"),
        [(lambda y: None, "None"), (lambda y: str(y), "a value of type str"), (lambda y: y.mean().item(), "float")],
    )
    def test_returns_no_tensor(self, give, kind) -> None:
        words = rf"forward \(evaluation mode\) of Net returned no tensor but .*{kind}, .*: return the tensors"
        refused(two(lambda n, x: give(forward(n, x))), INPUTS, words)

    def test_returns_a_tensor_in_an_object(self) -> None:
        class Result:
            def __init__(self, scores):
                self.scores = scores

        graph = trace(two(lambda n, x: Result(forward(n, x))), INPUTS)
        assert {name: group.width for name, group in graph.groups.items()} == {"a": 8}

    def test_returns_a_tensor_of_a_class_that_hides_channels(self) -> None:
        refused(
            plain(), INPUTS.as_subclass(Odd), r"returned a tensor of the class Odd, .* give the network plain tensors"
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda n: setattr(n, "c", nn.Linear(8, 8)), r"forward \(evaluation mode\) of Net adds 'c' while it runs"),
            (lambda n: setattr(n.b, "extra", nn.Parameter(torch.ones(2))), r"adds 'b\.extra' while it runs"),
            (lambda n: setattr(n, "a", nn.Linear(4, 8)), r"replaces 'a' while it runs; .* make them in `__init__`"),
            (lambda n: setattr(n.a, "weight", nn.Parameter(torch.ones(8, 4))), r"replaces 'a\.weight' while it runs"),
            (lambda n: delattr(n.b, "bias"), r"removes 'b\.bias' while it runs"),
            (lambda n: delattr(n, "spare"), r"removes 'spare' while it runs"),
        ],
    )
    def test_changes_its_own_structure(self, change, words) -> None:
        def changing(net, x):
            out = forward(net, x)
            change(net)
            return out

        refused(two(changing, spare=nn.Dropout()), INPUTS, words)

    def test_changes_its_structure_and_fails(self) -> None:
        def failing(net, x):
            net.a = nn.Linear(4, 9)
            return forward(net, x)

        refused(two(failing), INPUTS, "shapes cannot be multiplied")

    def test_may_make_parts_in_its_first_run_only(self) -> None:
        def lazily(net, x):
            if "late" not in net._modules:
                net.late = nn.Linear(8, 8)
            return net.b(F.relu(net.late(net.a(x))))

        net = two(lazily)
        refused(net, INPUTS, "adds 'late' .* run the network once before it is pruned")
        net(INPUTS)
        assert set(trace(net, INPUTS).groups) == {"a", "late"}

    def test_may_borrow_parameters(self) -> None:
        def borrowing(net, x):
            changed = {name: value * 2 for name, value in net.a.named_parameters()}
            return net.b(F.relu(torch.func.functional_call(net.a, changed, (x,))))

        assert set(whole(two(borrowing), INPUTS).groups) == {"a"}


class TestWritesToItsParameters:
    """Some networks keep their weights normalised while they run; the weights are as before after a trace."""

    @staticmethod
    def in_place(net, x):
        with torch.no_grad():
            net.a.weight.copy_(F.normalize(net.a.weight))
        return forward(net, x)

    @staticmethod
    def through_data(net, x):
        net.a.weight.data.mul_(0.5)
        return forward(net, x)

    @staticmethod
    def new_data(net, x):
        net.a.weight.data = F.normalize(net.a.weight.data)
        return forward(net, x)

    @staticmethod
    def many_at_once(net, x):
        torch._foreach_mul_([p.data for p in net.a.parameters()], 0.5)
        return forward(net, x)

    @staticmethod
    def into(net, x):
        torch.mul(net.a.weight.detach(), 0.5, out=net.a.weight.data)
        return forward(net, x)

    @pytest.mark.parametrize("name", ["in_place", "through_data", "new_data", "many_at_once", "into"])
    def test_they_are_put_back(self, name) -> None:
        net = two(getattr(self, name))
        before, memory = surface(net), net.a.weight.data_ptr()
        trace(net, INPUTS)
        assert_unchanged(before, net)
        assert net.a.weight.data_ptr() == memory

    def test_they_are_put_back_after_a_failure(self) -> None:
        def failing(net, x):
            net.a.weight.data.zero_()
            raise ValueError("too late")

        refused(two(failing), INPUTS, "too late")

    def test_memory_shared_by_parameters(self) -> None:
        net, flat = two(self.through_data), torch.randn(40)
        net.a.weight.data, net.a.bias.data = flat[:32].view(8, 4), flat[32:]
        net.function = lambda n, x: (flat.mul_(0.5), forward(n, x))[1]
        before = surface(net)
        for program in module_programs(net, INPUTS):
            program.run()
            program.run()
        assert_unchanged(before, net)

    @pytest.mark.parametrize("name", ["in_place", "new_data"])
    def test_and_a_shrink_is_exact(self, name) -> None:
        net = two(getattr(self, name))
        graph = trace(net, INPUTS)
        keep = {"a": torch.tensor([1, 4, 6])}
        masked, rows = masked_copy(net, graph, keep), net.a.weight[keep["a"]].detach().clone()
        shrink(net, graph, keep)
        assert torch.equal(net.a.weight, rows)
        assert difference(run(masked, INPUTS), run(net, INPUTS)) < 1e-5

    def test_an_embedding_that_limits_its_norms(self) -> None:
        net = nn.Sequential(nn.Embedding(6, 8, max_norm=0.5), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        graph = whole(net, torch.tensor([[1, 2, 3], [0, 1, 4]]))
        assert set(graph.groups) == {"1"}
        assert "embedding_renorm_" in reasons(graph)["0.weight (dim 1)"]


class TestNothingToPrune:
    @pytest.mark.parametrize(
        "net",
        [nn.ReLU(), nn.Sequential(), Net(lambda n, x: x @ n.w, w=torch.randn(4, 4)), nn.BatchNorm1d(4, affine=False)],
    )
    def test_no_parameters(self, net) -> None:
        refused(net, INPUTS, rf"{type(net).__name__} has no parameters, so there is nothing to prune")

    def test_an_empty_batch(self) -> None:
        words = r"forward \(evaluation mode\) runs on a batch of size 0, .* give at least one sample"
        refused(plain(), torch.randn(0, 4), words)

    def test_an_empty_batch_in_a_program_of_ones_own(self) -> None:
        net = plain()
        empty = Program("validation_step", lambda: net(INPUTS), samples=0)
        with pytest.raises(TraceError, match="validation_step runs on a batch of size 0"):
            trace_programs(net, [empty])

    @pytest.mark.parametrize("inputs", [None, 3, "text", INPUTS.numpy()])
    def test_inputs_of_another_kind(self, inputs) -> None:
        words = f"must be a tensor, .* not {type(inputs).__name__}"
        refused(plain(), inputs, words, ConfigurationError)


class TestDevices:
    def test_two_devices(self) -> None:
        net = plain()
        net[2].to("meta")
        refused(net, INPUTS, r"several devices \(0\.weight on cpu, 2\.weight on meta\): move it to a single one")

    def test_the_meta_device(self) -> None:
        refused(plain().to("meta"), INPUTS, r"0\.weight is on the meta device, .* `to_empty\(device=\.\.\.\)`")

    def test_a_buffer_without_numbers(self) -> None:
        net = Net(lambda n, x: n.a(x), a=plain(), table=torch.empty(3, device="meta"))
        refused(net, INPUTS, "table is on the meta device")

    def test_inputs_without_numbers(self) -> None:
        words = "an example input of forward is on the meta device, .* the network is on cpu: move them there"
        refused(plain(), {"input": INPUTS.to("meta")}, words)

    def test_inputs_on_another_device(self) -> None:
        def strict(net, x):
            if x.device != net.a.weight.device:
                raise RuntimeError("expected all tensors to be on the same device")
            return forward(net, x)

        with FakeTensorMode(allow_non_fake_inputs=True):
            elsewhere = torch.empty(3, 4, device="cuda")
        words = r"its example inputs are on cuda:0; the network is on cpu: move them there \(RuntimeError: expected all"
        refused(two(strict), elsewhere, words)


class TestScripted:
    @pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, INPUTS)])
    def test_the_network_itself(self, compiled) -> None:
        refused(compiled(plain()), INPUTS, "is a ScriptModule, .* prune the nn.Module it was made from")

    @pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, INPUTS)])
    def test_a_part(self, compiled) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), compiled(plain()), nn.Linear(2, 2))
        graph = whole(net, INPUTS)
        assert set(graph.groups) == {"0"}
        assert reasons(graph)["3.2.weight (dim 0)"].startswith("belongs to the scripted module '3'")
        assert next(net[3].parameters()).shape == (8, 4)

    def test_a_part_that_shares_its_weights(self) -> None:
        shared = nn.Linear(8, 8)
        net = nn.Sequential(nn.Linear(4, 8), shared, nn.ReLU(), torch.jit.script(shared), nn.Linear(8, 2))
        graph = trace(net, INPUTS)
        assert graph.groups == {}
        assert any("scripted module '3'" in reason for reason in reasons(graph).values())


class TestQuantised:
    def quantised(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})

    def test_the_network_itself(self) -> None:
        refused(
            self.quantised(), INPUTS, r"no parameters: '0\._packed_params' is quantised .* then quantise the smaller"
        )

    def test_a_part(self) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), self.quantised())
        graph = whole(net, INPUTS)
        assert set(graph.groups) == {"0"}
        assert reasons(graph)["2.0._packed_params"].startswith("is quantised")
        assert "quantized::linear_dynamic has no rule" in reasons(graph)["1.weight (dim 0)"]

    def test_a_tensor(self) -> None:
        table = torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.quint8)
        net = two(lambda n, x: n.b(F.relu(n.a(x)) + n.table.dequantize()) + n.c(F.relu(n.d(x))), table=table)
        net.c, net.d = nn.Linear(6, 2), nn.Linear(4, 6)
        before = [(name, id(tensor)) for name, tensor in net.state_dict(keep_vars=True).items()]
        graph = trace(net, INPUTS)
        assert set(graph.groups) == {"d"}
        assert "a.weight (dim 0)" in reasons(graph)
        assert before == [(name, id(tensor)) for name, tensor in net.state_dict(keep_vars=True).items()]


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class TestWrapped:
    def test_data_parallel(self) -> None:
        refused(nn.DataParallel(plain()), INPUTS, r"the network is wrapped in DataParallel: prune its `\.module`")

    def test_distributed_data_parallel(self, one_process) -> None:
        net = nn.parallel.DistributedDataParallel(plain())
        refused(net, INPUTS, r"the network is wrapped in DistributedDataParallel: prune its `\.module`")
        assert set(trace(net.module, INPUTS).groups) == {"0"}

    def test_a_part_of_the_network(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.DataParallel(plain()))
        refused(net, INPUTS, r"'1' is wrapped in DataParallel")

    def test_sharded_parameters(self, one_process) -> None:
        from torch.distributed.tensor import distribute_module

        net = distribute_module(plain(), one_process)
        with pytest.raises(TraceError, match=r"0\.weight is a DTensor, .* prune the network before it is sharded"):
            trace(net, INPUTS)

    def test_fully_sharded(self, one_process) -> None:
        from torch.distributed.fsdp import fully_shard

        net = fully_shard(plain(), mesh=one_process)
        with pytest.raises(TraceError, match=r"0\.weight is a DTensor, .* prune the network before it is sharded"):
            trace(net, INPUTS)

    def test_fully_sharded_by_a_wrapper(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        net = nn.Sequential(plain())
        # The wrapper cannot be built without an accelerator; what is looked at is its class.
        wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(wrapper)
        net.append(wrapper)
        with pytest.raises(TraceError, match="'1' is wrapped in FullyShardedDataParallel, which shards its parameters"):
            trace(net, INPUTS)


class TestUnusualTensors:
    def test_a_lazy_parameter(self) -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(2))
        before = [(name, id(tensor)) for name, tensor in net.named_parameters()]
        with pytest.raises(TraceError, match=r"1\.weight is a lazy parameter .* run one forward pass"):
            trace(net, INPUTS)
        assert before == [(name, id(tensor)) for name, tensor in net.named_parameters()]

    def test_a_sparse_parameter(self) -> None:
        def mix(net, x):
            return net.c(F.relu(net.b(F.relu(torch.sparse.mm(net.weight, net.a(x).T).T))))

        net = Net(mix, a=nn.Linear(4, 5), b=nn.Linear(8, 6), c=nn.Linear(6, 2))
        net.weight = nn.Parameter(torch.randn(8, 5).to_sparse())
        before = surface(net)
        graph = trace(net, INPUTS)
        assert_unchanged(before, net)
        assert set(graph.groups) == {"b"}
        assert reasons(graph)["weight (dim 0)"] == "is a sparse tensor (sparse_coo)"
        with torch.no_grad():
            net.c.weight[:, 1:] = 0
        expected = run(net, INPUTS)
        shrink(net, graph, {"b": torch.tensor([0])})
        assert difference(expected, run(net, INPUTS)) < 1e-5

    def test_a_sparse_buffer(self) -> None:
        def propagate(net, x):
            return net.c(F.relu(net.b(torch.sparse.mm(net.adjacency, F.relu(net.a(x))))))

        parts = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 2)}
        net = Net(propagate, **parts, adjacency=(torch.rand(3, 3) > 0.5).float().to_sparse())
        graph = whole(net, INPUTS)
        assert set(graph.groups) == {"a", "b"}
        assert reasons(graph)["adjacency (dim 0)"] == "is a sparse tensor (sparse_coo)"
        assert net.a.out_features == net.b.in_features < 8

    def test_a_sparse_input(self) -> None:
        def propagate(net, x, adjacency):
            return net.b(F.relu(net.a(torch.sparse.mm(adjacency, x))))

        assert set(whole(two(propagate), INPUTS, torch.eye(3).to_sparse()).groups) == {"a"}

    def test_a_nested_parameter(self) -> None:
        net = plain()
        net.pieces = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        with pytest.raises(TraceError, match=r"pieces is a nested tensor, .* keep its parts as single tensors"):
            trace(net, INPUTS)

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_a_nested_input(self, layout) -> None:
        pieces = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
        refused(plain(), pieces, "an example input of forward is a nested tensor, .* give padded tensors")

    @pytest.mark.parametrize("made", [lambda w: w.as_subclass(Odd), lambda w: TwoTensor(w, w.clone())])
    def test_a_parameter_of_another_class(self, made) -> None:
        def back(net, x):
            return net.c(F.relu(net.b(net.pure(F.relu(net.a(x))))))

        net = Net(back, a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 2))
        net.pure = lambda y: y.a if isinstance(y, TwoTensor) else y.as_subclass(torch.Tensor)
        net.a.weight = nn.Parameter(made(net.a.weight.detach()))
        before = surface(net)
        graph = trace(net, INPUTS)
        assert_unchanged(before, net)
        assert set(graph.groups) == {"b"}
        assert "whose numbers may be kept in another way" in reasons(graph)["a.weight (dim 0)"]
        shrink(net, graph, {"b": torch.tensor([0, 3])})
        assert net.a.weight.shape == (8, 4)


def test_the_programs_of_a_good_network_leave_it_alone() -> None:
    net = plain()
    net[0].weight.grad = torch.ones(8, 4)
    before, twin = surface(net), copy.deepcopy(net)
    for program in module_programs(net, INPUTS):
        assert torch.equal(program.run(), twin(INPUTS))
    assert_unchanged(before, net)
