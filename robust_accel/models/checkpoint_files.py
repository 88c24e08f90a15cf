"""A network's weights in a file of tensors, however the file wraps them.

The network's own keys say where to look: in whichever mapping of the file, and after whichever
prefix, all of them are found, there the weights are. So ``state_dict``, ``net``, ``model_ema`` and
any other container, and ``module.``, ``model.``, ``_orig_mod.`` and any other prefix are one case.
Whatever else lies beside them must be known too: the pixels' mean and std, which go to
``PixelClassifier``, another copy of the network, or a counter. Anything else is refused.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
# Put into the middle of keys by those who wrap parts of a network (compile, FSDP, activations).
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa)([^a-z]|$)")
_STATISTICS = (("mean", "std"), ("mu", "sigma"))
_OF_PIXELS = re.compile(r"((image|input|pixel)_)?(mean|std|mu|sigma)")
_DEPTH = 5  # of mappings in mappings that are looked into


@dataclass(frozen=True)
class FoundWeights:
    """What a file holds of a network.

    Attributes:
        weights: By the network's own keys.
        statistics: The pixels' ``mean`` and ``std``, [C] each, where the file has them.
        said: Where in the file this was, and what other copy was left.
        model_args: The network's arguments, where they are known; see ``published.py``.
        pixels: What such networks do with pixels, where their code is known.
    """

    weights: State
    statistics: State
    said: str
    model_args: dict[str, Any] | None = None
    pixels: str = ""


@dataclass(frozen=True)
class _Candidate:
    where: tuple[str, ...]  # keys of the mappings around the state
    prefix: str
    state: State
    count: int  # of the network's keys that are there

    @property
    def said(self) -> str:
        place = ".".join(self.where)
        prefix = f"keys after {self.prefix!r}" if self.prefix else ""
        return ", ".join(filter(None, (place, prefix))) or "its keys"

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(f"{'.'.join(self.where)}.{self.prefix}".lower()))

    def weight(self, key: str) -> Tensor:
        return self.state[self.prefix + key]


def find_weights(
    content: Any, own: Mapping[str, Tensor], unused: re.Pattern[str] | None = None
) -> FoundWeights:
    """Find a network's weights in a file; an average (EMA, SWA) goes before the last iterate.

    Args:
        content: Of the file, from ``read_weights``.
        own: The network's state dict. Shapes are the caller's to compare.
        unused: Keys of tensors that its code makes and never uses: they are not looked at.

    Raises:
        ValueError: The file holds no such network, several and no average among them, or tensors
            besides it that would change what it computes.
    """
    states = [(where, _used(state, unused)) for where, state in _states(content)]
    candidates = [c for where, state in states for c in _candidates(where, state, own)]
    whole = [c for c in candidates if c.count == len(own)]
    if not whole:
        raise ValueError(_why_not(content, candidates, own))
    taken = _choose(whole, own)
    statistics, strangers = _beside(taken, whole, own, content)
    if strangers:
        raise ValueError(f"does not fit: {few(_foreign(strangers), '; ')}")
    others = [c.said for c in whole if c is not taken]
    said = taken.said + (f"; also there, and left: {' and '.join(others)}" if others else "")
    return FoundWeights({key: taken.weight(key) for key in own}, statistics, said)


def keys_of(content: Any) -> set[str]:
    """The keys of all tensors in a file's mappings."""
    return {key for _, state in _states(content) for key in state}


