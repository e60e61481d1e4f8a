"""What a network keeps from one run to the next, and programs that show what that has to do with its channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.graph.program import (
    MAPPINGS,
    SEQUENCES,
    Program,
    before_putting_back,
    tensors_in,
)
from lightning_prune.graph.unregistered import loose_tensors, placed_tensors, unregistered


class Place(NamedTuple):
    """Where a module keeps something.

    Attributes:
        home: Its attributes or its buffers.
        name: The name there.
    """

    home: dict[str, Any]
    name: str


Values = dict[tuple[int, str], tuple[Place, Any]]
"""What is kept, by the identity of its home and its name."""


# Programs that go on -------------------------------------------------------------------------------------------------


def continued(model: nn.Module, program: Program) -> Program:
    """A program run twice, the second time with what the first has left behind, such as a hidden state."""

    def run() -> Any:
        with leftovers(model) as left:
            first = program.run()
        with _put(left.values()):
            return first, program.run()

    def handed_out(results: Any) -> Any:
        return [program.handed_out(result) for result in results]

    return _derived(program, "twice", run, handed_out=handed_out)


@contextmanager
def leftovers(model: nn.Module) -> Iterator[Values]:
    """What a run inside leaves in the attributes and buffers of modules that was not there before it."""
    left: Values = {}
    # The tensors are referred to by this, so that no other one is given the identity of one of them.
    before = {id(tensor): tensor for _, tensors in _kept(model) for tensor in tensors}

    def look() -> None:
        for place, tensors in _kept(model):
            if any(id(tensor) not in before for tensor in tensors):
                left[id(place.home), place.name] = place, _copied(place.home[place.name])

    with before_putting_back(look):
        yield left


def _kept(model: nn.Module) -> list[tuple[Place, list[Tensor]]]:
    """Every place with tensors that are no parameters."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        homes = [(module.__dict__, unregistered(module)), (module._buffers, list(module._buffers))]
        for home, names in homes:
            for name in names:
                tensors = [tensor for _, tensor in placed_tensors(name, home[name]) if _may_hold_channels(tensor)]
                if tensors:
                    found.append((Place(home, name), tensors))
    return found


def _copied(value: Any) -> Any:
    """A value whose containers are others, as those of a module get their contents back after a run."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else value


@contextmanager
def _put(values: Collection[tuple[Place, Any]]) -> Iterator[None]:
    with _restored([place for place, _ in values]):
        for place, value in values:
            place.home[place.name] = value
        yield


# Programs that begin anew --------------------------------------------------------------------------------------------


Amnesia = Callable[[Place], None]
"""A way to make a module forget."""


def forgetful_programs(model: nn.Module, programs: Sequence[Program]) -> list[Program]:
    """The same programs, run without what a run would make for itself if it was not there.

    Many networks make a bias, a mask or a table of positions in their first run and keep it, unregistered or as a
    buffer that is not saved. Once it is there it looks like any other constant, that could be cut along with the
    channels; but a network of fewer channels that makes it from the start, in another process or for a longer
    sequence, may make another one. How it is made only such a run can tell.

    Args:
        model: The network.
        programs: The ways of running it.

    Returns:
        None, if there is nothing that the network makes for itself.
    """
    places = _places_not_saved(model)
    judges = sorted((program for program in programs if not program.restricts), key=lambda program: program.training)
    expected = _outputs(judges[0]) if places and judges else None
    if expected is None:
        return []
    forgotten: list[tuple[Amnesia, list[Place]]] = []
    for group in places:
        for amnesia in (_remove, _set_none, _set_empty):
            with _without([(amnesia, group)]):
                found = _outputs(judges[0])
            if found is not None and _alike(found, expected):
                forgotten.append((amnesia, group))
                break
    return [_forgetful(program, forgotten) for program in programs if forgotten and not program.restricts]


def _forgetful(program: Program, forgotten: Sequence[tuple[Amnesia, Sequence[Place]]]) -> Program:
    def run() -> Any:
        with _without(forgotten):
            return program.run()

    return _derived(program, "from the start", run)


def _places_not_saved(model: nn.Module) -> list[list[Place]]:
    """Where there are tensors that a state dict does not hold; those of equal names in modules of a class together."""
    modules = dict(model.named_modules())
    groups: dict[tuple[type, str], dict[int, Place]] = defaultdict(dict)
    for path, tensor in loose_tensors(model).items():
        parent, _, name = path.partition("[")[0].rpartition(".")
        if _may_hold_channels(tensor):
            groups[type(modules[parent]), name][id(modules[parent])] = Place(modules[parent].__dict__, name)
    for module in modules.values():
        for name in module._non_persistent_buffers_set if not isinstance(module, torch.jit.ScriptModule) else ():
            buffer = module._buffers.get(name)
            if buffer is not None and _may_hold_channels(buffer):
                groups[type(module), name][id(module)] = Place(module._buffers, name)
    return [list(group.values()) for group in groups.values()]


@contextmanager
def _without(forgotten: Sequence[tuple[Amnesia, Sequence[Place]]]) -> Iterator[None]:
    with _restored([place for _, places in forgotten for place in places]):
        for amnesia, places in forgotten:
            for place in places:
                amnesia(place)
        yield


def _remove(place: Place) -> None:
    del place.home[place.name]


def _set_none(place: Place) -> None:
    place.home[place.name] = None


def _set_empty(place: Place) -> None:
    value = place.home[place.name]
    if isinstance(value, Tensor):
        place.home[place.name] = value.new_empty([0] * value.dim())
    elif type(value) in (*MAPPINGS, *SEQUENCES):
        place.home[place.name] = value.copy()
        place.home[place.name].clear()


# What both need ------------------------------------------------------------------------------------------------------


def _derived(program: Program, how: str, run: Callable[[], Any], **changes: Any) -> Program:
    """A program made of another one, which only restricts what that allows."""
    return replace(
        program, name=f"{program.name} {how}", run=run, restricts=True, derived=True, deployed=False, **changes
    )


@contextmanager
def _restored(places: Sequence[Place]) -> Iterator[None]:
    """Whatever is done to the homes of these places inside is undone, their order included."""
    homes = {id(place.home): place.home for place in places}
    before = [(home, dict(home)) for home in homes.values()]
    try:
        yield
    finally:
        for home, kept in before:
            home.clear()
            home.update(kept)


def _may_hold_channels(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _outputs(program: Program) -> list[Tensor] | None:
    """What a program returns; None if it fails."""
    try:
        return [tensor.detach().clone() for tensor in tensors_in(program.run())]
    except Exception:
        return None


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    shapes = [[tensor.shape for tensor in tensors] for tensors in (found, expected)]
    return shapes[0] == shapes[1] and all(
        torch.allclose(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True)
    )
