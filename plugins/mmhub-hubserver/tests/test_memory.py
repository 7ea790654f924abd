"""The server's memory does not depend on the size of files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 100_000  # kB
PUSH_AND_PULL = """
import sys
from huggingface_hub import HfApi
hub = HfApi(endpoint=sys.argv[1], token=False)
hub.create_repo("team/model")
hub.upload_file(path_or_fileobj=sys.argv[2], path_in_repo="w.bin", repo_id="team/model")
print(hub.hf_hub_download("team/model", "w.bin", local_dir=sys.argv[3]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    command = [sys.executable, "-m", "mmhub", "hub", "serve", "--data", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        greeting = next(line for line in process.stderr if "http://" in line)
        yield process.pid, re.findall(r"http://\S+", greeting)[0]
        process.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_gigabyte_goes_through_a_small_server(server: tuple[int, str], tmp_path: Path, xet: bool) -> None:
    pid, url = server
    big = tmp_path / "big.bin"
    with open(big, "wb") as file:
        for _ in range(1 << 10):
            file.write(os.urandom(1 << 20))
    settings = {"HF_HUB_DISABLE_XET": "" if xet else "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", PUSH_AND_PULL, url, str(big), str(tmp_path / "out")]
    got = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert subprocess.run(["cmp", str(big), got.strip()], check=False).returncode == 0
    peak = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    print(f"peak of the server, {'xet' if xet else 'lfs'}: {int(peak[0]) // 1000} MB")
    assert int(peak[0]) < LIMIT
