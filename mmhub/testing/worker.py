"""The process in which `mmhub plugins check` runs checks: told their ids on stdin, it reports each on stdout as JSON.

What plugins print goes to stderr. One line says that a check begins, one how it ended; if the second never comes, the
caller knows which check took the process down.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from mmhub.testing.catalogue import Check, find_checks
from mmhub.testing.contract import ContractError, NotApplicableError


def main() -> None:
    """Run the checks that stdin names: {"plugin": distribution, "ids": [...]}."""
    say = _take_stdout()
    wanted = json.loads(sys.stdin.readline())
    checks = {check.id: check for check in find_checks(wanted["plugin"])}
    for name in wanted["ids"]:
        say({"begin": name})
        start = time.monotonic()
        status, message = _run(checks[name])
        say({"id": name, "status": status, "message": message, "seconds": round(time.monotonic() - start, 3)})


def _take_stdout() -> Callable[[dict[str, Any]], None]:
    """Keep stdout for reports, and let everything else that is printed end up on stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(report: dict[str, Any]) -> None:
        channel.write(json.dumps(report) + "\n")
        channel.flush()

    return say


def _run(check: Check) -> tuple[str, str]:
    try:
        check.run()
    except NotApplicableError as reason:
        return "skipped", str(reason)
    except ContractError as error:
        return "failed", str(error)
    return "passed", ""


if __name__ == "__main__":
    main()
