"""NVIDIA's driver after apt has put it there: compiled, kept as it is, awake, loaded."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterable, Sequence

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.operations import shell
from tasks.rules import tables
from tasks.rules.nvidia.installation import SERVICES

UNATTENDED = "/etc/apt/apt.conf.d/52llamastead-nvidia"
BLACKLIST = "/etc/modprobe.d/llamastead-nouveau.conf"
_BLACKLIST_TEXT = "blacklist nouveau\\noptions nouveau modeset=0\\n"


def unattended_text() -> str:
    """What keeps unattended-upgrades away: new libraries do not work with the loaded module."""
    patterns = "".join(f'    "{each}";\n' for each in tables.housekeeping().unattended_upgrades)
    return f"Unattended-Upgrade::Package-Blacklist {{\n{patterns}}};\n"


def hold(packages: Iterable[str]) -> str:
    """Shell that holds packages, as `apt-mark hold` does, whatever the state of apt's sources."""
    return f"printf '%s hold\\n' {' '.join(packages)} | dpkg --set-selections"


@operation()
def runfiles_removed(uninstallers: Sequence[str]) -> Generator[PyinfraCommand, None, None]:
    """Undo `.run` installations with the uninstallers that they left."""
    for path in uninstallers:
        quoted = shlex.quote(path)
        yield shell.command(f"[ ! -x {quoted} ] || {quoted} --silent")


@operation()
def compiled(kernel: str) -> Generator[PyinfraCommand, None, None]:
    """DKMS has built and installed the modules for a kernel, or the host is not to be rebooted.

    Tries once more what the packages' own scripts left undone: they say nothing of a failure.
    """
    if not state.is_executing:
        return
    _, output = shell.run(host, _compile(shlex.quote(kernel)))
    said = output.stdout_lines
    if said[-1:] == ["built"]:
        return
    reason = said[-1] if said else "DKMS said nothing"
    yield shell.failure(
        f"Error: the driver's modules could not be compiled for kernel {kernel}: {reason}. "
        "Don't reboot: the host would come up without a driver."
    )


def _compile(kernel: str) -> str:
    """Shell that says `built` at the end, or what is wrong."""
    return f"""
is_built() {{ dkms status -k {kernel} 2>/dev/null | grep -qE '^nvidia.*: installed'; }}
is_built || dkms autoinstall -k {kernel} >/dev/null 2>&1
if is_built; then echo built; exit 0; fi
dkms status | grep -q '^nvidia' || {{ echo "DKMS knows no module of NVIDIA's"; exit 0; }}
[ -e /lib/modules/{kernel}/build ] || {{ echo "its headers are missing"; exit 0; }}
log=$(ls -t /var/lib/dkms/nvidia*/*/build/make.log 2>/dev/null | head -n 1)
error=$(grep -m 1 -E ' error: |Error |No space left' "$log" 2>/dev/null)
echo "${{error:-see}} ($log)"
"""


@operation()
def kept() -> Generator[PyinfraCommand, None, None]:
    """The driver stays as it is until somebody wants another, and has the card for itself.

    Held, and kept away from unattended-upgrades; nouveau blacklisted where no package does it;
    persistence daemon and the units for suspend and resume enabled. Only what is not so already
    is done.
    """
    _, output = shell.run(host, _STATE)
    told: dict[str, list[str]] = {}
    for line in output.stdout_lines:
        key, _, value = line.partition(" ")
        told.setdefault(key, []).append(value)
    is_driver = tables.housekeeping().is_driver_package
    loose = [
        name
        for name in told.get("installed", [])
        if is_driver(name) and name not in told.get("held", [])
    ]
    done = True
    if loose:
        done = False
        yield shell.command(hold(loose))
    text = unattended_text()
    if "\n".join(told.get("unattended", [])) + "\n" != text:
        done = False
        yield shell.command(f"printf %s {shlex.quote(text)} >{UNATTENDED}")
    if "nouveau" not in told.get("blacklisted", []):
        done = False
        yield shell.command(f"printf '{_BLACKLIST_TEXT}' >{BLACKLIST} && {_INITRAMFS}")
    for service in SERVICES:
        if service in told.get("disabled", []):
            done = False
            yield shell.command(f"systemctl enable --quiet {service}")
    if done:
        host.noop("the driver is held, and has the card for itself")


_STATE = f"""
dpkg-query -W -f '${{db:Status-Abbrev}} ${{Package}}\\n' |
  sed -n 's/^hi. *\\(.*\\)/installed \\1\\nheld \\1/p; s/^[^h]i. */installed /p'
sed 's/^/unattended /' {UNATTENDED} 2>/dev/null
modprobe --showconfig 2>/dev/null | sed -n 's/^blacklist nouveau$/blacklisted nouveau/p'
for unit in {" ".join(SERVICES)}; do
  [ "$(systemctl is-enabled $unit 2>/dev/null)" != disabled ] || echo "disabled $unit"
done
true
"""

_INITRAMFS = """
if command -v update-initramfs >/dev/null; then update-initramfs -u -k all
elif command -v dracut >/dev/null; then dracut --force --regenerate-all; fi
"""


@operation()
def loaded() -> Generator[PyinfraCommand, None, None]:
    """The kernel runs the driver that is installed; where a reboot is needed, that is an error.

    Loads the modules where nothing else has the card, which saves the reboot.
    """
    if not state.is_executing:
        return
    _, output = shell.run(host, _LOADED)
    reason = output.stdout.strip()
    if reason:
        yield shell.failure(
            f"Error: reboot needed: {reason}. Reboot the host (`systemctl reboot`), then run this "
            "again: it goes on where it stopped."
        )


_LOADED = """
# Debian's packages rename their modules, and tell modprobe.
for name in nvidia nvidia-current nvidia-current-open; do
  installed=$(modinfo -F version $name 2>/dev/null) && break
done
running=$(cat /sys/module/nvidia/version 2>/dev/null)
if [ -z "$running" ] && [ ! -d /sys/module/nouveau ]; then
  modprobe -q nvidia && modprobe -q nvidia_uvm
  running=$(cat /sys/module/nvidia/version 2>/dev/null)
  [ -z "$running" ] || ! systemctl is-enabled -q nvidia-persistenced 2>/dev/null ||
    systemctl start nvidia-persistenced
fi
if [ -n "$running" ] && [ "$running" = "${installed:-$running}" ]; then exit 0; fi
if [ -z "$installed" ]; then echo "there are no modules of the driver for the running kernel"
elif [ -n "$running" ]; then echo "driver $running is still loaded, $installed is installed"
elif [ -d /sys/module/nouveau ]; then
  echo "nouveau still has the card, driver $installed is installed"
else echo "driver $installed is installed and cannot be loaded into the running kernel"; fi
"""


@operation()
def marked() -> Generator[PyinfraCommand, None, None]:
    """Remember that this driver is ours to look after."""
    yield shell.command(f"mkdir -p {at.STATE} && touch {at.DRIVER_MARK}")
