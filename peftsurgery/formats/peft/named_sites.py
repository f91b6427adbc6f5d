"""Sites of a peft adapter as its tensors' names tell them: no model is built and no torch imported.

A tensor `base_model.model.<module>.lora_A.weight` is for the linear whose weight the base's files
have under `<module>.weight`, and the shapes of both say how that lies in memory. What names and
shapes leave open (convolutions, stacks, tables of tokens, modules saved whole, a base that was
folded into before) is for whoever captures the model: then there is no answer here rather than a
guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.arrays import FLOATS
from peftsurgery.checkpoint.codecs.coded import PlainView
from peftsurgery.checkpoint.plan import SiteFold
from peftsurgery.checkpoint.record import FILE
from peftsurgery.checkpoint.row_wise import line_axes, parameter_shape, row_axes
from peftsurgery.files import read_object
from peftsurgery.formats.peft.config import PARAMETERS, AdapterConfig
from peftsurgery.formats.peft.files import read_peft_config, tensors_file
from peftsurgery.formats.peft.library import FORMAT, forms_of, known_names, listings
from peftsurgery.formats.peft.module_paths import is_listed, target_test
from peftsurgery.formats.peft.tensor_keys import Names, sort_keys
from peftsurgery.language.page import Page, PageRule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.tensor_file import Tensor, TensorFile, read_header
from peftsurgery.tokenizer_files import tokens_needed

CONFIG = "config.json"
PLACES = ("linear",)  # the kinds of sites whose weights are matrices under their module's name


@dataclass(frozen=True)
class Fit:
    """A rule that an adapter's tensors at a weight fit, if that is ``turned`` or if it is not.

    ``numbers`` are what its expressions read there.
    """

    page: Page
    rule: PageRule
    turned: bool
    numbers: Mapping[str, Any]

    @cached_property
    def rows(self) -> Mapping[str, int] | None:
        """What :func:`row_axes` finds; it is asked of the rule that is chosen."""
        return row_axes(self.rule, self.numbers)

    @cached_property
    def lines(self) -> Mapping[str, int] | None:
        """What :func:`line_axes` finds, for a weight that is turned."""
        return line_axes(self.rule, self.numbers, True) if self.turned else None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the page declares."""
        return {name: self.numbers[name] for name in self.page.with_}


