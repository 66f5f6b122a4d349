"""An installation tried before anything is changed: keys, signatures, lists, versions, downloads.

Whatever is wrong with a repository shows here, and the host is as it was. What was rehearsed is
then exactly what is installed: see apt_get.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.facts.fetched import SmallFile
from tasks.facts.told import LISTEN, exports, told
from tasks.operations import shell
from tasks.operations.download import DEBIAN_PACKAGE, Download, Wanted
from tasks.operations.job import Job, finished
from tasks.rules import apt, openpgp, tables
from tasks.rules.nvidia.installation import AptRepository, Installation, LocalInstaller, PackageSet
from tasks.settings import Settings

WORK = f"{at.CACHE}/apt"
ARCHIVES = f"{WORK}/archives"
NEW = f"{WORK}/new"
"""What is to lie under / in the end."""
INSTALLER = f"{WORK}/installer"

WHATEVER_IS_HELD = ("--allow-change-held-packages", "--ignore-hold")
"""What depends on each other is held by ourselves; what others hold is seen to by apt.Limits."""

_SCRIPT = (Path(__file__).parents[2] / "files" / "apt-rehearsal.sh").read_text()


class _RefusedError(Exception):
    """Why the installation cannot be: one line for people."""


@operation()
def passed(
    installation: Installation, settings: Settings, codename: str
) -> Generator[PyinfraCommand, None, None]:
    """Everything that the installation needs can be had, is what it should be, and does no harm.

    Fetches it as well. Changes nothing: what it fetches and tries lies in a folder under
    /var/cache, of which only whole or partial downloads stay if something is wrong.
    """
    if not state.is_executing:
        return
    try:
        _write_new(installation, settings)
        if installation.toolkit is not None and installation.toolkit.local is not None:
            yield from _fetch_installer(installation.toolkit.local, settings)
        offered = _prepare(installation, settings, codename)
        _check_versions(installation.every_set, offered)
        plans = {each.key: _arguments(each, offered) for each in installation.every_set}
        _check_simulation(installation, settings, plans)
        yield from _download(installation, settings, plans)
        for key, arguments in plans.items():
            _must(f"printf '%s\\n' {shlex.quote(' '.join(arguments))} >{_arguments_file(key)}")
    except _RefusedError as refused:
        shell.run(host, _CLEAN)
        yield shell.failure(f"Error: {refused}")


@operation()
def cleared() -> Generator[PyinfraCommand, None, None]:
    """Remove the rehearsal and its downloads."""
    yield shell.command(f"rm -rf {WORK}")


def arguments(key: str) -> list[str]:
    """What apt-get is to be told for a set of packages, as it was rehearsed."""
    _, output = shell.run(host, f"cat {_arguments_file(key)}")
    return output.stdout.split()


_CLEAN = f"""
cd {WORK} 2>/dev/null || exit 0
rm -rf new sources preferences lists one pin local arguments.* *.bin
[ -n "$(find . -type f -size +0 ! -name lock)" ] || rm -rf {WORK}
"""


def _arguments_file(key: str) -> str:
    return f"{WORK}/arguments.{key}"


def _must(command: str) -> list[str]:
    succeeded, output = shell.run(host, command)
    if not succeeded:
        raise _RefusedError(
            f"the rehearsal failed: {output.stderr or apt.complaint(output.stdout_lines)}"
        )
    return output.stdout_lines


def _step(name: str, settings: Settings, **variables: str) -> tuple[bool, list[str]]:
    variables |= {"STEP": name, "WORK": WORK}
    secret = exports(settings.apt_environment) or "\n"
    succeeded, output = shell.run(host, exports(variables) + LISTEN + _SCRIPT, stdin=secret)
    return succeeded, output.stdout_lines


# The steps, in order


def _write_new(installation: Installation, settings: Settings) -> None:
    """Keys, once they are known to be the right ones, with sources and preferences."""
    files: dict[str, bytes] = {}
    for repository in installation.repositories:
        files[repository.keyring] = _key(repository, settings)
        files[repository.sources_file] = repository.sources.encode()
    for path, text in installation.preferences.items():
        files[path] = text.encode()
    commands = [f"rm -rf {NEW}", f"mkdir -p {NEW}"]
    for path, content in files.items():
        target = shlex.quote(NEW + path)
        text = base64.b64encode(content).decode()
        commands.append(f"mkdir -p $(dirname {target}) && echo {text} | base64 -d >{target}")
    _must(" && ".join(commands))


def _key(repository: AptRepository, settings: Settings) -> bytes:
    asked = {"url": repository.key_url, **settings.apt_environment}
    fetched = host.get_fact(SmallFile, _stdin=told(asked))
    if fetched.error:
        raise _RefusedError(
            f"the key of {repository.title} cannot be had: {fetched.error} ({repository.key_url})"
        )
    try:
        return openpgp.only(fetched.content, repository.fingerprint)
    except openpgp.OpenPgpError as problem:
        raise _RefusedError(
            f"{repository.key_url} is not the key of {repository.title}: {problem}"
        ) from None


def _fetch_installer(
    local: LocalInstaller, settings: Settings
) -> Generator[PyinfraCommand, None, None]:
    assert local.sha256 is not None
    _must(f"install -d -o _apt -m 755 {INSTALLER}")
    download = Download(
        name="fetch-installer",
        files=[Wanted(local.sha256, local.url.rpartition("/")[2], local.url)],
        kind=DEBIAN_PACKAGE,
        folder=INSTALLER,
        user="_apt",  # there wherever apt is, and may do nothing
    )
    yield from finished._inner(job=download.job(settings))


def installer_file(local: LocalInstaller) -> str:
    """Where the local installer lies on the host, once it was fetched and checked."""
    return f"{INSTALLER}/{local.sha256}.part"


def _prepare(installation: Installation, settings: Settings, codename: str) -> dict[str, str]:
    """Versions that there are to be had, by package."""
    local = installation.toolkit.local if installation.toolkit else None
    looked_up = [*installation.names]
    for each in installation.every_set:
        looked_up += [expected.package for expected in each.expectations]
    succeeded, lines = _step(
        "prepare",
        settings,
        SUPERSEDED=" ".join(dict.fromkeys(each.uri for each in installation.superseded)),
        COMPONENTS=" ".join(installation.components),
        CODENAME=codename,
        PINS=" ".join(pin for each in installation.sets for pin in each.pins),
        NAMES=" ".join(dict.fromkeys(looked_up)),
        LOCAL=installer_file(local) if local else "",
    )
    parts = _parts(lines)
    if succeeded:
        return apt.candidates(parts["policy"])
    name, said = list(parts.items())[-1]
    kind, _, which = name.partition(" ")
    if kind == "pin":
        raise _RefusedError(
            f"{which} cannot be had: {apt.complaint(said)}. "
            f"{_objection(installation.every_set, which, None) or ''}"
        )
    titles = {f"{each.name}.sources": each for each in installation.repositories}
    if which in titles:
        where = titles[which]
        raise _RefusedError(
            f"apt does not accept {where.title}: {apt.complaint(said)} ({where.url})"
        )
    raise _RefusedError(f"the installer cannot be used: {apt.complaint(said)}")


def _parts(lines: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"": []}
    for line in lines:
        if line.startswith("== "):
            parts[line[3:]] = []
        else:
            parts[list(parts)[-1]].append(line)
    return parts


def _objection(sets: Iterable[PackageSet], package: str, offered: str | None) -> str | None:
    for each in sets:
        for expectation in each.expectations:
            if expectation.package == package:
                found = expectation.objection(each.title, offered)
                if found:
                    return found
    return None


def _check_versions(sets: tuple[PackageSet, ...], offered: Mapping[str, str]) -> None:
    for each in sets:
        for expectation in each.expectations:
            package = expectation.package
            if found := _objection([each], package, offered.get(package)):
                raise _RefusedError(found)


def _arguments(wanted: PackageSet, offered: Mapping[str, str]) -> list[str]:
    return [
        "--install-recommends" if wanted.recommended else "--no-install-recommends",
        *WHATEVER_IS_HELD,
        *(["--allow-downgrades"] if wanted.downgrades else []),
        "install",
        *wanted.packages,
        *(name for name in wanted.optional if name in offered),
    ]


def _check_simulation(
    installation: Installation, settings: Settings, plans: dict[str, list[str]]
) -> None:
    planned = _simulate(installation, settings, plans)
    if installation.limits.remove_drivers and installation.driver is not None:
        leftovers = _leftovers(installation.driver.branch, planned)
        if leftovers:
            plans["driver"] += [f"{name}-" for name in leftovers]
            planned = _simulate(installation, settings, plans)
    for objection in installation.limits.objections(planned):
        raise _RefusedError(f"{objection}. Nothing was changed.")


def _simulate(
    installation: Installation, settings: Settings, plans: Mapping[str, list[str]]
) -> apt.Simulation:
    _, lines = _step(
        "simulate", settings, ARGUMENTS=" ".join(_together(installation.every_set, plans))
    )
    said = _parts(lines).get("simulation", [])
    if any(line.startswith("E: ") for line in said):
        what = " and ".join(each.what for each in installation.every_set)
        raise _RefusedError(f"{what} cannot be installed here: {apt.complaint(said)}")
    return apt.simulation(said)


def _together(sets: Iterable[PackageSet], plans: Mapping[str, list[str]]) -> list[str]:
    """All sets at once, since they may get in each other's way."""
    words = [word for each in sets for word in (*each.pins, *plans[each.key])]
    options = [word for word in words if word.startswith("--")]
    if "--install-recommends" in options:
        options = [word for word in options if word != "--no-install-recommends"]
    names = [word for word in words if not word.startswith("--") and word != "install"]
    return [*dict.fromkeys(options), "install", *dict.fromkeys(names)]


