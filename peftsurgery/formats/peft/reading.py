"""Reading of peft adapters: from config and tensors to operations.

The tensors decide. A module's tensors have suffixes, and a shipped rule that the config identifies
lists just these suffixes for a site of the module's kind. Its ``where`` is replaced by the exact
paths; modules with the same settings are one operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftsurgery.anatomy import Placed, survey
from peftsurgery.anatomy.feeds import WEIGHTED
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.exchange import AdapterPlan
from peftsurgery.formats.joined_tensors import JoinedTensor, joined_tensors, values_of
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.beside import check_beside
from peftsurgery.formats.peft.library import FORMAT, listings
from peftsurgery.formats.peft.rank_patterns import spread
from peftsurgery.formats.peft.target_modules import (
    check_listed,
    check_targets,
    nearest_path,
    tied,
    unlike,
)
from peftsurgery.formats.peft.target_parameters import stacks_plan, take_stacks
from peftsurgery.formats.peft.trained_modules import trained_plan
from peftsurgery.formats.peft.whole_model import is_whole, whole_plan
from peftsurgery.language.clauses import address
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect, Rule
from peftsurgery.language.selection import select
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where
from peftsurgery.surgery.plan.cut import Cut, Operation


@dataclass(frozen=True)
class Option:
    """Candidate: one rule of a file for the tensors at a module."""

    file: RuleFile
    rule: Rule

    def fits(self, site: Placed, suffixes: Iterable[str]) -> bool:
        """Whether the rule has just these tensors at a site."""
        facts = (self.rule.where.facts or {}).items()
        return (
            self.rule.kind.name == site.kind
            and set(self.rule.suffixes(FORMAT).values()) == set(suffixes)
            and all(site.facts.get(name) == value for name, value in facts)
        )

    def at(self, sites: Sequence[Placed], settings: Mapping[str, Any], name: str) -> Operation:
        """The rule at just these sites, under an adapter's name."""
        paths = tuple(address(site) for site in sites)
        where = Where(paths=paths, facts=self.rule.where.facts)
        update = {"where": where, "expect": Expect(at_least=len(paths))}
        rules = (self.rule.model_copy(update=update),)
        file = self.file.model_copy(update={"rules": rules, "roles": {}})
        return Operation(file, resolve_settings(file, settings), name)


def peft_plan(model: GraphModel, adapter: PeftAdapter, name: str) -> AdapterPlan:
    """Plan a peft adapter on a model. Raises PSG504, PSG506, PSG507, PSG508."""
    if any(is_whole(file.rules) for file in adapter.config.files):
        plan = whole_plan(model, adapter, name)
    else:
        adapter = replace(adapter, tensors=spread(adapter.config, adapter.names, adapter.tensors))
        plan = _added_plan(model, adapter, name)
    plan.add(trained_plan(model, adapter, name))
    return plan


def _added_plan(model: GraphModel, adapter: PeftAdapter, name: str) -> AdapterPlan:
    """The operations for what is added to modules, and to stacks of experts."""
    module, every = model.source.module, survey(model.base_capture)
    check_beside(adapter.config, [p for each in adapter.beside for p in each.names.added], module)
    adapter, stacks = take_stacks(adapter, module)
    plan = _modules_plan(every, module, adapter, name, stacks)
    plan.add(stacks_plan(stacks, every, adapter, module, name))
    for each in adapter.beside:
        plan.add(_modules_plan(every, module, each, name))
    return plan


def _modules_plan(
    every: Iterable[Placed],
    module: nn.Module,
    adapter: PeftAdapter,
    name: str,
    others: Iterable[str] = (),
) -> AdapterPlan:
    """The operations for what is added to modules; ``others`` has adapters too."""
    config, sites = adapter.config, [site for site in every if site.slice is None]
    # an adapter does not say how its base is kept: that is for who captured the base to choose
    rules = [Option(file, rule) for file in config.files for rule in file.rules if not rule.store]
    if all(option.rule.kind.name == "parameter" for option in rules):
        adapter = adapter.once(module)
    added = adapter.names.added
    placed = {path: _site_of(path, sites, rules, adapter, module) for path in added}
    adapter = _as_matrices(adapter, placed.values())
    check_targets(config, module, added)
    config.check_patterns([*added, *others])
    adapter = adapter.renamed({path: site.module for path, site in placed.items()})
    placed = {site.module: site for site in placed.values()}
    chosen = {path: _fitting(site, rules, adapter, module) for path, site in placed.items()}
    for key in listings(config.files):
        listed = [m for m, options in chosen.items() if options[0].rule.listing(FORMAT) == key]
        check_listed(config, key, listed, chosen)
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], list[Option], list[Placed]]] = {}
    for path, options in chosen.items():
        settings = config.settings(options[0].file, path)
        group = (options[0].file.name, id(options[0].rule), repr(settings))
        groups.setdefault(group, (settings, options, []))[2].append(placed[path])
    plan = AdapterPlan()
    for settings, options, here in groups.values():
        everywhere = [other for site in here for other in _one_tensor(site, sites)]
        operation = _best(options, sites, settings, here).at(everywhere, settings, name)
        cuts = [Cut(operation, operation.file.rules[0], site) for site in here]
        plan.add(AdapterPlan([operation], cuts, _values(cuts, adapter)))
    return plan


