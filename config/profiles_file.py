"""Reads profiles.json: the profiles, the default one, the rules that choose one for a request, and what they share.

Strategies and parameters are judged by routing, which hands its check in. Keys that AIBrix knows and that do nothing
in this version are checked and reported in `ProfilesFile.warnings`, so that nobody believes in a limit that is not
kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from pydantic import BaseModel

from pointsman.config import defects, positions, profile_parameters
from pointsman.config.documents import Document, Findings
from pointsman.config.fields import check_fields
from pointsman.config.nearest import closest
from pointsman.config.pd import PdSection
from pointsman.config.policy_names import Flaw, RoutingCheck, one_line
from pointsman.config.profile_parameters import Parameters, Respelled
from pointsman.config.profiles_schema import (
    ACTIVE,
    ACTIVE_NESTED,
    DECODE_POLICIES,
    HINTS,
    PREFILL_POLICIES,
    MatchSection,
    Nested,
    ProfileSection,
    ProfilesSection,
    RoutingConfig,
    SharedSection,
)
from pointsman.config.resilience import (
    AdmissionSection,
    BreakerSection,
    HealthSection,
    LimitsSection,
    RetrySection,
    TimeoutsSection,
)
from pointsman.config.snapshot import MAX_TOKENS, Hints, Match, Profile, Shared

INERT = "read, has no effect in this version"
PROFILE_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "retry": RetrySection,
    "timeouts": TimeoutsSection,
    "limits": LimitsSection,
    "pd": PdSection,
}
SHARED_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "breaker": BreakerSection,
    "admission": AdmissionSection,
    "health": HealthSection,
}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PROFILE_NAME = re.compile(r"[!-~]{1,128}")


class ProfilesFile(msgspec.Struct, frozen=True):
    profiles: dict[str, Profile]
    default_profile: str | None
    """None: the file names none and has no profile called "default"."""
    matches: tuple[Match, ...]
    warnings: tuple[str, ...]
    digest: str
    """SHA-256 of the file, in hex"""
    locked_strategy: str = ""
    shared: Shared = Shared()


def read_profiles(document: Document, check: RoutingCheck) -> ProfilesFile:
    """Raises ConfigErrors."""
    return _Reader(document, check).read()


class _Written(msgspec.Struct, frozen=True):
    """A profile as it stands in the file."""

    section: ProfileSection
    parameters: Parameters

    def get(self, name: str) -> int:
        """Of a key of `Nested`; 0 = not given."""
        return next((value for place in self._places() if (value := getattr(place, name)) is not None), 0)

    def path_of(self, name: str) -> positions.Path:
        """Below the profile, of a key of `Nested`."""
        alias = Nested.model_fields[name].alias or name
        nested = self.section.routing_config
        return ("routingConfig", alias) if nested and getattr(nested, name) is not None else (alias,)

    def _places(self) -> tuple[Nested, ...]:
        """The stronger one first."""
        nested = self.section.routing_config
        return (nested, self.section) if nested else (self.section,)


class _Reader:
    def __init__(self, document: Document, check: RoutingCheck) -> None:
        self._document = document
        self._check = check
        self._findings = Findings(document)
        self._warnings: list[str] = []

    def read(self) -> ProfilesFile:
        findings = self._findings
        defects.check(ProfilesSection, self._document.value, findings.report)
        # A bad key at the top must not hide what is wrong below it.
        top = self._document.value if isinstance(self._document.value, dict) else {}
        locked = self._locked(top.get("lockedRoutingStrategy"))
        shared = self._shared(top.get("shared"))
        written = self._written(top.get("profiles"))
        profiles = {name: self._profile(name, found) for name, found in written.items()}
        sections = _check_matches(top.get("match"), findings)
        matches = tuple(_compile_match(index, found, profiles, findings) for index, found in sections.items())
        default = _default_profile(top.get("defaultProfile"), profiles, findings)
        findings.raise_if_any()
        self._warn_of_hidden(matches, profiles)
        return ProfilesFile(
            profiles,
            default,
            matches,
            tuple(self._warnings),
            self._document.digest,
            locked,
            shared,
        )

    # --- the top

    def _locked(self, value: object) -> str:
        """A lock is a promise to the operator: one that cannot be kept is refused, unlike a profile's strategy."""
        text = one_line(value) if isinstance(value, str) else ""
        flaw = self._check.strategy(text) if text else None
        if text == "pd":
            flaw = Flaw(
                "'pd' cannot be locked", "make it the routingStrategy of profiles, or pointsman serve --policy pd"
            )
        if flaw is not None:
            self._findings.report(("lockedRoutingStrategy",), flaw.problem, flaw.hint)
        return text

    def _shared(self, value: object) -> Shared:
        if value is None:
            return Shared()
        written = Respelled(value, ("shared",), self._findings)
        section = defects.check(SharedSection, written.value, written.report) or SharedSection()
        return Shared(
            section.eviction_interval_secs,
            section.max_tree_size,
            **{
                name: self._section(shape, getattr(section, name), written.place((name,)))
                for name, shape in SHARED_SECTIONS.items()
            },
        )

    def _section(self, shape: type[msgspec.Struct], value: object, path: positions.Path) -> dict[str, Any]:
        """What a section of resilience says, checked, in snake case."""
        if value is None:
            return {}
        written = Respelled(value, path, self._findings)
        given, flaws = check_fields(shape, written.value)
        for flaw in flaws:
            written.report(flaw.path, flaw.problem, flaw.hint)
        return msgspec.to_builtins(given) if not flaws else {}

    # --- profiles

    def _written(self, value: object) -> dict[str, _Written]:
        """Every profile of the file; an empty one in place of a defective one, so that its name stays known."""
        found: dict[str, _Written] = {}
        for name, item in value.items() if isinstance(value, dict) else ():
            path = ("profiles", name)
            rest, parameters = profile_parameters.split(item, path, self._findings)
            section = defects.check(ProfileSection, rest, self._findings.report, path)
            found[name] = _Written(section or ProfileSection(), parameters)
        return found

    def _profile(self, name: str, written: _Written) -> Profile:
        path = ("profiles", name)
        if not _PROFILE_NAME.fullmatch(name):
            self._findings.report(path, "a profile's name is 1 to 128 printable ASCII characters without spaces")
        strategy = self._strategy(path, written)
        before = len(self._findings.errors)
        routing = profile_parameters.compile_parameters(written.parameters, self._check)
        if len(self._findings.errors) == before:
            flaw = self._check.whole(routing)
            if flaw is not None:
                self._findings.report(path, flaw.problem, flaw.hint)
        shortest, longest = self._bucket(path, written)
        self._warn_of_inert(path, written)
        section = written.section
        found = {
            key: self._section(shape, getattr(section, key), (*path, key)) for key, shape in PROFILE_SECTIONS.items()
        }
        found["pd"] = self._score_policies(path, section) | found["pd"]
        self._check_policies((*path, "pd"), found["pd"])
        if section.requests_per_second is not None:
            found["limits"].setdefault("requests_per_second", section.requests_per_second)
        failure = section.stream_failure or "error"
        hints = self._hints(path, written)
        return Profile(name, strategy, routing, hints, shortest, longest, **found, stream_failure=failure)

    def _strategy(self, path: positions.Path, written: _Written) -> str | None:
        text = one_line(written.section.routing_strategy or "")
        if not text:
            return None
        place = (*path, "routingStrategy")
        flaw = self._check.strategy(text)
        if flaw is None:
            if written.parameters.get("chain"):
                self._warnings.append(f"{positions.dotted(place)}: without effect: the profile's chain goes before it")
            return text
        self._findings.report(place, flaw.problem, flaw.hint)
        return None

    def _score_policies(self, path: positions.Path, section: ProfileSection) -> dict[str, Any]:
        """AIBrix's names for how the two sides are picked."""
        found: dict[str, Any] = {}
        nested = section.routing_config or RoutingConfig()
        for name, key, given, known in (
            ("prefill_policy", "prefillScorePolicy", nested.prefill_score_policy, PREFILL_POLICIES),
            ("decode_policy", "decodeScorePolicy", nested.decode_score_policy, DECODE_POLICIES),
        ):
            if given in known:
                found[name] = known[given]
            elif given:
                hint = closest(given, known) or f"known: {', '.join(sorted(known))}"
                self._findings.report((*path, "routingConfig", key), f"unknown policy {given[:60]!r}", hint)
        return found

    def _check_policies(self, path: positions.Path, pd: dict[str, Any]) -> None:
        for name in ("prefill_policy", "decode_policy"):
            flaw = self._check.strategy(pd[name]) if name in pd else None
            if flaw is not None:
                self._findings.report((*path, name), flaw.problem, flaw.hint)

    def _bucket(self, path: positions.Path, written: _Written) -> tuple[int, int]:
        low = written.get("prompt_len_bucket_min_length")
        high = written.get("prompt_len_bucket_max_length") or MAX_TOKENS
        if low > high:
            place = (*path, *written.path_of("prompt_len_bucket_max_length"))
            self._findings.report(place, f"is below promptLenBucketMinLength ({low})")
        return low, high

    def _hints(self, path: positions.Path, written: _Written) -> Hints:
        hints = Hints(*(written.get(name) for name in HINTS))
        for low, high, name in (
            (hints.prompt_tokens_gte, hints.prompt_tokens_lt, "prompt_tokens_lt"),
            (hints.max_tokens_gte, hints.max_tokens_lt, "max_tokens_lt"),
        ):
            if 0 < high <= low:
                place = positions.dotted((*path, *written.path_of(name)))
                self._warnings.append(f"{place}: not above the lower bound ({low}): config-profile: auto never fits")
        return hints

    # --- what does nothing

    def _warn_of_inert(self, path: positions.Path, written: _Written) -> None:
        nested = written.section.routing_config
        keys: list[positions.Path] = [(key,) for key in _inert(written.section, ACTIVE)]
        keys += [("routingConfig", key) for key in _inert(nested, ACTIVE_NESTED)] if nested else []
        self._warnings += [f"{positions.dotted((*path, *key))}: {INERT}" for key in keys]
        self._warnings += profile_parameters.warnings(written.parameters)

    def _warn_of_hidden(self, matches: tuple[Match, ...], profiles: Mapping[str, Profile]) -> None:
        for index, match in enumerate(matches[:-1]):
            profile = profiles[match.profile]
            takes_all = profile.prompt_tokens_min == 0 and profile.prompt_tokens_max == MAX_TOKENS
            if takes_all and not (match.model or match.path or match.key or match.headers):
                text = f"match[{index}]: has no condition, so the entries after it are never reached"
                self._warnings.append(text)
                return


