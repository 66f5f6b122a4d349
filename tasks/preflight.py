"""Look at the host, decide everything, and say so, before anything is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from pyinfra import host

from tasks import model_lookup, upstream
from tasks.facts.file_range import FileRange
from tasks.facts.probe import HostProbe
from tasks.facts.reach import ModelReach
from tasks.facts.told import told
from tasks.operations.lock import held
from tasks.operations.shell import abandon, complain
from tasks.probe import APT_PENDING, DRIVER_MARK, Probe
from tasks.rules import server
from tasks.rules.architecture import Shape
from tasks.rules.findings import Finding, Severity, error
from tasks.rules.plan import Plan, as_json, make_plan, rows, watched_packages
from tasks.settings import Settings, SettingsError, load

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
    model = settings.model or ""
    try:
        probe = host.get_fact(
            HostProbe,
            port=settings.server_port,
            model_path=model if model.startswith("/") else "",
            files=(*server.watched_files(), APT_PENDING, DRIVER_MARK),
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
                "on a terminal), and see the lines above.",
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
    if settings.model_upload is not None and host.name.startswith("@local"):
        # What is here is there already.
        path = Path(settings.model_upload).expanduser().absolute()
        return settings.model_copy(update={"model": str(path)})
    return settings


def _plan(settings: Settings, probe: Probe) -> Plan:
    source, faults = upstream.resolve(settings, probe)
    found, said = model_lookup.resolve(settings, probe)
    template, unread = model_lookup.chat_template(settings)
    found, faults = replace(found, chat_template=template), (*faults, *said, *unread)
    made = make_plan(settings, probe, source, None, faults, found)
    if made.errors or made.model is None:
        return made
    reach = None
    if made.needs_download:
        url = next(file.url for file in made.model.missing if file.url)
        reach = host.get_fact(ModelReach, _stdin=told({"url": url, **settings.proxy_environment}))
        made = make_plan(settings, probe, source, reach, faults, found)
        if made.errors:
            return made
    if found.shape is None and made.server is not None and not made.server.converged:
        shape, said = _shape(made)
        found, faults = replace(found, shape=shape), (*faults, *said)
        made = make_plan(settings, probe, source, reach, faults, found)
    return made


class _FileOnHost:
    """A file of the host at hand, of which ranges are read."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on."""
        found = host.get_fact(FileRange, path=self._path, offset=offset, length=length)
        return found or b""


def _shape(made: Plan) -> tuple[Shape | None, tuple[Finding, ...]]:
    """The shape of a model of which only the host, or a web server, has the header."""
    model = made.model
    assert model is not None
    if model.on_host:
        paths = [file.path for file in model.parts]
    elif any(not file.blob_stored for file in model.parts):
        if made.settings.model_reference is not None or model.url is None:
            return None, ()  # the Hub was asked; what was wrong was said
        return model_lookup.shape_of_url(model.url)
    else:
        paths = [file.blob for file in model.parts]
    return model_lookup.shape_of_sources(model.name, tuple(_FileOnHost(path) for path in paths))


def _stop(found: Finding) -> NoReturn:
    complain(host, f"Error: {found}")
    abandon()


def _print(made: Plan) -> None:
    for what, decision in rows(made):
        host.log(f"{what:<10} {decision}")
    for found in made.findings:
        host.log_styled(f"{found.severity.value.capitalize()}: {found}", fg=COLOURS[found.severity])
