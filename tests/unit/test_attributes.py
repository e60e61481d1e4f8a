from __future__ import annotations

from collections import namedtuple
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.surgery import shrink, trace
from lightning_prune.surgery.attributes import integer_settings, symbolic, write_settings
from lightning_prune.surgery.constructors import Descriptions
from lightning_prune.surgery.resize import replace
from lightning_prune.surgery.symbols import Setting, Symbol, resolve
from tests.helpers import Net, random_keep

HEADS, DIM = Setting("m", "heads"), Setting("m", "sizes", 1)
Pair = namedtuple("Pair", ["first", "second"])


def heads(value=4):
    return Symbol.of(HEADS, value)


class TestSymbol:
    def test_is_an_int(self) -> None:
        assert heads() == 4
        assert isinstance(heads(), int)
        assert list(range(heads())) == [0, 1, 2, 3]
        assert torch.zeros(heads(), 2).shape == (4, 2)
        assert heads().settings == {HEADS}

    @pytest.mark.parametrize(
        ("expression", "at_four", "at_six"),
        [
            (lambda h: h + 1, 5, 7),
            (lambda h: 1 + h, 5, 7),
            (lambda h: h - 1, 3, 5),
            (lambda h: 10 - h, 6, 4),
            (lambda h: 3 * h, 12, 18),
            (lambda h: h * 3, 12, 18),
            (lambda h: h // 2, 2, 3),
            (lambda h: 24 // h, 6, 4),
            (lambda h: h % 4, 0, 2),
            (lambda h: 14 % h, 2, 2),
            (lambda h: (h + 2) * h // 2 - 1, 11, 23),
        ],
    )
    def test_remembers_how_it_was_computed(self, expression, at_four, at_six) -> None:
        symbol = expression(heads())
        assert symbol == at_four
        assert symbol.settings == {HEADS}
        assert resolve(symbol, {HEADS: 6}) == at_six
        assert resolve(symbol, {}) == at_four
        assert type(resolve(symbol, {HEADS: 6})) is int

    def test_several_settings_meet(self) -> None:
        symbol = heads() * Symbol.of(DIM, 8) + heads()
        assert symbol.settings == {HEADS, DIM}
        assert resolve(symbol, {HEADS: 2}) == 18
        assert resolve(symbol, {HEADS: 2, DIM: 5}) == 12

    def test_other_numbers_do_not_stay_symbols(self) -> None:
        assert heads() * 0.5 == 2.0
        assert type(heads() * 0.5) is float
        assert heads() / 8 == 0.5
        assert heads() ** -0.5 == 0.5

    def test_resolve_leaves_everything_else(self) -> None:
        assert resolve("same", {HEADS: 6}) == "same"
        assert resolve(4, {HEADS: 6}) == 4


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_evaluating_is_computing_anew(first, second, new_first, new_second) -> None:
    def formula(a, b):
        return (b // a) * a + b % a - (a - 3) * 2 + 10 // a - 7 % b

    result = formula(Symbol.of(HEADS, first), Symbol.of(DIM, second))
    assert result == formula(first, second)
    assert resolve(result, {HEADS: new_first, DIM: new_second}) == formula(new_first, new_second)
    assert type(resolve(result, {})) is int


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.flag = True
        self.rate = 0.5
        self.sizes = [3, 8]
        self.kernel = (3, "same")
        self.pair = Pair(1, 2)
        self.shape = torch.Size([5, 6])
        self.inner = nn.Identity()
        self.inner.width = 7


def test_every_integer_of_every_module_is_a_setting() -> None:
    found = integer_settings(nn.ModuleDict({"m": Module()}))
    assert found == {
        Setting("m", "heads"): 4,
        Setting("m", "sizes", 0): 3,
        Setting("m", "sizes", 1): 8,
        Setting("m", "kernel", 0): 3,
        Setting("m", "pair", 0): 1,
        Setting("m", "pair", 1): 2,
        Setting("m", "shape", 0): 5,
        Setting("m", "shape", 1): 6,
        Setting("m.inner", "width"): 7,
    }


def test_settings_are_written_where_they_came_from_and_keep_their_types() -> None:
    module = Module()
    untouched = module.kernel
    write_settings(module, {Setting("", "heads"): 2, Setting("", "sizes", 1): 5, Setting("", "pair", 0): 9})
    write_settings(module, {Setting("", "shape", 1): 3, Setting("inner", "width"): 6, Setting("", "kernel", 0): 3})
    assert (module.heads, module.sizes, module.pair, module.inner.width) == (2, [3, 5], Pair(9, 2), 6)
    assert type(module.pair) is Pair
    assert module.shape == torch.Size([5, 3])
    assert type(module.shape) is torch.Size
    assert module.kernel is untouched


def test_symbols_stand_in_for_a_while() -> None:
    module = nn.ModuleDict({"m": Module()})
    before = dict(vars(module["m"]))
    with symbolic(module, integer_settings(module)):
        assert module["m"].heads.settings == {HEADS}
        assert module["m"].sizes[1].settings == {DIM}
        assert module["m"].pair.second.settings == {Setting("m", "pair", 1)}
        assert module["m"].flag is True
    assert all(vars(module["m"])[name] is value for name, value in before.items())


def test_symbols_go_when_the_network_fails() -> None:
    module = Module()
    with pytest.raises(RuntimeError, match="stop"), symbolic(module, integer_settings(module)):
        raise RuntimeError("stop")
    assert type(module.heads) is int
    assert type(module.sizes[0]) is int


def described(module, shapes, known=None):
    """What a module should say of itself once its tensors have other shapes."""
    descriptions = Descriptions(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, shape in shapes.items():
        replace(tensors[name], torch.zeros(shape))
    return descriptions.settings({Setting("", *key): Fraction(*ratio) for key, ratio in (known or {}).items()})


class TestDescriptions:
    def test_linear(self) -> None:
        assert described(nn.Linear(4, 6), {"weight": (3, 2), "bias": (3,)}) == {
            Setting("", "in_features"): 2,
            Setting("", "out_features"): 3,
        }

    def test_only_what_changed(self) -> None:
        assert described(nn.Linear(4, 6, bias=False), {"weight": (6, 3)}) == {Setting("", "in_features"): 3}
        assert described(nn.Linear(4, 6), {}) == {}

    def test_conv(self) -> None:
        shapes = {"weight": (5, 3, 3, 3), "bias": (5,)}
        known = {("groups", None): (1, 1)}
        assert described(nn.Conv2d(4, 10, 3, padding="same", padding_mode="reflect"), shapes, known) == {
            Setting("", "in_channels"): 3,
            Setting("", "out_channels"): 5,
        }

    def test_groups_and_inputs_of_a_conv_cannot_be_told_apart_from_its_shapes(self) -> None:
        shapes = {"weight": (6, 2, 3, 3), "bias": (6,)}
        assert described(nn.Conv2d(16, 12, 3, groups=4), shapes) == {Setting("", "out_channels"): 6}
        assert described(nn.Conv2d(16, 12, 3, groups=4), shapes, {("groups", None): (1, 2)}) == {
            Setting("", "out_channels"): 6,
            Setting("", "in_channels"): 4,
        }

    def test_depthwise_conv(self) -> None:
        shapes = {"weight": (5, 1, 3, 3), "bias": (5,)}
        assert described(nn.Conv2d(8, 8, 3, groups=8), shapes, {("groups", None): (5, 8)}) == {
            Setting("", "out_channels"): 5,
            Setting("", "in_channels"): 5,
        }

    def test_transposed_conv(self) -> None:
        known = {("groups", None): (1, 1)}
        assert described(nn.ConvTranspose2d(8, 6, 3), {"weight": (4, 3, 3, 3), "bias": (3,)}, known) == {
            Setting("", "in_channels"): 4,
            Setting("", "out_channels"): 3,
        }

    def test_batch_norm(self) -> None:
        shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (5,))
        assert described(nn.BatchNorm2d(8), shapes) == {Setting("", "num_features"): 5}

    def test_group_norm(self) -> None:
        shapes = {"weight": (6,), "bias": (6,)}
        assert described(nn.GroupNorm(4, 12), shapes) == {Setting("", "num_channels"): 6}

    def test_lstm(self) -> None:
        shapes = {
            name: tuple(n // 2 for n in parameter.shape)
            for name, parameter in nn.LSTM(6, 8, num_layers=2, bidirectional=True).named_parameters()
        }
        assert described(nn.LSTM(6, 8, num_layers=2, bidirectional=True), shapes) == {
            Setting("", "hidden_size"): 4,
            Setting("", "input_size"): 3,
        }

    def test_embedding(self) -> None:
        assert described(nn.Embedding(11, 8, padding_idx=0), {"weight": (11, 6)}) == {Setting("", "embedding_dim"): 6}

    def test_tied_weights_describe_every_module_that_holds_them(self) -> None:
        first, second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        second.weight = first.weight
        found = described(nn.ModuleDict({"a": first, "b": second}), {"a.weight": (3, 4)})
        assert found == {Setting("a", "out_features"): 3, Setting("b", "out_features"): 3}

    def test_a_module_that_cannot_be_built_again_tells_nothing(self) -> None:
        class Odd(nn.Module):
            def __init__(self, width, unknown) -> None:
                super().__init__()
                self.width = width
                self.weight = nn.Parameter(torch.zeros(width))

        class Failing(Odd):
            def __init__(self, width) -> None:
                super().__init__(width, None)
                if width != 8:
                    raise ValueError("only eight")

            @property
            def unknown(self):
                raise RuntimeError("not now")

        assert described(Odd(8, None), {"weight": (4,)}) == {}
        assert described(Failing(8), {"weight": (4,)}) == {}

    def test_a_module_that_was_changed_after_it_was_built_tells_nothing(self) -> None:
        module = nn.Linear(4, 6)
        module.out_features = 12
        assert described(module, {"weight": (3, 4)}) == {}

    def test_a_property_that_raises_whatever_it_likes(self) -> None:
        class Secretive(nn.Module):
            def __init__(self, width) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(width))

            @property
            def width(self):
                raise RuntimeError("ask somebody else")

        assert described(Secretive(8), {"weight": (4,)}) == {}

    def test_an_odd_number_of_groups(self) -> None:
        """Seven groups can be neither doubled nor halved while there are seven channels."""
        shapes = {"weight": (3, 1, 3, 3), "bias": (3,)}
        assert described(nn.Conv2d(7, 7, 3, groups=7), shapes, {("groups", None): (3, 7)}) == {
            Setting("", "in_channels"): 3,
            Setting("", "out_channels"): 3,
        }

    def test_a_divisor_is_solved_too(self) -> None:
        """Two groups of four inputs each become four groups of two."""
        known = {("in_channels", None): (1, 1), ("out_channels", None): (1, 1)}
        shapes = {"weight": (12, 2, 3, 3)}
        assert described(nn.Conv2d(8, 12, 3, groups=2, bias=False), shapes, known) == {Setting("", "groups"): 4}

    def test_elements_of_a_tuple(self) -> None:
        class Scales(nn.Module):
            def __init__(self, shape) -> None:
                super().__init__()
                if type(shape) is not tuple:
                    raise TypeError("a shape is a tuple")
                self.shape = shape
                self.weight = nn.Parameter(torch.ones(shape))

        assert described(Scales((4, 6)), {"weight": (4, 3)}) == {Setting("", "shape", 1): 3}

    def test_building_again_leaves_no_trace_in_the_random_numbers(self) -> None:
        module, state = nn.Conv1d(5, 9, 3), torch.get_rng_state()
        assert described(module, {"weight": (6, 5, 3), "bias": (6,)}) == {Setting("", "out_channels"): 6}
        assert torch.equal(torch.get_rng_state(), state)


def test_a_look_at_constructors_warns_of_nothing(recwarn):
    """An LSTM of one layer would say that it has no use for its dropout."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.LSTM(5, 6, 2, dropout=0.2), head=nn.Linear(6, 3))
    graph = trace(net, torch.randn(7, 2, 5))
    shrink(net, graph, random_keep(graph))
    assert not [warning for warning in recwarn if "dropout" in str(warning.message)]
