"""Reading of peft adapters: from config and tensors to operations.

The tensors decide. A module's tensors have suffixes, and a shipped rule that the config identifies
lists just these suffixes for a site of the module's kind. Its ``where`` is replaced by the exact
paths; modules with the same settings are one operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftsurgery.anatomy import Placed, survey
from peftsurgery.capture import GraphModel
from peftsurgery.capture.builds import tables
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.config import FORMAT, all_suffixes, listings
from peftsurgery.formats.peft.prefix import (
    KIND,
    check_config,
    prefixed,
    prefixes,
    shape_in_file,
    split,
)
from peftsurgery.formats.peft.rank_patterns import spread
from peftsurgery.formats.peft.target_modules import (
    check_listed,
    check_targets,
    ends,
    saved_whole,
    unlike,
)
from peftsurgery.language import Expect, Rule, RuleFile, Where, resolve_settings, select, shape_of
from peftsurgery.surgery.plan.cut import Cut, Operation

# Heads that peft adds to modules_to_save by itself, whichever of them a model has.
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# The kinds of site that have a weight of their own for a method to change.
WEIGHTED = ("linear", "embedding", "conv", "experts")
# What has parameters of no module.
WHOLE = "inputs"


@dataclass(frozen=True)
class Plan:
    """The operations that an adapter is, and the values of their parameters by name."""

    operations: list[Operation] = field(default_factory=list)
    known: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Option:
    """A rule of a file that may be meant at a module."""

    file: RuleFile
    rule: Rule

    def fits(self, placed: Placed, suffixes: Mapping[str, str]) -> bool:
        facts = (self.rule.where.facts or {}).items()
        return (
            self.rule.kind.name == placed.kind
            and set(self.rule.suffixes(FORMAT).values()) == set(suffixes)
            and all(placed.facts.get(name) == value for name, value in facts)
        )


class Importer:
    """Makes the plan for one adapter on one model."""

    def __init__(
        self,
        model: GraphModel,
        adapter: PeftAdapter,
        name: str,
    ) -> None:
        self.adapter, self.config, self.name = adapter, adapter.config, name
        self.graph, self.model = model, model.source.module
        self.sites = [s for s in survey(model.base_capture) if s.slice is None]
        self.names = adapter.names
        self.tensors = spread(self.config, self.names, adapter.tensors)
        rules = [(file, rule) for file in self.config.files for rule in file.rules]
        # an adapter does not say how its base is kept: that is for who captured the base to choose
        self.options = [_Option(file, rule) for file, rule in rules if not rule.store]

    def plan(self) -> Plan:
        """The plan. Raises PSG504, PSG506, PSG507 and PSG508 for what does not fit."""
        plan = Plan()
        if any(option.rule.kind.name == KIND for option in self.options):
            self.add_prefix(plan)
            self.add_trained(plan)
            return plan
        placed = {module: self.site_of(module) for module in self.names.added}
        check_targets(self.config, self.model, self.names.added)
        self.config.check_patterns(self.names.added)
        groups: dict[tuple[Any, ...], tuple[list[_Option], list[Placed]]] = {}
        chosen = {module: self.fitting(site, module) for module, site in placed.items()}
        self.check_lists(chosen)
        for module, site in placed.items():
            options = chosen[module]
            settings = self.config.settings(options[0].file, module)
            key = (options[0].file.name, id(options[0].rule), tuple(settings.items()))
            groups.setdefault(key, (options, []))[1].append(site)
        for options, sites in groups.values():
            self.add_operation(plan, options, sites)
        self.add_trained(plan)
        return plan

    def add_prefix(self, plan: Plan) -> None:
        """The operation for a prefix, which is one tensor. PSG506 to PSG508 if it does not fit."""
        file = next(f for f in self.config.files if not any(rule.train for rule in f.rules))
        operation = prefixed(self.graph, file, self.config.settings(file, ""), self.name)
        cuts = prefixes(self.graph, operation)
        keys = self.names.added.pop("", {})
        if self.names.added or len(keys) != 1:
            known = ", ".join(all_suffixes() & set(self.tensors)) or "no such tensor"
            raise SurgeryError("PSG506", f"a prefix is one tensor, and the file has {known}")
        if not cuts:
            raise SurgeryError("PSG507", "the model has no self-attention for a prefix")
        key = next(iter(keys.values()))
        value = self.shaped(key, shape_in_file(cuts), "the model")
        check_config(self.config, self.graph, cuts)
        plan.operations.append(operation)
        plan.known.update(split(self.graph, cuts, value))

    def site_of(self, module: str) -> Placed:
        """The site at a module; one that a rule can be for comes first. PSG506 if there is none."""
        kinds = {option.rule.kind.name for option in self.options}
        wanted = WEIGHTED if module else (WHOLE,)
        here = [site for site in self.sites if site.module == module and site.kind in wanted]
        if here:
            return min(here, key=lambda site: site.kind not in kinds)
        key = next(iter(self.names.added[module].values()))
        known = {site.module for site in self.sites if site.kind in kinds}
        reached = any(name == module for name, _ in self.model.named_modules())
        why = "is not reached by these inputs" if reached else "is not in the model"
        raise SurgeryError(
            "PSG506", f"the tensor '{key}' is for '{module}', which {why}", _hint(module, known)
        )

    def fitting(self, site: Placed, module: str) -> list[_Option]:
        """The rules that have just these tensors at this site. PSG507 if there are none."""
        suffixes = self.names.added[module]
        odd = unlike(self.model, module)
        if odd is not None:
            raise SurgeryError("PSG507", f"'{module}' {odd}", "the adapter is no change of weights")
        fitting = [option for option in self.options if option.fits(site, suffixes)]
        if fitting:
            # rules of one method may have the same suffix: then the shapes tell them apart
            return [option for option in fitting if self.has_shape(option, site)] or fitting
        wanted = {
            suffix
            for option in self.options
            if option.rule.kind.name == site.kind
            for suffix in option.rule.suffixes(FORMAT).values()
        }
        missing, key = sorted(wanted - set(suffixes)), next(iter(suffixes.values()))
        if missing:
            raise SurgeryError("PSG507", f"'{key}' has no '{missing[0]}' beside it")
        more = ", ".join(sorted(set(suffixes) - wanted)) or "such tensors"
        message = f"no shipped rule of this adapter's method has {more} at a site of this kind"
        raise SurgeryError("PSG507", f"'{key}' is at a {site.kind}: {message}")

    def has_shape(self, option: _Option, site: Placed) -> bool:
        """Whether the tensors at a site have the shapes that a rule's parameters have there."""
        settings = self.config.settings(option.file, site.module)
        operation = Operation(option.file, resolve_settings(option.file, settings), self.name)
        cut = Cut(operation, option.rule, site)
        keys = self.names.added[site.module]
        return all(
            tuple(self.tensors[keys[suffix]].shape)
            == shape_of(option.rule.params[param], option.rule, cut.numbers)
            for param, suffix in option.rule.suffixes(FORMAT).items()
        )

    def check_lists(self, chosen: Mapping[str, list[_Option]]) -> None:
        """Refuse a config whose lists of modules contradict the tensors. PSG508."""
        for key in listings(self.config.files):
            listed = [m for m, options in chosen.items() if options[0].rule.listing(FORMAT) == key]
            check_listed(self.config, key, listed, chosen)

    def add_operation(self, plan: Plan, options: list[_Option], sites: Sequence[Placed]) -> None:
        """One operation for sites with the same rule and settings."""
        settings = self.config.settings(options[0].file, sites[0].module)
        option = _best(options, self.sites, settings, {site.module for site in sites})
        paths = tuple(site.module for site in sites)
        where = Where(paths=paths, facts=option.rule.where.facts)
        update = {"where": where, "expect": Expect(at_least=len(paths))}
        rule = option.rule.model_copy(update=update if all(paths) else {})
        file = option.file.model_copy(update={"rules": (rule,), "roles": {}})
        operation = Operation(file, resolve_settings(file, settings), self.name)
        plan.operations.append(operation)
        for site in sites:
            cut = Cut(operation, rule, site)
            keys = self.names.added[site.module]
            for param, suffix in rule.suffixes(FORMAT).items():
                shape = shape_of(rule.params[param], rule, cut.numbers)
                value = self.shaped(keys[suffix], shape, site.module)
                plan.known[cut.parameters[param]] = value

    def shaped(self, key: str, shape: Sequence[int], what: str) -> torch.Tensor:
        """The tensor of a key. PSG507 if it has another shape."""
        value = self.tensors[key]
        if tuple(value.shape) != tuple(shape):
            raise SurgeryError(
                "PSG507",
                f"'{key}' has shape {list(value.shape)}, where '{what}' needs {list(shape)}",
                "it was made for another base, or the config has another rank",
            )
        return value

    def add_trained(self, plan: Plan) -> None:
        """Operations for the model's own parameters that the adapter brings along."""
        saved = self.config.names("modules_to_save")
        self.check_saved(saved)
        groups: dict[str, list[str]] = {"modules_to_save": [], "bias": []}
        known = tables(self.model)
        for name in self.names.own:
            owner, _, leaf = name.rpartition(".")
            if self.adapter.trains(name, self.model):
                groups["modules_to_save"].append(name)
            elif leaf == "bias" and self.config.values.get("bias", "none") != "none":
                groups["bias"].append(name)
            elif owner in self.names.added or owner in known:
                self.check_base(name, self.names.own[name])
            else:
                raise self.homeless(name)
        for name, key in self.names.frozen.items():
            self.check_base(name, key)
        for group, names in groups.items():
            if names:
                self.train(plan, group, names)

    def check_saved(self, saved: Sequence[str]) -> None:
        """Refuse a module that is to be saved whole and of which there is no tensor. PSG508."""
        automatic = HEADS.get(str(self.config.values.get("task_type")), ())
        owners = {name.rpartition(".")[0] for name in self.names.own}
        modules = [name for name, _ in self.model.named_modules(remove_duplicate=False)]
        for name in saved:
            exists = any(module.endswith(name) for module in modules)
            covered = any(saved_whole(owner, [name]) for owner in owners)
            if covered or (name in automatic and not exists):
                continue
            message = f"modules_to_save names '{name}', and the adapter has no tensors for it"
            raise SurgeryError("PSG508", message, None if exists else _hint(name, modules))

    def train(self, plan: Plan, group: str, names: Sequence[str]) -> None:
        """An operation that trains parameters of the model, with the adapter's values for them."""
        read = {s.parameter for s in self.sites if s.kind == "parameter"}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        aliases = tensor_names(self.model)
        paths: dict[str, None] = {}
        for name in names:
            # a tied parameter goes by the name that the graph reads it by
            path = next((a for a in (name, *aliases.get(name, ())) if a in read), None)
            if path is None or name not in parameters:
                raise self.homeless(name)
            value = self.shaped(self.names.own[name], tuple(parameters[name].shape), name)
            plan.known[path] = value.to(parameters[name].dtype)
            paths[path] = None
        rule = Rule(match="parameter", where=Where(paths=tuple(paths)), train=True)
        about = "Parameters of the model that came with a peft adapter."
        file = RuleFile(name=group, about=about, rules=(rule,))
        plan.operations.append(Operation(file, {}, self.name))

    def check_base(self, name: str, key: str) -> None:
        """The copy that peft saves of a weight of the base must be this base's. PSG507.

        Of two dtypes the coarser counts: the adapter may be of a base read in another.
        """
        source = self.graph.source
        model = source.weights() if source.is_readable else source.module
        mine = dict(model.named_parameters(remove_duplicate=False)).get(name)
        if mine is None:
            raise self.homeless(name)
        value = self.shaped(key, tuple(mine.shape), name)
        if mine.is_meta:
            return
        coarse = max((value.dtype, mine.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(value.to(coarse), mine.detach().cpu().to(coarse)):
            message = f"'{key}' is the weight of the adapter's base, and '{name}' differs from it"
            hint = "the adapter was made for another base; if it was trained, name its module in "
            raise SurgeryError("PSG507", message, f"{hint}modules_to_save")

    def homeless(self, name: str) -> SurgeryError:
        """The refusal of a tensor that is no parameter the captured model reads."""
        key = self.names.own[name]
        known = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        if name in known:
            message = f"the tensor '{key}' is for a parameter that the adapter's config leaves out"
            return SurgeryError("PSG506", message, "see its bias and modules_to_save")
        return SurgeryError("PSG506", f"the tensor '{key}' has no place", _hint(name, known))


def _best(
    options: Sequence[_Option],
    sites: Sequence[Placed],
    settings: Mapping[str, Any],
    wanted: set[str],
) -> _Option:
    """Of rules that do the same, the one that would choose these very modules, or the first."""
    for option in options:
        given = resolve_settings(option.file, settings)
        chosen = select(sites, option.rule, given, option.file.roles).kept
        if {site.module for site in chosen} == wanted:
            return option
    return options[0]


def _hint(name: str, known: Any) -> str | None:
    """Hint with the nearest names, exact paths under another prefix first."""
    ending = [other for other in known if ends(other, name) or ends(name, other)]
    if ending:
        return f"did you mean '{max(ending, key=len)}'? the adapter was made for another class"
    hint = did_you_mean(name, known)
    return hint if hint.startswith("did you mean") else "the adapter was made for another base"
