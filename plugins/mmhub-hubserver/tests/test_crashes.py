"""kill -9 of server and client at random moments of pushes: no half commit, no lost commit, nothing left over.

The default run kills a few times; MMHUB_KILLS=100 with `-m slow` is the long one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PUSHER = Path(__file__).with_name("pusher.py")
FILES = ("weights.safetensors", "part.safetensors", "config.json", "card.md")
QUICK, LONG = 4, int(os.environ.get("MMHUB_KILLS", "100"))


class Processes:
    """A hub server and a client that pushes one numbered version after the other, each restarted after its death."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.folder, self.acknowledged = folder, folder / "acknowledged.txt"
        self.acknowledged.touch()
        self._env = os.environ | {"HF_HUB_DISABLE_XET": "" if xet else "1", "HF_HOME": str(folder / "home")}
        self.url, self.port = "", "0"
        self.server = self.start_server()
        self.client = self.start_client()

    def start_server(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mmhub", "hub", "serve", "--data", str(self.folder / "hub")]
        process = subprocess.Popen([*command, "--port", self.port], stderr=subprocess.PIPE, text=True)
        assert process.stderr
        greeting = ""
        while "http://" not in greeting:
            line = process.stderr.readline()
            assert line, f"the server did not start again: {greeting}"
            greeting += line
        self.url = next(word for word in greeting.split() if word.startswith("http://"))
        self.port = self.url.rpartition(":")[2].strip("/")
        return process

    def start_client(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(PUSHER), self.url, str(self.acknowledged)]
        return subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    def kill(self, who: str) -> None:
        process = getattr(self, who)
        end(process)
        setattr(self, who, self.start_server() if who == "server" else self.start_client())

    def last_acknowledged(self) -> int:
        lines = self.acknowledged.read_text().split("\n")[:-1]  # a killed client may leave half a line
        return int(lines[-1]) if lines else 0

    def wait_for_progress(self, seconds: float = 90) -> None:
        before, end = self.last_acknowledged(), time.monotonic() + seconds
        while self.last_acknowledged() == before:
            assert time.monotonic() < end, "no push came through after the restart"
            time.sleep(0.02)

    def stop(self) -> None:
        end(self.client)
        end(self.server, signal.SIGTERM)


def end(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait(30)
    if process.stderr:
        process.stderr.close()


def versions(url: str) -> list[int]:
    """The version of every commit, newest first, each checked to be whole."""
    from huggingface_hub import HfApi, hf_hub_download

    hub, found = HfApi(endpoint=url, token=False), []
    for commit in hub.list_repo_commits("local/crash"):
        names = hub.list_repo_files("local/crash", revision=commit.commit_id)
        if "config.json" not in names:
            assert names == [".gitattributes"]
            continue
        assert set(FILES) < set(names)
        inside = set()
        for name in FILES:
            path = hf_hub_download("local/crash", name, revision=commit.commit_id, endpoint=url, token=False)
            inside.add(_version_of(Path(path)))
        assert len(inside) == 1, f"commit {commit.commit_id} mixes versions {inside}"
        found += inside
    return found


def _version_of(path: Path) -> int:
    if path.suffix == ".safetensors":
        head, _, rest = path.read_bytes().partition(b"\n")
        assert rest == random.Random(f"{path.name}{int(head)}").randbytes(len(rest)) and len(rest) >= 50_000
        return int(head)
    return int(json.loads(path.read_text())["version"])


def mmhub(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmhub", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def leftovers(data: Path) -> list[str]:
    """Pool files that no repository links, and temporary files."""
    pool = [path.name for path in (data / "pool").rglob("*") if path.is_file() and path.stat().st_nlink < 2]
    return pool + [str(path.relative_to(data)) for path in (data / "tmp").rglob("*") if path.is_file()]


def torture(folder: Path, kills: int, *, xet: bool) -> None:
    chance = random.Random(kills + xet)
    processes = Processes(folder, xet=xet)
    try:
        processes.wait_for_progress()
        for _ in range(kills):
            time.sleep(chance.uniform(0, 0.4))
            before = processes.last_acknowledged()
            processes.kill(chance.choice(["server", "client"]))
            history = _newest(processes.url)
            assert history >= before, f"version {before} was acknowledged, the newest commit is {history}"
            processes.wait_for_progress()
        end(processes.client)
        found = versions(processes.url)
        assert found == sorted(found, reverse=True) and found[0] >= processes.last_acknowledged()
    finally:
        processes.stop()
    data = str(folder / "hub")
    collected = mmhub("hub", "gc", "--data", data, "--grace", "0")
    assert collected.returncode == 0, collected.stderr
    assert leftovers(Path(data)) == []
    verified = mmhub("hub", "verify", "--data", data)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    if shutil.which("git"):
        repository = f"{data}/repos/models/local/crash.git"
        checked = subprocess.run(
            ["git", "-C", repository, "fsck", "--full", "--strict"], capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr


def _newest(url: str) -> int:
    """The version `main` has now; every file of it must carry the same."""
    from huggingface_hub import HfApi

    title: Any = HfApi(endpoint=url, token=False).list_repo_commits("local/crash")[0].title
    return int(title.split()[-1]) if title.startswith("version") else 0


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_few_kills_leave_only_whole_commits(tmp_path: Path, xet: bool) -> None:
    torture(tmp_path, QUICK, xet=xet)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_many_kills_leave_only_whole_commits(tmp_path: Path, xet: bool) -> None:
    torture(tmp_path, LONG // 2, xet=xet)
