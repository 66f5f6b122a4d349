"""The proof: asks the running server, not the configuration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator

import click
from pyinfra import host, state
from pyinfra.api import deploy, operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.facts.proof import ServerProof
from tasks.operations import shell
from tasks.rules import proof as rules
from tasks.rules.plan import Plan


@deploy("Proof")
def prove(plan: Plan) -> None:
    """Print for the host which device serves how fast where; fail if it does not."""
    assert plan.server is not None
    proven(
        name="Prove that it serves",
        url=plan.server.url,
        with_key=plan.server.needs_api_key,
        on_gpu=plan.server.offloads,
    )


@operation()
def proven(url: str, with_key: bool, on_gpu: bool) -> Generator[PyinfraCommand, None, None]:
    """Ask the server for its properties and for tokens. Changes nothing but the report."""
    if not state.is_executing:
        return
    answers = host.get_fact(ServerProof, url=url, with_key=with_key)
    verdict = rules.judge(url, answers, on_gpu)
    if verdict.faults:
        yield shell.failure(*(f"Error: {fault}" for fault in verdict.faults))
        return
    report = shlex.quote(json.dumps({"host": host.name, **verdict.as_json()}, indent=2))
    written, output = shell.run(
        host,
        f"mkdir -p {at.STATE} && printf '%s\\n' {report} >{at.REPORT}.new && "
        f"mv {at.REPORT}.new {at.REPORT}",
    )
    if not written:
        shell.complain(host, f"Warning: {at.REPORT} cannot be written: {output.stderr}")
    _print(verdict, with_key)


def _print(verdict: rules.Verdict, with_key: bool) -> None:
    rows = rules.table(host.name, verdict)
    key = f' -H "Authorization: Bearer $(sudo cat {at.API_KEY})"' if with_key else ""
    address = shlex.quote(f"{verdict.url}/v1/chat/completions")  # zsh looks for files named [::1]
    try_it = (
        f"curl {address}{key} -H 'Content-Type: application/json' "
        '-d \'{"messages": [{"role": "user", "content": "Hello!"}]}\''
    )
    lines = ["", *(f"    {what:<9} {value}" for what, value in rows), f"    try it    {try_it}", ""]
    click.echo("\n".join(lines), err=True)
