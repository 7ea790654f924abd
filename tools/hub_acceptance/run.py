"""Run huggingface_hub's own test-suite, unchanged, against `mmhub hub serve`.

    pip install -r tools/hub_acceptance/requirements.txt -e . -e plugins/mmhub-hubserver
    python tools/hub_acceptance/run.py                    # Xet uploads, as clients do by default
    python tools/hub_acceptance/run.py --lfs              # HF_HUB_DISABLE_XET=1
    python tools/hub_acceptance/run.py --npm              # and @huggingface/hub, from npm
    python tools/hub_acceptance/run.py --record           # and write what came out into RESULTS.md

With `--lfs` every upload goes by LFS, but for the tests marked `xet`: these are about Xet and switch it on for
themselves. Downloads are plain HTTP in both modes, so the same tests fail, for the same reasons.

The tests come from the source distribution of exactly that version, on the package index; nothing of them is kept here.
They run without a network (in a namespace of their own, where the system lets us) against a hub on loopback with the
three accounts that the tests log in with. Exits 1 if fewer than `--at-least` pass, or if a test fails that
`out_of_scope.txt` does not name.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import results

VERSION = "2.4.0"
AT_LEAST = 565
HERE = Path(__file__).resolve().parent
MODULES = """
    hf_api commit_api lfs snapshot_download file_download hub_mixin hub_mixin_pytorch repocard hf_file_system
    commit_scheduler xet_upload xet_download upload_pipeline copy_files cache_layout
"""
MARKS = ("production", "xet", "no_xet", "git_lfs", "transfer", "api", "inference", "deprecated")
Outcomes = dict[str, str]  # test -> passed, failed, error or skipped


def main() -> int:
    options = _parser().parse_args()
    scratch = options.scratch.resolve()
    tests = _unpacked_tests(scratch)
    npm = _npm_folder(scratch) if options.npm else None
    if not options.with_network and not options.isolated and (prefix := _isolation()):
        return subprocess.call([*prefix, sys.executable, __file__, *sys.argv[1:], "--isolated"])
    with _hub(scratch) as endpoint:
        outcomes = _run_tests(tests, endpoint, options)
        npm_failed = bool(npm) and _run_npm(npm, endpoint) != 0
    partial = bool(options.keyword or options.modules)
    failed = _report(outcomes, partial=partial, at_least=options.at_least)
    if options.record and not partial:
        _record(outcomes, options, f"{_npm_version(npm)} {'failed' if npm_failed else 'passed'}" if npm else "-")
    return int(failed or npm_failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "mmhub-hub-acceptance")
    parser.add_argument("--lfs", action="store_true", help="upload by LFS: sets HF_HUB_DISABLE_XET=1")
    parser.add_argument("--npm", action="store_true", help="also run the JavaScript client (needs node and npm)")
    parser.add_argument("--at-least", type=int, default=AT_LEAST, help="passes required (default: %(default)s)")
    parser.add_argument("--workers", default="2", help="pytest-xdist processes (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="write the outcome of a whole run into RESULTS.md")
    parser.add_argument("--with-network", action="store_true", help="do not cut the network off")
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-k", dest="keyword", help="run only matching tests; the number of passes is then not checked")
    parser.add_argument("modules", nargs="*", help="run only these test modules, as hf_api")
    return parser


def _unpacked_tests(scratch: Path) -> Path:
    """Return the folder of the tests, fetched from the package index when it is not there yet."""
    folder = scratch / f"huggingface_hub-{VERSION}" / "tests"
    if not folder.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        command = ["pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.check_call([sys.executable, "-m", *command, f"huggingface_hub=={VERSION}", "--dest", str(scratch)])
        with tarfile.open(scratch / f"huggingface_hub-{VERSION}.tar.gz") as archive:
            archive.extractall(scratch, filter="data")
    (folder / "__init__.py").touch()
    shutil.copy(HERE / "conftest.py", folder / "conftest.py")
    return folder


def _isolation() -> list[str]:
    """Return the command prefix that cuts the network off, empty where the system does not let us."""
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        prefix = [*unshare, "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
        try:
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
        except FileNotFoundError:
            break
    print("Cannot cut the network off here (unshare, ip): going on with it.", file=sys.stderr)
    return []


@contextmanager
def _hub(scratch: Path) -> Iterator[str]:
    """Serve an empty hub with the accounts of the tests; yield its address."""
    from mmhub_hubserver import HubServer
    from mmhub_hubserver.accounts import Accounts

    sys.path.insert(0, str(scratch / f"huggingface_hub-{VERSION}" / "tests"))
    import testing_constants as known

    with tempfile.TemporaryDirectory(prefix="hub-", dir=scratch) as folder:
        accounts = Accounts(Path(folder) / "accounts.json")
        orgs = {"valid_org_hub": "Dummy Hub Org"}
        accounts.add(known.USER, token=known.TOKEN, orgs=[*orgs], org_names=orgs, fullname=known.FULL_NAME)
        accounts.add(known.OTHER_USER, token=known.OTHER_TOKEN)
        private = [known.ENTERPRISE_ORG]
        accounts.add(known.ENTERPRISE_USER, token=known.ENTERPRISE_TOKEN, orgs=private, private_orgs=private)
        with HubServer(folder) as hub:
            yield hub.url


def _run_tests(tests: Path, endpoint: str, options: argparse.Namespace) -> Outcomes:
    report = tests.parent / "report.xml"
    report.unlink(missing_ok=True)
    ini = tests.parent / "acceptance.ini"
    marks = "".join(f"    {mark}: of huggingface_hub\n" for mark in MARKS)
    ini.write_text(f"[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nmarkers =\n{marks}")
    names = [tests / f"test_{name}.py" for name in options.modules or MODULES.split()]
    command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(tests.parent), "-q", "--no-header"]
    command += ["-m", "not production", "-n", options.workers, "--timeout", "60", "--tb", "short"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *(["-k", options.keyword] if options.keyword else [])]
    subprocess.run([*command, *map(str, names)], cwd=tests.parent, env=_environment(tests, endpoint, options.lfs))
    return _outcomes(report)


def _environment(tests: Path, endpoint: str, lfs: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = tests.parent / "home"
    shutil.rmtree(home, ignore_errors=True)
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    return kept | own | ({"HF_HUB_DISABLE_XET": "1"} if lfs else {})


def _outcomes(report: Path) -> Outcomes:
    """Read pytest's report. A test that passed and whose clean-up failed counts as an error."""
    if not report.exists():
        raise SystemExit("pytest wrote no report; see its output above.")
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.get("classname", "").removeprefix("tests.").replace(".", "::")
        name = f"{path}::{case.get('name')}"
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed"
        if outcome != "passed" or name not in found:
            found[name] = outcome
    return found


