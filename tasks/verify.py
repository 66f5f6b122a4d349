"""The proof: asks the running server, not the configuration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Mapping

import click
from pyinfra import host, state
from pyinfra.api import deploy, operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.facts.proof import ServerProof
from tasks.operations import shell
from tasks.rules import proof as rules
from tasks.rules.plan import Plan
from tasks.rules.server import Served, ServerPlan


@deploy("Proof")
def prove(plan: Plan) -> None:
    """Print for the host which device serves how fast where; fail if it does not."""
    assert plan.servers
    proven(name="Prove that it serves", servers=plan.servers)


@operation()
def proven(servers: tuple[ServerPlan, ...]) -> Generator[PyinfraCommand, None, None]:
    """Ask each server for its properties and for tokens. Changes nothing but the report."""
    if not state.is_executing:
        return
    verdicts = [
        (server, served, _asked(server, served)) for server in servers for served in server.serves
    ]
    faults = [fault for *_, verdict in verdicts for fault in verdict.faults]
    if faults:
        yield shell.failure(*(f"Error: {fault}" for fault in faults))
        return
    told = {"host": host.name, "servers": [verdict.as_json() for *_, verdict in verdicts]}
    report = shlex.quote(json.dumps(told, indent=2))
    written, output = shell.run(
        host,
        f"mkdir -p {at.STATE} && printf '%s\\n' {report} >{at.REPORT}.new && "
        f"mv {at.REPORT}.new {at.REPORT}",
    )
    if not written:
        shell.complain(host, f"Warning: {at.REPORT} cannot be written: {output.stderr}")
    for server, served, verdict in verdicts:
        _print(verdict, served, server.needs_api_key)


def _asked(server: ServerPlan, served: Served) -> rules.Verdict:
    answers = host.get_fact(
        ServerProof,
        unit=server.name,
        url=server.url,
        with_key=server.needs_api_key,
        purpose=served.purpose,
        model=served.model,
    )
    return rules.judge(server.name, server.url, answers, served.offloads, served.purpose)


def _print(verdict: rules.Verdict, served: Served, with_key: bool) -> None:
    rows = rules.table(host.name, verdict)
    key = f' -H "Authorization: Bearer $(sudo cat {at.API_KEY})"' if with_key else ""
    path, example = _EXAMPLES[verdict.purpose]
    words = json.dumps({"model": served.model, **example} if served.model else example)
    address = shlex.quote(f"{verdict.url}{path}")  # zsh looks for files named [::1]
    try_it = f"curl {address}{key} -H 'Content-Type: application/json' -d '{words}'"
    lines = ["", *(f"    {what:<9} {value}" for what, value in rows), f"    try it    {try_it}", ""]
    click.echo("\n".join(lines), err=True)


_EXAMPLES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello!"}]},
    ),
    "embed": ("/v1/embeddings", {"input": "Hello!"}),
    "rerank": ("/v1/rerank", {"query": "Hello?", "documents": ["Hello!", "Goodbye."]}),
}
