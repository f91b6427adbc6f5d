"""peft's adapter_config.json: which keys say what, and which would change what the adapter does.

The keys that identify a method and those that carry its settings are in the rule files, under
``checkpoint: peft``; peft's own are in ``library.yaml``. A key that is none of these and has a
value is refused by name, so a switch that peft adds tomorrow is not ignored today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from peftsurgery.errors import SurgeryError, did_you_mean, nearest
from peftsurgery.formats.peft.library import (
    FORMAT,
    flat_form,
    flat_page,
    forms_of,
    listings,
    peft_words,
)
from peftsurgery.formats.words import ShippedForm, brief, fits_setting, shipped_forms
from peftsurgery.language.paths import full_match
from peftsurgery.language.said import SaidFile

if TYPE_CHECKING:
    from peftsurgery.language.rule_file import RuleFile

PARAMETERS = "target_parameters"
STACKS = "experts"  # the kind of sites at parameters that the config may list


class AdapterConfig:
    """The checked values of an adapter_config.json."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises PSG502 for an unknown method, PSG503 for a bad value, PSG504 for a refused key."""
        self.values = values
        self._forms = self._methods()
        self.pages = tuple(flat_page(form.page) for form in self._forms)
        self._check_keys()
        self._check_parameters()

    @cached_property
    def files(self) -> tuple[RuleFile, ...]:
        """The shipped rule files that this config identifies; ``pages`` are their pages."""
        return tuple(flat_form(form.file) for form in self._forms)

    def _methods(self) -> list[ShippedForm]:
        """The forms of the shipped rule files that this config identifies."""
        kind = self.values.get("peft_type")
        of_kind = forms_of(kind) if isinstance(kind, str) else []
        if not of_kind:
            known = {str(form.identifying["peft_type"]) for form in shipped_forms(FORMAT)}
            others = "LoRAs of other programs: `peftsurgery import`"
            listed = f"known here: {', '.join(sorted(known))}; {others}"
            hint = did_you_mean(str(kind), known) if kind else listed
            raise SurgeryError("PSG502", f"the adapter's peft_type is {brief(kind)}", hint)
        for key, wanted in (item for form in of_kind for item in form.identifying.items()):
            if isinstance(wanted, bool) and not isinstance(self.value(key), bool):
                _refuse_value(key, self.value(key))
        forms = [form for form in of_kind if not self._strangers(form)]
        if not forms:
            odd = min((self._strangers(form) for form in of_kind), key=len)
            listed = ", ".join(f"{key} = {self.value(key)!r}" for key in odd)
            raise SurgeryError("PSG504", f"no shipped rule is {kind} with {listed}")
        return forms

    def _strangers(self, form: ShippedForm) -> list[str]:
        """The keys in which this config is not of a rule file's method."""
        return [key for key, value in form.identifying.items() if self.value(key) != value]

    def value(self, key: str) -> Any:
        """The value of a key, or what peft takes it to be where it is missing."""
        value = self.values.get(key)
        return peft_words().absent.get(key) if value is None else value

    def _check_keys(self) -> None:
        carried = {k for page in self.pages for k in page.checkpoint.get(FORMAT, {})}
        words = peft_words()
        read, choices = {*words.read, *words.without_effect, *words.beside}, words.choices
        known = {*read, *choices, *carried, *listings(self.pages)}
        for key, value in self.values.items():
            if key in choices and not any(value is c or value == c for c in choices[key]):
                allowed = ", ".join(repr(choice) for choice in choices[key] if choice is not None)
                message = f"the adapter's {key} is {value!r}, which is not honoured"
                raise SurgeryError("PSG504", message, f"honoured: {allowed}")
            if key not in known and value not in (None, False, "", [], {}):
                message = f"the adapter's config has {key} = {brief(value)}, which is not honoured"
                raise SurgeryError("PSG504", message, nearest(key, known))
        for key in peft_words().patterns.values():
            if not isinstance(self.pattern(key), dict):
                raise SurgeryError("PSG503", f"the adapter's {key} is no object")

    def _check_parameters(self) -> None:
        """Refuse parameters where peft does not put adapters, or not as it says. PSG503, PSG504."""
        names = self.names(PARAMETERS)
        if isinstance(self.values.get(PARAMETERS), str):
            raise SurgeryError("PSG503", f"the adapter's {PARAMETERS} is no list of names")
        if not names:
            return
        if not any(rule.kind.name == STACKS for page in self.pages for rule in page.rules):
            message = f"the adapter's config has {PARAMETERS} = {brief(names)}"
            raise SurgeryError("PSG504", f"{message}, which its method has no rule for")
        for key in peft_words().without_parameters:
            if self.value(key) not in (None, False, 0, "none"):
                message = f"the adapter has {key} = {brief(self.value(key))} and {PARAMETERS}"
                raise SurgeryError("PSG504", message, "peft has no such adapters of parameters")

    def stack_file(self) -> RuleFile:
        """The rule file of this method at stacks of matrices; there is one with PARAMETERS."""
        return next(f for f in self.files for rule in f.rules if rule.kind.name == STACKS)

    def pattern(self, key: str) -> Mapping[str, Any]:
        """The values by module pattern under a key; none if it is not there."""
        found: Mapping[str, Any] = self.values.get(key) or {}
        return found

    def names(self, key: str) -> list[str]:
        """A list of names under a key. PSG503 if it is anything else."""
        value = self.values.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SurgeryError("PSG503", f"the adapter's {key} is no list of names")
        return value

    def settings(self, file: SaidFile, module: str) -> dict[str, Any]:
        """The settings that a rule file has at a module. PSG503 for a value that is none."""
        settings = {}
        for key, setting in file.carried(FORMAT).items():
            source, value = key, self.value(key)
            for pattern, special in self.pattern(peft_words().patterns.get(key, "")).items():
                if pattern_test(pattern)(module):
                    source, value = f"{peft_words().patterns[key]}['{pattern}']", special
                    break
            _check_value(key, source, value, file.with_[setting])
            settings[setting] = value
        return settings

    def check_patterns(self, modules: Iterable[str]) -> None:
        """Refuse a pattern that matches no adapted module: peft would ignore it. PSG508."""
        modules = list(modules)
        carried = {key for page in self.pages for key in page.carried(FORMAT)}
        for key in (pattern for key, pattern in peft_words().patterns.items() if key in carried):
            for pattern in self.pattern(key):
                if not any(map(pattern_test(pattern), modules)):
                    message = f"{key} names '{pattern}', and no adapted module is called that"
                    raise SurgeryError("PSG508", message, did_you_mean(pattern, leaves(modules)))


@lru_cache(maxsize=4096)
def pattern_test(pattern: str) -> Callable[[str], bool]:
    """Whether a key of rank_pattern or alpha_pattern is about a module: the end of its path."""
    return full_match(rf"(.*\.)?({pattern})")


def leaves(modules: Iterable[str]) -> set[str]:
    """The last names of module paths."""
    return {module.rpartition(".")[2] for module in modules}


def _check_value(key: str, source: str, value: Any, default: Any) -> None:
    """A value must be of the kind of its setting, and a number one that can be used."""
    fits = fits_setting(value, default, key in peft_words().counts)
    if not fits or (key.endswith("dropout") and not value < 1):
        _refuse_value(source, value)


def _refuse_value(source: str, value: Any) -> NoReturn:
    raise SurgeryError("PSG503", f"the adapter's {source} cannot be {brief(value)}")
