"""NVIDIA's installer .deb, which puts a whole repository on the host: fetched, used, taken away."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks.operations.apt_get import OPTIONS, run_apt
from tasks.operations.rehearsal import installer_file
from tasks.rules.nvidia.installation import LOCAL_PIN, LocalInstaller

KEYRINGS = "/usr/share/keyrings"


@operation()
def unpacked(
    local: LocalInstaller, environment: Mapping[str, str]
) -> Generator[PyinfraCommand, None, None]:
    """The installer's repository on the host, with its key where its source looks for it.

    Each installer is signed with a key of its own: what vouches for it is the SHA-256 of the .deb.
    """
    yield from run_apt(
        "the local installer",
        f"""
dpkg --force-confdef --force-confold -i {installer_file(local)} || return
install -m 644 {local.folder}/{local.keyring_glob} {KEYRINGS}/ || return
apt-get -q update
""",
        environment,
        "the local installer cannot be unpacked",
    )


@operation()
def removed(
    local: LocalInstaller, environment: Mapping[str, str]
) -> Generator[PyinfraCommand, None, None]:
    """Nothing is left of the installer; what was installed from it stays."""
    yield from run_apt(
        "the local installer",
        f"""
for key in {local.folder}/{local.keyring_glob}; do rm -f "{KEYRINGS}/${{key##*/}}"; done
apt-get -q -y {" ".join(OPTIONS)} purge {local.package} || return
rm -rf {local.folder} {LOCAL_PIN} {installer_file(local)}
apt-get -q update
""",
        environment,
        "the local installer cannot be removed",
    )