def _leftovers(branch: int, planned: apt.Simulation) -> list[str]:
    """Installed driver packages of other branches, which the installation would leave behind."""
    _, output = shell.run(
        host,
        "dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\\n' | sed -n 's/^ii *//p'",
    )
    touched = {change.name for change in planned.installed} | set(planned.removed)
    found = []
    for line in output.stdout_lines:
        name, _, version = line.partition(" ")
        is_ours = apt.upstream(version).startswith(f"{branch}.")
        if tables.housekeeping().is_driver_package(name) and name not in touched and not is_ours:
            found.append(name)
    return found


def _download(
    installation: Installation, settings: Settings, plans: Mapping[str, list[str]]
) -> Generator[PyinfraCommand, None, None]:
    if not installation.sets:
        return
    words = _together(installation.sets, plans)
    values = {"STEP": "download", "WORK": WORK, "ARGUMENTS": " ".join(words)}
    job = Job(
        name="download",
        key=" ".join(words)[:200],
        script=_SCRIPT,
        variables=values,
        user="root",
        writable=(),
        timeout_seconds=0,
        environment=settings.apt_environment,
        is_apt=True,
    )
    yield from finished._inner(job=job)
    _, output = shell.run(host, f"cat {job.log}")
    if output.stdout_lines[-1:] != ["finished"]:
        raise _RefusedError(f"packages cannot be had: {apt.complaint(output.stdout_lines[:-1])}")
