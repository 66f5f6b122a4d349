"""What apt says is understood: recorded on Debian 12 and 13."""

from __future__ import annotations

import pytest

from tasks.rules.apt import Limits, candidates, complaint, simulation, upstream

URL = "http://mirror.example/cuda/repos/debian13/x86_64"

SIMULATED = """\
Reading package lists...
Solving dependencies...
Inst make (4.4.1-2 Debian:13.7/stable [amd64])
Inst libcuda1 [550.163.01-2] (595.99.02-1 NVIDIA CUDA:198.18.2.1 [amd64]) [nvidia-smi:amd64 ]
Remv nvidia-smi [550.163.01-2]
Remv old-thing [1.0] [other:amd64 ]
Inst libfoo:i386 (1.0-1 Debian:13.7/stable [i386])
Conf make (4.4.1-2 Debian:13.7/stable [amd64])
""".splitlines()


def test_a_simulation_is_read() -> None:
    found = simulation(SIMULATED)
    assert [(each.name, each.old, each.new) for each in found.installed] == [
        ("make", None, "4.4.1-2"),
        ("libcuda1", "550.163.01-2", "595.99.02-1"),
        ("libfoo:i386", None, "1.0-1"),
    ]
    assert found.removed == ("nvidia-smi", "old-thing")


def test_candidates_are_read() -> None:
    told = """\
nvidia-driver-cuda:
  Installed: (none)
  Candidate: 595.99.02-1
  Version table:
     615.71.09-1 500
        500 http://mirror.example/  Packages
nvidia-persistenced:
  Installed: (none)
  Candidate: (none)
  Version table:
libc6:
  Installed: 2.41-12
  Candidate: 2.41-12
""".splitlines()
    assert candidates(told) == {"nvidia-driver-cuda": "595.99.02-1", "libc6": "2.41-12"}


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("13.2.86-1", "13.2.86"),
        ("1:2.0-3ubuntu1", "2.0"),
        ("580.178.04-0ubuntu0.24.04.1", "580.178.04"),
        ("5", "5"),
        ("1:5", "5"),
    ],
)
def test_the_upstream_version(version: str, shown: str) -> None:
    assert upstream(version) == shown


