from __future__ import annotations

from pathlib import Path

import pytest

from pointsman.config.cores import default_shards, usable_cores


def count(tmp_path: Path, groups: str, files: dict[str, str], affinity: int = 16) -> int:
    mount = tmp_path / "cgroup"
    for name, content in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    listing = tmp_path / "self"
    listing.write_text(groups)
    return usable_cores(affinity=affinity, cgroup_file=listing, mount=mount)


V1 = "5:cpuset:/\n4:cpu,cpuacct:/docker/x\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("0::/a/b\n", {}, 16, id="no limit anywhere"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, 16, id="v2 without quota"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "300000 100000"}, 3, id="v2 own quota"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2, id="v2 parent's"),
        pytest.param("0::/a/b\n", {"cpu.max": "250000 100000"}, 2, id="v2 the root of a container, rounded down"),
        pytest.param("0::/a\n", {"a/cpu.max": "50000 100000"}, 1, id="v2 half a core is one"),
        pytest.param("0::/a\n", {"a/cpu.max": "9900000 100000"}, 16, id="v2 quota above affinity"),
        pytest.param("0::/../x\n", {"cpu.max": "300000 100000"}, 3, id="v2 outside of the namespace"),
        pytest.param("0::/a\n", {"a/cpu.max": "nonsense"}, 16, id="v2 unreadable"),
        pytest.param(
            V1,
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "400000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
            4,
            id="v1 own quota",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"},
            3,
            id="v1 in a container, by the short name",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
            16,
            id="v1 without quota",
        ),
        pytest.param("0::/a\n", {"unified/a/cpu.max": "300000 100000"}, 3, id="hybrid"),
        pytest.param("", {}, 16, id="no cgroups"),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert count(tmp_path, groups, files) == expected


def test_affinity_counts(tmp_path: Path) -> None:
    assert count(tmp_path, "0::/a\n", {"a/cpu.max": "800000 100000"}, affinity=2) == 2


def test_no_cgroup_file(tmp_path: Path) -> None:
    assert usable_cores(affinity=3, cgroup_file=tmp_path / "gone", mount=tmp_path) == 3


def test_the_default_is_at_most_four() -> None:
    assert default_shards() == min(4, usable_cores())