@dataclass(frozen=True)
class NamedAdapter:
    """A peft adapter and the files of its base: what can be said of both by names and shapes."""

    config: AdapterConfig
    file: TensorFile
    names: Names
    base: PlainView

    @cached_property
    def held(self) -> Mapping[str, tuple[TensorFile, Tensor]]:
        """The base's tensors by name, each with the file that it is in."""
        return self.base.tensors

    @cached_property
    def named(self) -> Callable[[str], str] | None:
        """What the base's files call a module; None if they have not all of the adapter's.

        Of a model without its head the files may lack the first part, and of one with a head have
        one more.
        """
        held = self.held
        first = next(iter(self.names.added))
        ending = f".{first}.weight"
        more = [name.removesuffix(f"{first}.weight") for name in held if name.endswith(ending)]
        cut = first.partition(".")[0] + "."
        tried: list[Callable[[str], str]] = [lambda path: path]
        if all(path.startswith(cut) for path in self.names.added):
            tried.append(lambda path: path.removeprefix(cut))
        if len(more) == 1:
            tried.append(lambda path: more[0] + path)
        return next(
            (t for t in tried if all(f"{t(path)}.weight" in held for path in self.names.added)),
            None,
        )

    @cached_property
    def lying(self) -> str | None:
        """How all biased weights whose shape tells it lie: "plain" as (out, in), or "turned"."""
        held, found = self.held, set[str]()
        for name, (_, tensor) in held.items():
            bias = held.get(f"{name.removesuffix('.weight')}.bias")
            if bias is not None and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]:
                found.add("plain" if bias[1].shape == tensor.shape[:1] else "turned")
        return found.pop() if len(found) == 1 else None

    @cached_property
    def said(self) -> dict[str, Any]:
        """The config of the base. PSG206 if it is damaged."""
        return read_object(self.base.folder / CONFIG, "PSG206")

    @cached_property
    def vocabularies(self) -> set[int]:
        """The sizes that the base's config gives for vocabularies, its parts' own among them."""
        parts = [self.said, *(part for part in self.said.values() if isinstance(part, dict))]
        return {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}

    def may_be_tied(self, tensor: Tensor) -> bool:
        """Whether a weight may be one tensor with another: tables of tokens and heads can be."""
        is_apart = self.said.get("tie_word_embeddings") is False
        return not is_apart and not self.vocabularies.isdisjoint(tensor.shape)

    def module(self, path: str) -> str:
        """What the base's files call an adapted module."""
        return path if self.named is None else self.named(path)

    def weight(self, path: str) -> Tensor:
        """The weight of an adapted module."""
        return self.held[f"{self.module(path)}.weight"][1]

    def shapes(self, path: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's tensors at a module, by their suffixes."""
        added = self.names.added[path].items()
        return {suffix: self.file.tensors[key].shape for suffix, key in added}

    def look(self, path: str) -> tuple[Any, ...]:
        """All that decides which rules fit at a module; alike for many."""
        settings = [repr(self.config.settings(page, path)) for page in self.config.pages]
        return (self.weight(path).shape, *sorted(self.shapes(path).items()), *settings)

    def chosen(self, path: str, fits: Sequence[Fit]) -> Fit | None:
        """The rule that is meant at a module, of those that fit; None if that cannot be said."""
        weight = self.weight(path)
        if weight.dtype not in FLOATS or self.may_be_tied(weight):
            return None
        turned = self.is_turned(self.module(path), {fit.turned for fit in fits})
        # rules of one method that fit alike differ in where they go, not in what they do
        return next((fit for fit in fits if fit.turned is turned), None)

    def is_turned(self, module: str, fitting: Collection[bool]) -> bool | None:
        """Whether a weight is stored as (in, out); None if that cannot be said.

        ``fitting`` are the answers with which the adapter's shapes agree. A square weight fits
        either way: layers with turned weights have biases, and lie as the model's other ones do.
        """
        if len(fitting) < 2:
            return next(iter(fitting), None)
        if f"{module}.bias" not in self.held:
            return False
        return None if self.lying is None else self.lying == "turned"


@dataclass(frozen=True)
class NamedFold:
    """What an adapter does to the files of its base: the rule that fits at each module."""

    adapter: NamedAdapter
    fits: Mapping[str, Fit]

    @property
    def sites(self) -> tuple[SiteFold, ...]:
        """The fold at each module."""
        return tuple(_site(self.adapter, path, fit) for path, fit in self.fits.items())

    @property
    def methods(self) -> list[tuple[Page, dict[str, Any]]]:
        """The rules at just their modules, those of equal settings together, with the settings."""
        groups: dict[Any, tuple[Fit, list[str]]] = {}
        for path, fit in self.fits.items():
            key = (fit.page.name, id(fit.rule), repr(fit.settings))
            groups.setdefault(key, (fit, []))[1].append(path)
        found = []
        for fit, paths in groups.values():
            rule = {**fit.rule.said, "where": {"paths": paths}}
            found.append((fit.page.changed(rules=[rule], roles=None), fit.settings))
        return found


def named_fold(folder: Path, base: PlainView) -> NamedFold | None:
    """What an adapter does to the files of its base; None if its names leave that open.

    Raises PSG501 to PSG506 for an adapter that is damaged or not honoured.
    """
    config = AdapterConfig(read_peft_config(folder))
    if config.names(PARAMETERS):
        return None
    file = read_header(tensors_file(folder), "PSG505")
    adapter = NamedAdapter(config, file, _names(config, file.tensors), base)
    if _is_more(adapter, folder) or adapter.named is None:
        return None
    found, known = dict[str, Fit](), dict[Any, list[Fit]]()
    for path in adapter.names.added:
        key = adapter.look(path)
        fits = known[key] if key in known else known.setdefault(key, list(_fits(adapter, path)))
        chosen = adapter.chosen(path, fits)
        if chosen is None:
            return None
        found[path] = chosen
    if not _is_meant(adapter, {path: fit.rule for path, fit in found.items()}):
        return None
    config.check_patterns(found)
    return NamedFold(adapter, found)


def _names(config: AdapterConfig, keys: Collection[str]) -> Names:
    """The keys of an adapter's tensors: names of other methods are looked for if need be."""
    own = {name for form in forms_of(config.values["peft_type"]) for name in form.suffixes}
    are_own = all(any(key.endswith(f".{name}") for name in own) for key in keys)
    return sort_keys(keys, own if are_own else known_names())


def _is_more(adapter: NamedAdapter, folder: Path) -> bool:
    """Whether an adapter is more than tensors at modules, or its base not what the files say."""
    names, values, home = adapter.names, adapter.config.values, adapter.base.folder
    spread = [v for v in (values.get("rank_pattern") or {}).values() if type(v) is not int]
    whole = names.own or names.again or names.frozen or "" in names.added or not names.added
    if whole or spread or (home / FILE).exists() or not (home / CONFIG).is_file():
        return True
    tokens = tokens_needed(folder)
    return tokens > 0 and tokens > min(adapter.vocabularies, default=0)


def _site(adapter: NamedAdapter, path: str, fit: Fit) -> SiteFold:
    """What a rule does to the weight of a module."""
    module, keys, rule = adapter.module(path), adapter.names.added[path], fit.rule
    names = {"W": f"{module}.weight", "b": f"{module}.bias"}
    weights = {short: name for short, name in names.items() if name in adapter.held}
    return SiteFold(
        adapter="default",
        module=path,
        weights=weights,
        parameters={name: keys[suffix] for name, suffix in rule.suffixes(FORMAT).items()},
        numbers=fit.numbers,
        fold=rule.fold,
        let=rule.let,
        absent=tuple(name for name in rule.kind.weights if name not in weights),
        turned=frozenset({"W"} if fit.turned else ()),
        rows=fit.rows,
        lines=fit.lines,
    )


def _fits(adapter: NamedAdapter, path: str) -> Iterator[Fit]:
    """The rules whose parameters have the shapes of the adapter's tensors at a weight."""
    shapes, weight = adapter.shapes(path), adapter.weight(path).shape
    for page in adapter.config.pages if len(weight) == 2 else ():
        settings = resolve_settings(page, adapter.config.settings(page, path))
        for rule, turned in product(page.rules, (False, True)):
            suffixes = rule.suffixes(FORMAT)
            fits = rule.kind.name in PLACES and rule.is_plain
            if not fits or set(suffixes.values()) != set(shapes) or not rule.fold:
                continue
            out, in_ = reversed(weight) if turned else weight
            numbers = {**settings, "in": in_, "out": out}
            if all(parameter_shape(rule, n, numbers) == shapes[s] for n, s in suffixes.items()):
                yield Fit(page, rule, turned, numbers)


def _is_meant(adapter: NamedAdapter, rules: Mapping[str, PageRule]) -> bool:
    """Whether the config means just the modules that there are tensors for, as far as is known."""
    config, wanted = adapter.config, adapter.config.values.get("target_modules")
    for key in listings(config.pages):
        value = config.values.get(key)
        names = value if isinstance(value, str) else config.names(key)
        for path, rule in rules.items() if value is not None else ():
            if is_listed(names, path) != (rule.listing(FORMAT) == key):
                return False
    if not wanted:
        return True
    meant = target_test(config)
    others = {name.removesuffix(".weight") for name in adapter.held}
    others -= {adapter.module(path) for path in rules}
    return all(map(meant, rules)) and not any(map(meant, others))