def _check_matches(value: object, findings: Findings) -> dict[int, MatchSection]:
    found: dict[int, MatchSection] = {}
    for index, item in enumerate(value if isinstance(value, list) else ()):
        section = defects.check(MatchSection, item, findings.report, ("match", index))
        if section is not None:
            found[index] = section
    return found


def _compile_match(index: int, section: MatchSection, profiles: Collection[str], findings: Findings) -> Match:
    if section.profile not in profiles:
        hint = closest(section.profile, profiles)
        findings.report(("match", index, "profile"), f"no profile is called {section.profile[:60]!r}", hint)
    headers = {name.lower(): pattern for name, pattern in section.header.items()}
    if len(headers) < len(section.header):
        findings.report(("match", index, "header"), "names one header twice (case does not count)")
    for name in section.header:
        if not _HEADER_NAME.fullmatch(name):
            findings.report(("match", index, "header", name), "is not a header name")
    return Match(section.profile, section.model, section.path, section.key, headers)


def _default_profile(name: object, profiles: Collection[str], findings: Findings) -> str | None:
    if not name or not isinstance(name, str):
        return "default" if "default" in profiles else None
    if name not in profiles:
        findings.report(("defaultProfile",), f"no profile is called {name[:60]!r}", closest(name, profiles))
    return name


def _inert(section: BaseModel, active: frozenset[str]) -> list[str]:
    """Keys that are given, ask for something, and get nothing."""
    fields = type(section).model_fields
    return [
        field.alias or name for name, field in fields.items() if name not in active and getattr(section, name, None)
    ]
