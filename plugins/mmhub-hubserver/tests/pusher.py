"""Push numbered versions until killed: `pusher.py URL FILE`; each acknowledged number becomes a line of the file."""

import json
import os
import random
import sys
import time

from huggingface_hub import CommitOperationAdd, HfApi


def main(url: str, acknowledged: str) -> None:
    hub = HfApi(endpoint=url, token=False)
    with open(acknowledged, "r+", encoding="ascii") as log:
        done = [int(line) for line in log.read().split("\n")[:-1]]
        version = 1 + (done[-1] if done else 0)
        while True:
            try:
                hub.create_repo("local/crash", exist_ok=True)
                newest = hub.list_repo_commits("local/crash")[0]
                version = max(version, 1 + int(newest.title.split()[-1]) if newest.title.startswith("version") else 1)
                hub.create_commit(
                    "local/crash",
                    operations(version),
                    commit_message=f"version {version}",
                    parent_commit=newest.commit_id,
                )
            except Exception:
                time.sleep(0.02)
                continue
            log.write(f"{version}\n")
            log.flush()
            os.fsync(log.fileno())


def operations(version: int) -> list[CommitOperationAdd]:
    """Two large files and two small ones that all carry the version."""
    small = json.dumps({"version": version}).encode()
    contents = {"config.json": small, "card.md": small}
    for name in ("weights.safetensors", "part.safetensors"):
        noise = random.Random(f"{name}{version}").randbytes(50_000 + version % 7 * 20_000)
        contents[name] = f"{version}\n".encode() + noise
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


if __name__ == "__main__":
    main(*sys.argv[1:])
