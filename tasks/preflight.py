"""Look at the host, decide everything, and say so, before anything is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from pyinfra import host

from tasks import model_lookup, source_lookup, upstream
from tasks.facts.file_range import FileRange
from tasks.facts.probe import HostProbe
from tasks.facts.reach import ModelReach
from tasks.facts.source_folder import SourceFolder
from tasks.facts.told import told
from tasks.operations.lock import held
from tasks.operations.shell import abandon, complain
from tasks.probe import APT_PENDING, DRIVER_MARK, Probe
from tasks.rules import memory, model, server
from tasks.rules.findings import Finding, Severity, error
from tasks.rules.fit import Verdict
from tasks.rules.making import Folder
from tasks.rules.model import Found, part_paths
from tasks.rules.nvidia.installation import toolkit_marks
from tasks.rules.plan import Plan, as_json, found_key, make_plan, rows, watched_packages
from tasks.settings import LORA_PART, Settings, SettingsError, instances, load, parts
from tasks.source_lookup import OnHost

COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def plan() -> Plan:
    """The plan for the host at hand, printed.

    A host for which it has an error is taken out of the run, after all its errors were printed;
    the others go on.
    """
    settings = _settings()
    made = _plan(settings, probe_host(settings))
    if settings.report_format == "json":
        click.echo(json.dumps({"host": host.name, **as_json(made)}))
    else:
        _print(made)
    if made.errors:
        abandon()
    return made


def lock() -> None:
    """Keep other deploys away from the host until this one ends."""
    held(name="Take the host's lock")


def probe_host(settings: Settings) -> Probe:
    """Everything about the host, in one round trip."""
    wanted = instances(settings).values()
    models = {part.model or "" for own in wanted for part in parts(own).values()}
    try:
        probe = host.get_fact(
            HostProbe,
            ports=tuple({own.server_port: None for own in wanted}),
            model_paths=tuple(path for path in models if path.startswith("/")),
            files=(*server.watched_files(), APT_PENDING, DRIVER_MARK, *toolkit_marks(settings)),
            packages=watched_packages(),
            _ignore_errors=True,
        )
    except EOFError:  # sudo wants a password and there is nobody to type one
        probe = None
    if probe is None:
        _stop(
            error(
                "probe-failed",
                "the host could not be looked at",
                "nothing is known about it",
                "Connect as root, or as a user who may use sudo (`--sudo`; a password is asked for "
                "on a terminal), and see the lines above. If /tmp is mounted noexec, sudo gets no "
                "password: set `_temp_dir` to another folder (data: `_temp_dir=/var/tmp`).",
            )
        )
    return probe


def _settings() -> Settings:
    try:
        settings = load(host.data.dict())  # type: ignore[no-untyped-call]
    except SettingsError as problem:
        for fault in problem.faults:
            complain(host, f"Error: setting {fault}")
        abandon()
    return _with_what_is_here(settings) if host.name.startswith("@local") else settings


def _with_what_is_here(settings: Settings) -> Settings:
    """For this machine itself: a file of it is on the host already."""

    def there(model: str | None) -> str | None:
        if model is None or not model.startswith("file:"):
            return model
        return str(Path(model.removeprefix("file:")).expanduser().absolute())

    def moved(own: Settings) -> dict[str, object]:
        loras = tuple(
            each.model_copy(update={"model": there(each.model)}) for each in own.model_lora
        )
        found = {"model": there(own.model), "model_draft": there(own.model_draft)}
        return {**found, "model_lora": loras}

    further = {
        name: {**own, **{n: value for n, value in moved(made).items() if n in own}}
        for name, own in settings.server_instances.items()
        for made in [instances(settings)[name]]
    }
    return settings.model_copy(update={**moved(settings), "server_instances": further})


def _plan(settings: Settings, probe: Probe) -> Plan:
    source, faults = upstream.resolve(settings, probe)
    found, said = _found(settings, probe)
    faults = (*faults, *said)
    made = make_plan(settings, probe, source, faults, found)
    if made.errors:
        return made
    wanted = [
        (each, part, own) for each in made.instances for part, own in parts(each.settings).items()
    ]
    if made.needs_download:
        for each, part, own in wanted:
            key = found_key(each.name, part)
            found[key] = _reached(own, probe, found[key])
        made = make_plan(settings, probe, source, faults, found)
        if made.errors:
            return made
    if not all(each.converged for each in made.servers):
        for each, part, own in wanted:
            key = found_key(each.name, part)
            if not part.startswith(LORA_PART):
                found[key], said = _shaped(own, probe, found[key])
                faults = (*faults, *(one.about(part).within(each.name) for one in said))
        made = make_plan(settings, probe, source, faults, found)
    return made


def _found(settings: Settings, probe: Probe) -> tuple[dict[str, Found], tuple[Finding, ...]]:
    """What is known of the models, by the instances that serve them.

    Where the best that fits is asked for, that is chosen last: beside the others.
    """
    found: dict[str, Found] = {}
    faults: tuple[Finding, ...] = ()
    there: list[memory.Neighbour] = []
    wanted = [
        (name, part, own)
        for name, instance in instances(settings).items()
        for part, own in parts(instance).items()
    ]
    for name, part, own in sorted(wanted, key=lambda each: _is_open(each[2])):
        is_adapter = part.startswith(LORA_PART)
        if own.model_quantize is not None:
            looked, said = source_lookup.resolve(own, probe, OnHost(_listed, _FileOnHost))
        else:
            looked, said = model_lookup.resolve(own, probe, there, is_adapter)
        shape = model.shape_of(model.plan(own, probe, looked), looked)
        fitted = memory.judge(own, probe, shape, there)
        there += [(own, fitted)] if fitted and fitted.verdict is Verdict.FITS else []
        faults = (*faults, *(problem.about(part).within(name) for problem in said))
        found[found_key(name, part)] = looked
    for name, own in instances(settings).items():
        template, unread = model_lookup.chat_template(own)
        found[name] = replace(found[name], chat_template=template)
        faults = (*faults, *(problem.within(name) for problem in unread))
    return found, faults


def _is_open(settings: Settings) -> bool:
    """Whether the best quantisation that fits is asked for."""
    reference = settings.model_reference
    bare = reference is not None and reference.quant is None and reference.file is None
    return bare and settings.model_quantize is None


def _reached(own: Settings, probe: Probe, found: Found) -> Found:
    """With what the host is told when it asks for the model."""
    wanted = model.plan(own, probe, found)
    urls = [file.url for file in wanted.missing if file.url] if wanted else []
    if not urls:
        return found
    stdin = told({"url": urls[0], **own.proxy_environment})
    return replace(found, reach=host.get_fact(ModelReach, _stdin=stdin))


def _listed(path: str) -> Folder | None:
    return host.get_fact(SourceFolder, path=path, parts=part_paths(path))


class _FileOnHost:
    """A file of the host at hand, of which ranges are read."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on."""
        found = host.get_fact(FileRange, path=self._path, offset=offset, length=length)
        return found or b""


def _shaped(own: Settings, probe: Probe, found: Found) -> tuple[Found, tuple[Finding, ...]]:
    """With the shape of a model of which only the host, or a web server, has the header."""
    wanted = model.plan(own, probe, found)
    if found.shape is not None or wanted is None or wanted.to_make:
        return found, ()  # of one that is to be made its source was looked at
    if wanted.on_host:
        paths = [file.path for file in wanted.parts]
    elif any(not file.blob_stored for file in wanted.parts):
        if own.model_reference is not None or wanted.url is None:
            return found, ()  # the Hub was asked; what was wrong was said
        shape, said = model_lookup.shape_of_url(wanted.url)
        return replace(found, shape=shape), said
    else:
        paths = [file.blob for file in wanted.parts]
    shape, said = model_lookup.shape_of_sources(wanted.name, tuple(map(_FileOnHost, paths)))
    return replace(found, shape=shape), said


def _stop(found: Finding) -> NoReturn:
    complain(host, f"Error: {found}")
    abandon()


def _print(made: Plan) -> None:
    for what, decision in rows(made):
        host.log(f"{what:<10} {decision}")
    for found in made.findings:
        host.log_styled(f"{found.severity.value.capitalize()}: {found}", fg=COLOURS[found.severity])
