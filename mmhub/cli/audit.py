"""`mmhub audit`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.output import emit, json_option, quiet_option, table
from mmhub.cli.text import counted, printable, size_text

if TYPE_CHECKING:
    from mmhub.hub.audit import Audit

_SHOWN = 40  # files, and findings


@click.command()
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--verify", metavar="KEY.pub", help="Whose signature it must have; 'sigstore:IDENTITY,ISSUER' for one.")
@click.option("--full", is_flag=True, help="Fetch the weights too, and look for NaN and infinity.")
@quiet_option
@json_option
def audit(name: str, revision: str | None, verify: str | None, full: bool, quiet: bool, as_json: bool) -> None:
    """Look at what the model NAME (or a folder, also another library's) is made of before you trust it.

    Nothing of it is run. Exit code 5 says that something bad was found: a format or a key that makes some program run
    code, a file that is not what it says or what was signed, weights that are not sound.
    """
    from mmhub.errors import ExitCode
    from mmhub.hub.audit import audit as look
    from mmhub.hub.pull import resolve_name
    from mmhub.hub.signing import read_signer

    report = look(resolve_name(name, revision), read_signer(verify) if verify else None, full=full)
    emit(_data(report), as_json, _text(report))
    if report.is_bad:
        click.get_current_context().exit(ExitCode.TRUST)


def _verdict(report: Audit) -> str:
    worse = [one.severity for one in report.findings if one.severity != "note"]
    if not worse:
        return "nothing bad found"
    return ", ".join(counted(worse.count(kind), f"{kind} finding") for kind in ("bad", "warning") if kind in worse)


def _data(report: Audit) -> dict[str, Any]:
    verdict = "bad" if report.is_bad else "nothing bad found"
    return {"verdict": verdict, "summary": _verdict(report)} | dataclasses.asdict(report)


def _text(report: Audit) -> str:
    files = table(
        ["file", "bytes", "format", "sha256", "config.json"],
        [
            (printable(one.name), size_text(one.bytes), one.format, one.sha256[:12] or "-", one.recorded or "-")
            for one in report.files[:_SHOWN]
        ],
    )
    more = len(report.files) - _SHOWN
    signature = report.signature
    by = f" by {', '.join(signature['by'])}" if signature["by"] else ""
    hint = f" (key {signature['key'][:12]})" if signature["key"] else ""
    plugins = [
        f"{one['distribution']} {one['required']} ({one['installed'] or 'not installed'}, {one['trust']})"
        for one in report.plugins
    ]
    facts = {
        "model": f"{report.name}{f' @ {report.commit[:12]}' if report.commit else ''} ({report.kind})",
        "signature": f"{signature['state']}{by}{hint}",
        "licence": report.license or "none given",
        "made from": "; ".join(f"{one['name']} ({one['relation']}): {one['license']}" for one in report.licences),
        "data": "; ".join(f"{one['name']}: {one['license']}" for one in report.datasets),
        "plugins": "; ".join(plugins),
        "guards": ", ".join(report.guards),
        "watermark": "yes" if report.watermark else "",
        "provenance": _provenance(report.provenance),
    }
    lines = [f"{key + ':':<12}{printable(value)}" for key, value in facts.items() if value]
    found = [
        f"{one.severity + ':':<12}{printable(f'{one.file} {one.message}'.strip())}" for one in report.findings[:_SHOWN]
    ]
    left = len(report.findings) - _SHOWN
    found += [f"... and {left} more findings (--json shows all)"] if left > 0 else []
    rest = [f"... and {more} more files (--json shows all)"] if more > 0 else []
    return "\n".join([*lines, "", files, *rest, "", *found, _verdict(report)])


def _provenance(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    code = facts["code"] or {}
    files = sum(map(len, facts["data"].values()))
    said = [f"code {str(code['commit'])[:12]}" if code.get("commit") else "", counted(files, "hashed data file")]
    said += [f"{split}: {line}" for split, line in facts["overlap"].items()]
    said += ["forced" if facts["forced"] else ""]
    return ", ".join(filter(None, said))