FAULTS = [
    (
        (
            f"W: GPG error: {URL}  InRelease: The following signatures couldn't be verified "
            f"because the public key is not available: NO_PUBKEY 2A1F78C5082BB15E\n"
            f"E: The repository '{URL}  InRelease' is not signed."
        ),
        "it is signed with another key (2A1F78C5082BB15E) than the one that is trusted",
    ),
    (
        (
            f"W: OpenPGP signature verification failed: {URL}  InRelease: Sub-process /usr/bin/sqv "
            "returned an error code (1), error message is: Missing key "
            "7564B0CB4CEDB13C040BE1972A1F78C5082BB15E, which is needed to verify signature."
        ),
        "it is signed with another key (7564B0CB4CEDB13C040BE1972A1F78C5082BB15E)",
    ),
    (
        (
            f"W: GPG error: {URL}  InRelease: The following signatures were invalid: EXPSIG "
            "C7EB4C7088508757 cudatools <cudatools@example>"
        ),
        "its signature has expired",
    ),
    (
        (
            f"W: OpenPGP signature verification failed: {URL}  InRelease: Sub-process /usr/bin/sqv "
            "returned an error code (1), error message is: Verifying signature:            "
            "Expired on 2024-01-03T00:00:00Z"
        ),
        "its signature has expired",
    ),
    (
        f"E: Failed to fetch {URL}/Packages.gz  Hash Sum mismatch\n   Hashes of expected file:",
        "Packages.gz is not what was signed (hash sum mismatch)",
    ),
    (
        f"E: Failed to fetch {URL}/Packages  404  NOT FOUND [IP: 198.18.2.1 21128]",
        "/Packages: 404  NOT FOUND",
    ),
    (
        f"E: The repository '{URL}  Release' does not have a Release file.",
        f"there is none at {URL}",
    ),
    (
        "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 77 (apt-get)",
        "another apt is at work here (it holds /var/lib/apt/lists/lock)",
    ),
    ("E: Unable to locate package linux-headers-6.18", "there is no package linux-headers-6.18"),
    (
        "E: Version '1.21.0-1' for 'nvidia-container-toolkit' was not found",
        "there is no nvidia-container-toolkit 1.21.0-1",
    ),
    (
        (
            "The following packages have unmet dependencies:\n"
            " nvidia-kernel-open-dkms : Depends: dkms but it is not installable\n"
            "E: Unable to correct problems, you have held broken packages."
        ),
        "nvidia-kernel-open-dkms needs dkms but it is not installable",
    ),
    (
        (
            "Error! Bad return status for module build on kernel: 6.18.44 (x86_64)\n"
            "Consult /var/lib/dkms/nvidia-current/535.309.01/build/make.log for more information.\n"
            "E: Sub-process /usr/bin/dpkg returned an error code (1)"
        ),
        "compiled, /var/lib/dkms/nvidia-current/535.309.01/build/make.log says why",
    ),
    (
        "E: You don't have enough free space in /var/cache/apt/archives/.",
        "/var/cache/apt/archives/ has too little space",
    ),
    (
        (
            "dpkg: error processing archive /var/cache/apt/archives/git_1_amd64.deb (--unpack):\n"
            " cannot copy extracted data for './usr/lib/git-core/git' to "
            "'/usr/lib/git-core/git.dpkg-new': failed to write (No space left on device)\n"
            "E: Sub-process /usr/bin/dpkg returned an error code (1)"
        ),
        "the disk is full where /usr/lib/git-core/git goes",
    ),
    (
        "E: Write error - write (28: No space left on device)\nE: IO Error saving source cache",
        "a disk of the host is full",
    ),
    (
        (
            "dpkg: error processing package broken (--configure):\n"
            " installed broken package post-installation script subprocess returned error exit "
            "status 1\nE: Sub-process /usr/bin/dpkg returned an error code (1)"
        ),
        "dpkg stopped at broken",
    ),
    ("Reading package lists...\nE: Something new", "Something new"),
    ("", "apt failed and said nothing"),
]


@pytest.mark.parametrize(("said", "meant"), FAULTS, ids=[meant[:30] for _, meant in FAULTS])
def test_a_fault_is_one_line_for_people(said: str, meant: str) -> None:
    line = complaint(said.splitlines())
    assert meant in line
    assert "\n" not in line


def test_what_pulls_a_driver_in_is_objected_to() -> None:
    planned = simulation(["Inst cuda-drivers (610.57.04-1 NVIDIA CUDA:stable [amd64])"])
    (objection,) = Limits().objections(planned)
    assert objection.startswith("apt would install cuda-drivers: ")


def test_inside_wsl_a_linux_driver_is_objected_to() -> None:
    planned = simulation(["Inst nvidia-driver-cuda (610.57.04-1 NVIDIA CUDA:stable [amd64])"])
    assert list(Limits().objections(planned)) == []
    assert "nvidia-driver-cuda" in next(Limits(wsl=True).objections(planned))


def test_a_package_that_is_there_already_may_be_upgraded() -> None:
    planned = simulation(["Inst cuda-drivers [595-1] (610-1 NVIDIA CUDA:stable [amd64])"])
    assert list(Limits().objections(planned)) == []


@pytest.mark.parametrize(
    ("name", "may", "asked"),
    [
        ("xserver-xorg", False, True),
        ("nvidia-container-toolkit", False, True),
        ("libnvidia-container1", False, True),
        ("nvidia-driver-550", False, False),
        ("nvidia-driver-550", True, True),
        ("libnvidia-compute-550:i386", True, True),
        ("nvidia-driver-pinning-580", True, False),
    ],
)
def test_only_drivers_are_removed_and_only_if_asked_for(name: str, may: bool, asked: bool) -> None:
    planned = simulation([f"Remv {name} [1.0]"])
    assert (list(Limits(remove_drivers=asked).objections(planned)) == []) is may


def test_what_somebody_holds_is_not_changed() -> None:
    planned = simulation(["Inst libc6 [2.40-1] (2.41-1 Debian:13 [amd64])"])
    (objection,) = Limits(held=frozenset({"libc6"})).objections(planned)
    assert "libc6, which is held" in objection
