"""Reads profiles.json: the profiles, the default one, and the rules that choose one for a request.

What acts in this version is `routingStrategy`, `defaultProfile` and `match`; AIBrix's other keys are checked and
reported in `ProfilesFile.warnings`, so that nobody believes in a limit that is not kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import msgspec
from pydantic import BaseModel

from pointsman.config import defects, positions
from pointsman.config.documents import Document, Findings
from pointsman.config.nearest import closest
from pointsman.config.policy_names import canonical_name, unknown_policy
from pointsman.config.profiles_schema import ACTIVE, Buckets, MatchSection, ProfileSection, ProfilesSection
from pointsman.config.snapshot import Match, Profile

INERT = "read, has no effect in this version"
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


def read_profiles(document: Document, policies: Collection[str]) -> ProfilesFile:
    """Raises ConfigErrors. `policies` are the canonical names that `routingStrategy` may take."""
    findings = Findings(document)
    section = defects.check(ProfilesSection, document.value, findings.report)
    # A bad key at the top must not hide what is wrong below it.
    top = document.value if isinstance(document.value, dict) else {}
    sections = _check_profiles(top.get("profiles"), findings)
    matches = _check_matches(top.get("match"), findings)
    profiles = {name: _compile_profile(name, found, policies, findings) for name, found in sections.items()}
    compiled = tuple(_compile_match(index, found, profiles, findings) for index, found in matches.items())
    default = _default_profile(top.get("defaultProfile"), profiles, findings)
    findings.raise_if_any()
    warnings = _warnings(section, sections, list(matches.values()))
    return ProfilesFile(profiles, default, compiled, tuple(warnings), document.digest)


def _check_profiles(value: object, findings: Findings) -> dict[str, ProfileSection]:
    """Every profile that was written; an empty one in place of a defective one, so that its name stays known."""
    found: dict[str, ProfileSection] = {}
    for name, item in value.items() if isinstance(value, dict) else ():
        found[name] = defects.check(ProfileSection, item, findings.report, ("profiles", name)) or ProfileSection()
    return found


def _check_matches(value: object, findings: Findings) -> dict[int, MatchSection]:
    found: dict[int, MatchSection] = {}
    for index, item in enumerate(value if isinstance(value, list) else ()):
        section = defects.check(MatchSection, item, findings.report, ("match", index))
        if section is not None:
            found[index] = section
    return found


def _compile_profile(name: str, section: ProfileSection, policies: Collection[str], findings: Findings) -> Profile:
    path = ("profiles", name)
    if not _PROFILE_NAME.fullmatch(name):
        findings.report(path, "a profile's name is 1 to 128 printable ASCII characters without spaces")
    written = section.routing_strategy
    strategy = canonical_name(written) if written else None
    if strategy is not None and strategy not in policies:
        findings.report((*path, "routingStrategy"), *unknown_policy(written or "", policies))
    _check_bucket(path, section, findings)
    _check_bucket((*path, "routingConfig"), section.routing_config, findings)
    return Profile(name, strategy)


def _check_bucket(path: positions.Path, buckets: Buckets | None, findings: Findings) -> None:
    low = buckets.prompt_len_bucket_min_length if buckets else None
    high = buckets.prompt_len_bucket_max_length if buckets else None
    if low is not None and high is not None and low > high:
        findings.report((*path, "promptLenBucketMaxLength"), f"is below promptLenBucketMinLength ({low})")


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


def _warnings(
    top: ProfilesSection | None, profiles: Mapping[str, ProfileSection], matches: Sequence[MatchSection]
) -> list[str]:
    found = [f"lockedRoutingStrategy: {INERT}"] if top and top.locked_routing_strategy else []
    for name, profile in profiles.items():
        path: positions.Path = ("profiles", name)
        found += _inert(path, profile, ACTIVE)
        if profile.routing_config:
            found += _inert((*path, "routingConfig"), profile.routing_config, frozenset())
    for index, match in enumerate(matches[:-1]):
        if not (match.model or match.path or match.key or match.header):
            found.append(f"match[{index}]: has no condition, so the entries after it are never reached")
            break
    return found


def _inert(path: positions.Path, section: BaseModel, active: Collection[str]) -> list[str]:
    fields = type(section).model_fields
    return [
        f"{positions.dotted((*path, field.alias or name))}: {INERT}"
        for name, field in fields.items()
        if name in section.model_fields_set and name not in active
    ]
