"""Reading of AdapterHub adapters: from config and tensors to an operation.

The config decides where the adapter is; the file must then hold just the tensors that the rule
file's table lists for each of those sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peftsurgery.anatomy import Placed
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.adapterhub.config import ConfigReading, HubConfig
from peftsurgery.formats.adapterhub.library import FORMAT, named
from peftsurgery.formats.adapterhub.sites import HubSites, odd_one
from peftsurgery.formats.adapterhub.tensors import JoinedTensor, joined_tensors
from peftsurgery.language import Expect, Rule, RuleFile, Where, resolve_settings, select
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts


@dataclass(frozen=True)
class Plan:
    """The operations that an adapter is, their cuts, and the values of parameters by name."""

    operations: list[Operation] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: Plan) -> None:
        """Take over what another plan holds, after what is there. PSG514 if two heads differ."""
        for name in other.known.keys() & self.known.keys():
            if not torch.equal(self.known[name], other.known[name]):
                raise SurgeryError("PSG514", f"two adapters come with a '{name}' of their own")
        self.operations.extend(other.operations)
        self.cuts.extend(other.cuts)
        self.known.update(other.known)


@dataclass(frozen=True)
class _Option:
    """A rule file at the sites that a config means, and how many rules had to be told where."""

    operation: Operation
    moved: int

    @property
    def order(self) -> tuple[int, int]:
        """Best first: rules that find their sites themselves, files that carry more settings."""
        return self.moved, -len(self.operation.file.carried(FORMAT))


class Importer:
    """Makes plans for adapters on one model."""

    def __init__(self, model: GraphModel, with_head: bool = True) -> None:
        """PSG513 for a model of a type that the library has no names for."""
        self.model, self.with_head = model, with_head
        self.sites = HubSites(model)
        self.model_config = self.sites.config

    def plan(
        self,
        config: HubConfig,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        earlier: Sequence[Cut] = (),
    ) -> Plan:
        """An adapter under a name; ``earlier`` are the cuts of adapters that it may be over.

        Raises PSG504 for what no rule file is, PSG506 for another model, PSG507 for other tensors.
        """
        if config.model_type != self.sites.model_type:
            message = f"the adapter is for a '{config.model_type}'"
            raise SurgeryError("PSG506", f"{message}, not for a '{self.sites.model_type}'")
        options = [self.option(reading, name) for reading in config.readings()]
        operation = min(options, key=lambda option: option.order).operation
        cuts = select_cuts(self.model.base_capture, operation, earlier)[0]
        wanted = joined_tensors(cuts, self.sites, config.name)
        return Plan([operation], cuts, values_of(wanted, tensors))

    def option(self, reading: ConfigReading, name: str) -> _Option:
        """A rule file at the sites that a reading of the config means. PSG504 if there are none.

        Rules without parameters go along with the others.
        """
        moved, rules = 0, []
        for rule in reading.file.rules:
            if not rule.params:
                rules.append(rule)
                continue
            sites = self.meant(rule, reading)
            told = self.told(rule, reading, sites)
            if told is not None:
                reading = told
                rules.append(rule)
            elif sites:
                where = {"where": _exactly(sites), "expect": Expect()}
                rules.append(rule.model_copy(update=where))
                moved += 1
        if not any(rule.params for rule in rules):
            raise SurgeryError("PSG504", "the adapter's config means no place in the model")
        file = reading.file.model_copy(update={"rules": tuple(rules)})
        return _Option(Operation(file, resolve_settings(file, reading.settings), name), moved)

    def meant(self, rule: Rule, reading: ConfigReading) -> list[Placed]:
        """The sites that the config means for a rule; none for one that the library has not."""
        kind = rule.kind.name
        if not named(rule) or kind not in reading.where:
            return []
        keys = reading.where[kind]
        return self.sites.meant(kind, keys) if keys else self.chosen(rule, reading)

    def chosen(self, rule: Rule, reading: ConfigReading) -> list[Placed]:
        """The sites that a rule would choose."""
        settings = resolve_settings(reading.file, reading.settings)
        kept = select(self.sites.every, rule, settings, reading.file.roles).kept
        return [site for site in kept if isinstance(site, Placed)]

    def told(
        self, rule: Rule, reading: ConfigReading, sites: Sequence[Placed]
    ) -> ConfigReading | None:
        """The settings with which a rule chooses these sites by itself; None if it cannot.

        A setting may say for which roles it is.
        """
        if agree(self.chosen(rule, reading), sites):
            return reading
        setting = _role_setting(rule, reading.file)
        if setting is None:
            return None
        roles = list(dict.fromkeys(str(site.role) for site in sites))
        told = replace(reading, settings={**reading.settings, setting: roles})
        return told if agree(self.chosen(rule, told), sites) else None


def values_of(
    wanted: Mapping[str, JoinedTensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values of parameters. PSG506 for a tensor without place, PSG507 if one is not there."""
    known: dict[str, torch.Tensor] = {}
    for key, joined in wanted.items():
        if key not in tensors:
            message = f"the adapter's config asks for the tensor '{key}', which is not there"
            raise SurgeryError("PSG507", message, "the file is incomplete")
        known |= joined.split(key, tensors[key])
    for key in tensors:
        if key not in wanted:
            message = f"the tensor '{key}' has no place: the adapter's config does not mean it"
            raise SurgeryError("PSG506", message, did_you_mean(key, wanted))
    return known


def agree(some: Sequence[Placed], others: Sequence[Placed]) -> bool:
    """Whether two lists hold the same sites."""
    return odd_one(some, others) is None


def _role_setting(rule: Rule, file: RuleFile) -> str | None:
    """The setting that alone says which roles a rule is for."""
    given = rule.where.given()
    text = given["role"][0] if list(given) == ["role"] and len(given["role"]) == 1 else ""
    return text[1:] if text[:1] == "$" and text[1:] in file.with_ else None


def _exactly(sites: Sequence[Placed]) -> Where:
    """The clauses that choose these sites: their modules, and for parts of a weight their roles."""
    choices: list[dict[str, Any]] = []
    whole = [site.module for site in sites if site.slice is None]
    parts = [site for site in sites if site.slice is not None]
    if whole:
        choices.append({"paths": list(dict.fromkeys(whole))})
    if parts:
        paths = list(dict.fromkeys(site.module for site in parts))
        choices.append({"paths": paths, "role": sorted({str(site.role) for site in parts})})
    return Where.model_validate(choices[0] if len(choices) == 1 else {"any": choices})