def _tensors(cuts: Iterable[Cut], adapter: PeftAdapter) -> dict[str, JoinedTensor]:
    """The tensors that the parameters of cuts are, by their keys in the file."""
    added = adapter.names.added
    return joined_tensors(
        cuts,
        lambda rule: rule.suffixes(FORMAT),
        lambda cut, suffix: added[cut.placed.module][suffix],
    )


def _values(cuts: Sequence[Cut], adapter: PeftAdapter) -> dict[str, torch.Tensor]:
    """The values of the parameters of cuts. PSG507 for a tensor of another shape."""
    wanted = _tensors(cuts, adapter)
    return values_of(wanted, {key: adapter.tensors[key] for key in wanted})


def _as_matrices(adapter: PeftAdapter, sites: Iterable[Placed]) -> PeftAdapter:
    """The adapter, with kernels of one tap as matrices where sites are linears."""
    tensors = dict(adapter.tensors)
    for site in sites:
        if "pointwise" in site.facts:
            for key in adapter.names.added[site.module].values():
                tensors[key] = tensors[key].flatten(1)
    return replace(adapter, tensors=tensors)


def _site_of(
    path: str,
    sites: Sequence[Placed],
    options: Sequence[Option],
    adapter: PeftAdapter,
    module: nn.Module,
) -> Placed:
    """The site at a module; one that a rule can be for comes first. PSG506 if there is none."""
    kinds = {option.rule.kind.name for option in options}
    suffixes = adapter.names.added[path]
    names = tied(module, path) if kinds == {"parameter"} else {path}
    here = [site for site in sites if site.module in names and _is_wrapped(site, kinds)]
    if here:  # a convolution that is a linear too is one where a rule for convolutions fits

        def unfit(site: Placed) -> tuple[bool, bool, bool]:
            fits = any(option.fits(site, suffixes) for option in options)
            return not fits, "pointwise" in site.facts, site.kind not in kinds

        return min(here, key=unfit)
    key = next(iter(adapter.names.added[path].values()))
    known = {site.module for site in sites if site.kind in kinds}
    reached = any(name == path for name, _ in module.named_modules())
    why = "is not reached by these inputs" if reached else "is not in the model"
    message = f"the tensor '{key}' is for '{path}', which {why}"
    raise SurgeryError("PSG506", message, nearest_path(path, known))


def _one_tensor(site: Placed, sites: Iterable[Placed]) -> list[Placed]:
    """The sites of the parameter that a site is, one for each name that the graph reads it by."""
    tie = site.facts.get("tied")
    if not tie:
        return [site]
    return [other for other in sites if other.kind == site.kind and other.facts["tied"] == tie]


def _is_wrapped(site: Placed, kinds: Collection[str]) -> bool:
    """Whether what peft puts on a module can be for a site of it: one of these kinds, or a product.

    Of the module's parameters, peft adapts the weight.
    """
    if site.kind == "parameter":
        return site.kind in kinds and str(site.parameter).endswith(".weight")
    return site.kind in WEIGHTED


def _fitting(
    site: Placed, options: Sequence[Option], adapter: PeftAdapter, module: nn.Module
) -> list[Option]:
    """The rules that have just the tensors of a site's module. PSG507 if there are none."""
    suffixes = adapter.names.added[site.module]
    odd = unlike(module, site.module)
    if odd is not None:
        message = f"'{site.module}' {odd}"
        raise SurgeryError("PSG507", message, "the adapter is no change of weights")
    fitting = [option for option in options if option.fits(site, suffixes)]
    if fitting:
        # rules of one method may have the same suffix: then the shapes tell them apart
        return [option for option in fitting if _has_shape(option, site, adapter)] or fitting
    wanted = {
        suffix
        for option in options
        if option.rule.kind.name == site.kind
        for suffix in option.rule.suffixes(FORMAT).values()
    }
    missing, key = sorted(wanted - set(suffixes)), next(iter(suffixes.values()))
    if missing:
        raise SurgeryError("PSG507", f"'{key}' has no '{missing[0]}' beside it")
    more = ", ".join(sorted(set(suffixes) - wanted)) or "such tensors"
    message = f"no shipped rule of this adapter's method has {more} at a site of this kind"
    raise SurgeryError("PSG507", f"'{key}' is at a {site.kind}: {message}")


def _has_shape(option: Option, site: Placed, adapter: PeftAdapter) -> bool:
    """Whether the tensors at a site have the shapes that a rule's parameters have there."""
    settings = adapter.config.settings(option.file, site.module)
    operation = Operation(option.file, resolve_settings(option.file, settings), "")
    wanted = _tensors([Cut(operation, option.rule, site)], adapter)
    return all(tuple(adapter.tensors[key].shape) == one.shape for key, one in wanted.items())


def _best(
    options: Sequence[Option],
    sites: Sequence[Placed],
    settings: Mapping[str, Any],
    wanted: Sequence[Placed],
) -> Option:
    """Best of equivalent rules: one that would choose exactly these modules, or the first."""
    modules = {site.module for site in wanted}
    for option in options:
        given = resolve_settings(option.file, settings)
        chosen = select(sites, option.rule, given, option.file.roles).kept
        if {site.module for site in chosen} == modules:
            return option
    return options[0]