def _states(content: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping with tensors in it, and the keys that lead there."""
    if not isinstance(content, Mapping) or len(where) > _DEPTH:
        return
    state = _tensors(content)
    if state:
        yield where, state
    for key, value in content.items():
        if isinstance(key, str):  # an optimizer's have numbers
            yield from _states(value, (*where, key))


def _tensors(content: Mapping[Any, Any]) -> State:
    return {
        _WRAPPERS.sub("", key): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _used(state: State, unused: re.Pattern[str] | None) -> State:
    return {k: v for k, v in state.items() if unused is None or not unused.search(k)}


def _candidates(
    where: tuple[str, ...], state: State, own: Mapping[str, Tensor]
) -> Iterator[_Candidate]:
    """By prefix: how many of the network's keys come after it."""
    starts = ((key, i) for key in state for i in (0, *(m.end() for m in re.finditer(r"\.", key))))
    counts = Counter(key[:i] for key, i in starts if key[i:] in own)
    for prefix, count in counts.items():
        yield _Candidate(where, prefix, state, count)


def _choose(whole: list[_Candidate], own: Mapping[str, Tensor]) -> _Candidate:
    averaged = [c for c in whole if c.averaged]
    among = averaged or whole
    first = among[0]
    if all(first.weight(key).equal(c.weight(key)) for c in among for key in own):
        return first
    raise ValueError(
        f"holds several such networks ({'; '.join(c.said for c in among)}) and none says that it "
        "is the one: keep one of them in the file"
    )


def _beside(
    taken: _Candidate, whole: list[_Candidate], own: Mapping[str, Tensor], content: Any
) -> tuple[State, list[str]]:
    """What lies beside the weights: the pixels' statistics, and keys that nobody knows."""
    copies = [c.prefix for c in whole if c.where == taken.where]
    rest = {
        key: value
        for key, value in taken.state.items()
        if not any(key.startswith(p) and key[len(p) :] in own for p in copies)
    }
    pairs = list(_pairs(rest))
    known = {key for pair in pairs for key in pair}
    found = [(rest[mean].flatten(), rest[std].flatten()) for mean, std in pairs]
    for key in taken.where:  # a mean and a std around the weights; acc_mean is another's
        around = _listed_statistics(content)
        named = {k: v for k, v in around.items() if _OF_PIXELS.fullmatch(k)}
        found += [(named[mean], named[std]) for mean, std in _pairs(named)]
        content = content[key]
    if any(not (a.equal(mean) and b.equal(std)) for a, b in found for mean, std in found[:1]):
        raise ValueError("holds several means and stds of the pixels: keep one of each in the file")
    statistics = {"mean": found[0][0].float(), "std": found[0][1].float()} if found else {}
    return statistics, [key for key in rest if key not in known and not _counts(rest[key])]


def _pairs(state: State) -> Iterator[tuple[str, str]]:
    """Keys of a mean and the std that belongs to it: ``mu``, ``normalize.mean``, ``pixel_mean``."""
    for key in state:
        for mean, std in _STATISTICS:
            head = key.removesuffix(mean)
            named = head != key and (head == "" or head[-1] in "._")
            if named and _channelwise(state[key]) and _channelwise(state.get(head + std)):
                yield key, head + std


def _channelwise(value: Tensor | None) -> bool:
    """Whether it is one number a channel, in whichever of the shapes that broadcast over images."""
    if value is None or not value.is_floating_point() or not 0 < value.numel() <= 16:
        return False
    return value.ndim <= 4 and value.numel() == max((1, *value.shape))


def _listed_statistics(content: Mapping[Any, Any]) -> State:
    """Tensors and lists of numbers among a mapping's values, as tensors [C]."""
    found = {}
    for key, value in content.items():
        numbers = isinstance(value, list | tuple) and all(isinstance(v, float) for v in value)
        if isinstance(key, str) and (isinstance(value, Tensor) or (numbers and value)):
            found[key] = torch.as_tensor(value).flatten()
    return found


def _counts(value: Tensor) -> bool:
    """A counter or a flag (SWA's ``n_averaged``), no weight."""
    return value.numel() == 1 and not value.is_floating_point()


def _why_not(content: Any, candidates: list[_Candidate], own: Mapping[str, Tensor]) -> str:
    """Why no mapping of the file holds the whole network."""
    best = max(candidates, key=lambda c: c.count, default=None)
    if best is not None and 2 * best.count >= len(own):
        missing = [f"{key} is missing" for key in own if best.prefix + key not in best.state]
        extra = [k for k in best.state if k.removeprefix(best.prefix) not in own]
        extra = [k for k in extra if not _counts(best.state[k])]
        return f"does not fit ({best.said}): {few(missing + _foreign(extra), '; ')}"
    return f"does not fit: it holds {_summary(content)}; looked for were {few([*own])}"


def _foreign(keys: list[str]) -> list[str]:
    return [f"{key} is not the network's" for key in keys]


def _summary(content: Any) -> str:
    """The file's top-level keys, and a few of the keys below."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    parts = []
    for key, value in content.items():
        inside = isinstance(value, Mapping) and len(value) > 0
        parts.append(f"{key} ({few([str(k) for k in value])})" if inside else str(key))
    return few(parts, number=6) or "nothing"


def few(parts: list[str], separator: str = ", ", number: int = 3) -> str:
    """The first ones, and how many more there are."""
    rest = f" and {len(parts) - number} more" if len(parts) > number else ""
    return separator.join(parts[:number]) + rest