def _report(outcomes: Outcomes, *, partial: bool, at_least: int) -> bool:
    """Print what happened; return whether it is worse than allowed."""
    known, count = _out_of_scope(), Counter(outcomes.values())
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("failed", "error"))
    unexpected = [name for name in bad if _reason(name, known) is None]
    for name in bad:
        print(f"{outcomes[name]:7} {name}  ({_reason(name, known) or 'NOT EXPECTED'})")
    mended = (
        [] if partial else sorted(name for name, outcome in outcomes.items() if outcome == "passed" and name in known)
    )
    for name in mended:
        print(f"passes, may leave out_of_scope.txt: {name}")
    print(", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped")))
    print(f"{len(unexpected)} unexpected; at least {at_least} passes are required")
    return bool(unexpected) or (not partial and count["passed"] < at_least)


def _record(outcomes: Outcomes, options: argparse.Namespace, npm: str) -> None:
    known = _out_of_scope()
    count = Counter(outcomes.values())
    bad = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    results.write(
        HERE / "RESULTS.md",
        mode="LFS" if options.lfs else "Xet",
        options=" --lfs" * options.lfs + " --npm" * options.npm,
        counts=[count[kind] for kind in ("passed", "failed", "error", "skipped")],
        npm=npm,
        reasons=Counter(_reason(name, known) or "not expected" for name in bad),
    )


def _out_of_scope() -> dict[str, str]:
    """Return reason by test, or by the start of test names that end in `*`."""
    found, reason = {}, ""
    for line in (HERE / "out_of_scope.txt").read_text().splitlines():
        if line.startswith("#"):
            reason = line.strip("# ")
        elif line.strip():
            found[line.strip()] = reason
    return found


def _reason(name: str, known: dict[str, str]) -> str | None:
    for pattern, reason in known.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def _npm_folder(scratch: Path) -> Path:
    folder = scratch / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "@huggingface" / "hub").is_dir():
        subprocess.check_call(["npm", "install", "--silent", "--no-audit", "--no-fund", "@huggingface/hub"], cwd=folder)
    shutil.copy(HERE / "npm_client.mjs", folder)
    return folder


def _npm_version(folder: Path) -> str:
    package = folder / "node_modules" / "@huggingface" / "hub" / "package.json"
    return str(json.loads(package.read_text())["version"])


def _run_npm(folder: Path, endpoint: str) -> int:
    import testing_constants as known

    env = {**os.environ, "HUB_URL": endpoint, "HUB_TOKEN": known.TOKEN, "HUB_USER": known.USER}
    return subprocess.call(["node", "npm_client.mjs"], cwd=folder, env=env, timeout=300)


if __name__ == "__main__":
    sys.exit(main())
