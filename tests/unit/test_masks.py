from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup, Slot
from lightning_prune.masks import Masks


def each(count: int, width: int = 1) -> Tensor:
    return torch.arange(count * width).reshape(count, width)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    )


def graph() -> ChannelGraph:
    """Group ``0`` is read by the second convolution, group ``3`` by four columns each of the linear layer."""
    first, second = Slot("3.weight", 1, each(3), "consumer"), Slot("5.weight", 1, each(4, 4), "consumer")
    return ChannelGraph(
        {
            "0": ChannelGroup("0", (Slot("0.weight", 0, each(3), "producer"), first), (first,)),
            "3": ChannelGroup("3", (Slot("3.weight", 0, each(4), "producer"), second), (second,)),
        }
    )


KEEP = {"0": torch.tensor([True, False, True]), "3": torch.tensor([False, True, True, False])}


def masked() -> Masks:
    masks = Masks(graph())
    masks.set(KEEP)
    return masks


def expected(name: str, shape: torch.Size) -> Tensor:
    """Ones where the entries of a tensor stay, by hand."""
    ones = torch.ones(shape)
    if name == "3.weight":
        ones[:, 1] = 0
    if name == "5.weight":
        ones[:, 0:4] = 0
        ones[:, 12:16] = 0
    return ones


def test_everything_is_kept_at_first() -> None:
    masks = Masks(graph())
    assert masks.off_entries() == []
    assert masks.widths == {"0": 3, "3": 4}
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks.apply(dict(model.named_parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_entries_are_flat_positions() -> None:
    found = {(entry.tensor, entry.dim): entry.positions.tolist() for entry in masked().off_entries()}
    assert found == {("3.weight", 1): [1], ("5.weight", 1): [0, 1, 2, 3, 12, 13, 14, 15]}


def test_apply_zeroes_the_off_slots_only_and_in_place() -> None:
    model = net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    masked().apply(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * expected(name, parameter.shape))
        assert parameter.data_ptr() == pointers[name]


def test_masked_units_have_no_say() -> None:
    model = net()
    images = torch.randn(5, 2, 2, 2)
    masked().apply(dict(model.named_parameters()))
    before = model.eval()(images)
    with torch.no_grad():
        model[0].weight[1] += 1000
        model[1].bias[1] += 1000
        model[3].bias[0] += 1000
    assert torch.equal(model(images), before)
    with torch.no_grad():
        model[0].weight[0] += 1000
    assert not torch.equal(model(images), before)


def test_training_keeps_what_is_off_at_zero() -> None:
    model, masks = net(), masked()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(8, 2, 2, 2)).square().sum().backward()
    optimizer.step()

    masks.apply(parameters)
    masks.apply_gradients(parameters)
    masks.apply_optimizer_state(parameters, [optimizer])
    for name, parameter in parameters.items():
        off = expected(name, parameter.shape) == 0
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert not tensor[off].any()
            assert bool(tensor[~off].any())
        assert state["step"] == 1
    optimizer.step()
    assert not parameters["3.weight"][:, 1].any()


def test_parameters_without_gradient_or_state_are_passed_over() -> None:
    parameters = dict(net().named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    masked().apply_gradients(parameters)
    masked().apply_optimizer_state(parameters, [optimizer])
    assert all(parameter.grad is None for parameter in parameters.values())
    assert len(optimizer.state) == 0


def test_new_masks_replace_the_old_entries() -> None:
    masks = masked()
    masks.apply(dict(net().named_parameters()))
    masks.set({"0": torch.tensor([True, True, False])})
    model = net()
    masks.apply(dict(model.named_parameters()))
    assert bool(model[3].weight[:, 1].any())
    assert not model[3].weight[:, 2].any()
    assert masks.widths == {"0": 2, "3": 2}


def test_the_caller_keeps_its_own_masks() -> None:
    masks = Masks(graph())
    mine = torch.tensor([True, False, True])
    masks.set({"0": mine})
    mine[1] = True
    assert masks.keep["0"].tolist() == [True, False, True]
    masks.state_dict()["0"][0] = False
    assert masks.widths["0"] == 2


def test_state_survives_a_safe_checkpoint() -> None:
    buffer = io.BytesIO()
    torch.save(masked().state_dict(), buffer)
    buffer.seek(0)
    restored = Masks(graph())
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert {name: mask.tolist() for name, mask in restored.keep.items()} == {
        name: mask.tolist() for name, mask in KEEP.items()
    }
    assert len(restored.off_entries()) == 2


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"0": KEEP["0"]}, r"lack channel group\(s\) 3"),
        ({**KEEP, "9": KEEP["0"]}, "no channel group '9'"),
        ({**KEEP, "3": KEEP["0"]}, r"'3' must be bool of shape \[4\], but is torch.bool of shape \[3\]"),
        ({**KEEP, "0": torch.tensor([0, 2, 1])}, "must be bool"),
    ],
)
def test_masks_of_another_network_are_refused_and_change_nothing(state: dict[str, Tensor], text: str) -> None:
    masks = Masks(graph())
    with pytest.raises(ConfigurationError, match=text):
        masks.load_state_dict(state)
    assert masks.widths == {"0": 3, "3": 4}


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(PruneError, match=r"3\.weight"):
        masked().apply({"5.weight": torch.ones(2, 16)})


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_may_be_sparse(dim: int) -> None:
    table, rows = nn.Embedding(6, 4, sparse=True), torch.tensor([1, 1, 3, 5])
    slot = Slot("weight", dim, each(table.weight.shape[dim]), "producer")
    masks = Masks(ChannelGraph({"table": ChannelGroup("table", (slot,), (slot,))}))
    masks.set({"table": torch.arange(len(slot.index)) % 3 != 0})
    (table(rows) * torch.arange(1.0, 17).view(4, 4)).sum().backward()
    kept = table.weight.grad.to_dense().index_fill(dim, torch.arange(0, len(slot.index), 3), 0)
    masks.apply_gradients({"weight": table.weight})
    assert torch.equal(table.weight.grad.to_dense(), kept)
    assert bool(kept.any())
