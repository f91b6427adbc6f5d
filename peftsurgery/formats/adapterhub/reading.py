"""Reading of AdapterHub adapters: from config and tensors to an operation.

The config decides where the adapter is; the file must then hold just the tensors that the rule
file's table lists for each of those sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from peftsurgery.anatomy import Placed
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.config import ConfigReading, HubConfig
from peftsurgery.formats.adapterhub.layout import LINEARS
from peftsurgery.formats.adapterhub.library import FORMAT, named
from peftsurgery.formats.adapterhub.sites import HubSites, odd_one
from peftsurgery.formats.exchange import AdapterPlan, exactly, meant_operation
from peftsurgery.formats.joined_tensors import JoinedTensor, joined_tensors, values_of
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect, Rule
from peftsurgery.language.selection import select
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.plan.cut import Cut


@dataclass(frozen=True)
class Placement:
    """A config as one rule file's, which is at the sites that the config means.

    ``moved`` is how many of its rules had to be told where.
    """

    reading: ConfigReading
    moved: int

    @property
    def order(self) -> tuple[int, int]:
        """Best first: rules that find their sites themselves, files that carry more settings."""
        return self.moved, -len(self.reading.file.carried(FORMAT))


def hub_plan(
    model: GraphModel,
    sites: HubSites,
    config: HubConfig,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    earlier: Sequence[Cut] = (),
) -> AdapterPlan:
    """An adapter under a name; ``earlier`` are the cuts of adapters that it may be over.

    Raises PSG504 for what no rule file is, PSG506 for another model, PSG507 for other tensors,
    PSG513 where neither the table nor the tensors' names tell what a part of a layer is called.
    """
    if config.model_type != sites.model_type:
        message = f"the adapter is for a '{config.model_type}'"
        raise SurgeryError("PSG506", f"{message}, not for a '{sites.model_type}'")
    sites = sites.told(tensors, config.asked(LINEARS))
    placements = [_placement(reading, sites) for reading in config.readings()]
    best = min(placements, key=lambda placement: placement.order).reading
    operation, cuts = meant_operation(model, best.file, best.settings, name, FORMAT, earlier)
    wanted = hub_tensors(cuts, sites, config.name)
    return AdapterPlan([operation], cuts, values_of(wanted, tensors))


def hub_tensors(cuts: Iterable[Cut], sites: HubSites, name: str) -> dict[str, JoinedTensor]:
    """The tensors that an adapter of this name is, by their keys without the base model's name."""
    return joined_tensors(cuts, named, lambda cut, suffix: sites.key(cut.placed, suffix, name))


def _placement(reading: ConfigReading, sites: HubSites) -> Placement:
    """A rule file at the sites that a reading of the config means. PSG504 if there are none.

    Rules without parameters go along with the others.
    """
    moved, rules = 0, []
    for rule in reading.file.rules:
        if not rule.params:
            rules.append(rule)
            continue
        meant = _meant(rule, reading, sites)
        told = _told(rule, reading, sites, meant)
        if told is not None:
            reading = told
            rules.append(rule)
        elif meant:
            rules.append(rule.model_copy(update={"where": exactly(meant), "expect": Expect()}))
            moved += 1
    if not any(rule.params for rule in rules):
        raise SurgeryError("PSG504", "the adapter's config means no place in the model")
    file = reading.file.model_copy(update={"rules": tuple(rules)})
    return Placement(replace(reading, file=file), moved)


def _meant(rule: Rule, reading: ConfigReading, sites: HubSites) -> list[Placed]:
    """The sites that the config means for a rule; none for one that the library has not."""
    kind = rule.kind.name
    if not named(rule) or kind not in reading.where:
        return []
    keys = reading.where[kind]
    return sites.meant(kind, keys) if keys else _chosen(rule, reading, sites)


def _chosen(rule: Rule, reading: ConfigReading, sites: HubSites) -> list[Placed]:
    """The sites that a rule would choose."""
    settings = resolve_settings(reading.file, reading.settings)
    return list(select(sites.every, rule, settings, reading.file.roles))


def _told(
    rule: Rule, reading: ConfigReading, sites: HubSites, meant: Sequence[Placed]
) -> ConfigReading | None:
    """The settings with which a rule chooses these sites by itself; None if it cannot.

    A setting may say for which roles it is.
    """
    if odd_one(_chosen(rule, reading, sites), meant) is None:
        return reading
    setting = _role_setting(rule, reading.file)
    if setting is None:
        return None
    roles = list(dict.fromkeys(str(site.role) for site in meant))
    told = replace(reading, settings={**reading.settings, setting: roles})
    return told if odd_one(_chosen(rule, told, sites), meant) is None else None


def _role_setting(rule: Rule, file: RuleFile) -> str | None:
    """The setting that alone says which roles a rule is for."""
    given = rule.where.given()
    text = given["role"][0] if list(given) == ["role"] and len(given["role"]) == 1 else ""
    return text[1:] if text[:1] == "$" and text[1:] in file.with_ else None
