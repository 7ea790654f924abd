"""No checkpoint folder of a stranger runs code, reaches out of its place, hangs, or takes all memory.

The folders come from `tests.hostile_folders`. All of them are loaded by processes of their own in the slow test; what
is quick is loaded in this one by the others.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmhub import compose
from mmhub.cli.main import main
from mmhub.errors import ExitCode, MmhubError, TrustError
from mmhub.hub.pull import load
from mmhub.reading import parse_json, read_plain
from mmhub.weights import Amount, check_sizes, few_modules
from tests import hostile_folders as hostile

# Those that only the tokenizer or a conversation meets, and those that take more than a moment to make or to refuse.
_LATER = {
    *hostile.FAULTS["chat"],
    *("a tokenizer of 300 MB", "a tokenizer with 1,000,000 merges", "99,000 empty tensors", "200,000 tensors"),
    *("zeros compressed, as the tokenizer", "zeros in an archive, as the weights", "a million requirements"),
    *("a pickle as the tokenizer", "a link to a system file as the tokenizer", "a link out of the folder"),
    *("weights as the tokenizer", "a tokenizer whose pattern runs away", "a tokenizer with more words than it says"),
    *(
        *hostile.GROWING,
        "a million labels",
        "a million components",
        "a header above the limit",
        "3,000,000 layers",
        "3,000,000 blocks",
    ),
    *("adapters in a circle", "3,000,000 layers of BERT", "a library's 3,000,000 layers"),
}
QUICK = [name for faults in hostile.FAULTS.values() for name in faults if name not in _LATER]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, hostile.Folder]:
    return hostile.hostile_folders(base, QUICK)


def test_hostile_folders_are_refused_in_a_moment_and_leave_nothing_behind(
    folders: dict[str, hostile.Folder], base: Path
) -> None:
    assert len(folders) > 100 and len(folders) == len(QUICK)
    before, wrong = hostile.snapshot(base), []
    for name, folder in folders.items():
        begun = time.thread_time()
        try:
            load(folder.path)
            wrong.append(f"{name}: it loads")
        except MmhubError as error:
            if error.exit_code not in folder.codes or not str(error).isprintable():
                wrong.append(f"{name}: exit {error.exit_code}: {error!r}")
        except Exception as error:
            wrong.append(f"{name}: {error!r}")
        if time.thread_time() - begun > 1:
            wrong.append(f"{name}: it takes {time.thread_time() - begun:.1f} s")
    assert not wrong, "\n".join(wrong)
    assert hostile.snapshot(base) == before


def test_the_folders_they_are_copies_of_load(folders: dict[str, hostile.Folder], base: Path) -> None:
    assert folders
    for sound in hostile.sound_of(base).values():
        load(sound.path)


def test_the_command_line_says_it_in_one_line(
    folders: dict[str, hostile.Folder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders["weights above the folder"]
    with pytest.raises(SystemExit) as left:
        main(folder.arguments)
    output = capsys.readouterr()
    assert left.value.code == ExitCode.TRUST
    assert output.out == ""
    assert output.err.splitlines() == [
        f"error: '{folder.path}/config.json' lists the file '../secret.json', which no checkpoint may hold",
        "hint: fetch the checkpoint again",
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_hostile_folder_runs_code_reaches_out_hangs_or_takes_all_memory(tmp_path: Path) -> None:
    """Time is that of computing, for the machine may do other work; by the clock, it may take a while more."""
    base, cache = tmp_path / "folders", tmp_path / "cache"
    base.mkdir()
    found = hostile.hostile_folders(base)
    sound = [hostile.least(folder, cache) for folder in hostile.sound_of(base).values()]
    seconds, megabytes = max(one.busy for one in sound), max(one.megabytes for one in sound)
    waited = max(one.seconds for one in sound)
    before, wrong = hostile.snapshot(base), []
    for name, folder in found.items():
        one = hostile.observe(folder.arguments, cwd=base, cache=cache, stdin=folder.stdin)
        problems = one.problems(folder.codes)
        problems += [f"{one.busy - seconds:.1f} s more"] if one.busy > seconds + hostile.SECONDS else []
        problems += [f"{one.seconds - waited:.1f} s more by the clock"] if one.seconds > waited + hostile.WAIT else []
        problems += [f"{one.megabytes - megabytes:.0f} MB more"] if one.megabytes > megabytes + 500 else []
        problems += ["files changed"] if hostile.snapshot(base) != before else []
        wrong += [f"{name}: {'; '.join(problems)}: {one.stderr[-300:]}"] if problems else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["models", "show"], ["push", "--dry-run"], ["pull"]])
def test_other_commands_neither_run_nor_hang_on_them(
    folders: dict[str, hostile.Folder], base: Path, tmp_path: Path, command: list[str]
) -> None:
    """They may describe what they need not load, and so may end well; an unexpected error they may not meet."""
    before, wrong = hostile.snapshot(base), []
    for name, folder in list(folders.items())[::4]:
        more = ["org/name"] if command[0] == "push" else []
        one = hostile.observe([*command, str(folder.path), *more], cwd=base, cache=tmp_path)
        strange = [word for word in ("unexpected", "Traceback", "FORBIDDEN pickle") if word in one.stderr]
        if one.code not in (0, 2, 3, 4, 5, 6) or strange or hostile.snapshot(base) != before:
            wrong.append(f"{name}: exit {one.code} after {one.seconds:.1f} s: {one.stderr[-300:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mean", ["1000000000.0", "1000000000", "5e7"])
def test_a_regression_of_large_numbers_loads(mean: str, tmp_path: Path) -> None:
    encoder = {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}}
    head = {"use": "regression", "config": {"mean": float(mean), "std": 2e8}}
    folder = compose("regression", encoders={"text": encoder}, decoder=head, texts=["a good thing"]).save(
        tmp_path / "model"
    )
    text = (folder / "config.json").read_text("utf-8")
    assert text.count(f'"mean": {float(mean)}') == 1
    (folder / "config.json").write_text(text.replace(f'"mean": {float(mean)}', f'"mean": {mean}'), "utf-8")
    decoder: Any = load(folder).decoder
    assert decoder.mean == float(mean)


def test_the_letters_nan_in_a_librarys_model_are_no_number(folders: dict[str, hostile.Folder], base: Path) -> None:
    assert folders
    shutil.copytree(base / "layout", base.parent / "nan", dirs_exist_ok=True)
    hostile.change(base.parent / "nan", lambda table: table.update(_name_or_path="org/NaNo"))
    load(base.parent / "nan")


# -- what refuses them ------------------------------------------------------------------------------------------


def test_a_payload_would_leave_its_canary(tmp_path: Path) -> None:
    """The payloads work: else that no canary is found would say nothing."""
    import pickle

    folder = tmp_path / "folder"
    pickle.loads(hostile.payload(folder))
    assert (tmp_path / hostile.CANARY).is_dir()


def test_code_in_a_folder_would_leave_its_canary(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    hostile.write_code(tmp_path / "folder", "evil")
    exec((tmp_path / "folder" / "evil.py").read_text(), {})
    assert (tmp_path / hostile.CANARY).is_dir()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("pass", ""),
        ("open(inside, 'w')", ""),
        ("import subprocess; subprocess.run(['/bin/true'])", "FORBIDDEN subprocess.Popen"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "FORBIDDEN os.posix_spawn"),
        ("import os; os.fork()", "FORBIDDEN os.fork"),
        ("import os; os.spawnv(os.P_WAIT, '/bin/true', ['true'])", "FORBIDDEN os."),
        ("open(outside, 'a')", "FORBIDDEN open"),
        ("import os; os.open(outside, os.O_CREAT | os.O_WRONLY)", "FORBIDDEN open"),
        ("import os; os.mkdir(outside)", "FORBIDDEN os.mkdir"),
        ("import os; open(inside, 'w'); os.rename(inside, outside)", "FORBIDDEN os.rename"),
        ("import os; os.symlink('/', outside)", "FORBIDDEN os.symlink"),
        ("import os; os.remove(outside)", "FORBIDDEN os.remove"),
        ("import os; os.mkdir('x', dir_fd=os.open(os.path.dirname(outside), os.O_RDONLY))", "FORBIDDEN os.mkdir"),
    ],
)
def test_who_watches_sees_programs_and_writes_elsewhere(code: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    inside, outside = str(tmp_path / "cache" / "file"), str(tmp_path / "file")
    whole = f"{hostile.WATCH}\ninside, outside = {inside!r}, {outside!r}\n{code}\nprint('ended')"
    command = [sys.executable, "-S", "-c", whole, str(tmp_path / "cache" / "peak")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert ("ended" in done.stdout) == (not says), done.stderr
    assert done.stderr.startswith(says) and done.returncode == (99 if says else 0)
    assert not Path(outside).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -1e999}', "-1e999 is too large"),
        (b"[" * 100_000, "nested too deeply"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300 digits"),
    ],
)
def test_json_that_is_not_sure_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(content)


def test_a_file_is_read_only_if_it_is_one_and_small(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    with pytest.raises(TrustError, match=r"has 5 bytes, more than the 4 it may"):
        read_plain(path, 4)
    with pytest.raises(TrustError, match="is no plain file"):
        read_plain(tmp_path, 4)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "other", 4)


def test_a_model_may_have_more_modules_than_tensors_but_not_any_number() -> None:
    from torch import nn

    with few_modules(7):  # a linear layer is a module, and names its weight and its bias
        nn.Linear(2, 2)
        nn.Linear(2, 2)
    with pytest.raises(TrustError, match="more than 7 layers and weights"), few_modules(7):
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(1000)))
    nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))


def test_a_size_may_be_as_large_as_the_weights_or_a_small_table() -> None:
    large = 2**25
    check_sizes({"dim": large, "layers": [{"theta": 10**12, "max_length": 10**9}]}, Amount(1, 1), "it")
    check_sizes({"dim": large + 1}, Amount(1, large + 1), "it")
    check_sizes({"mean": 10**9, "target_std": 1e9}, Amount(1, 1), "it")
    with pytest.raises(TrustError, match=r"it: window_ms is 1000000000\.0"):  # no number of layers, and yet a size
        check_sizes({"window_ms": 1e9}, Amount(1, 5), "it")
    with pytest.raises(TrustError, match="it: mean_dim is 1000000000"):
        check_sizes({"mean_dim": 10**9}, Amount(1, 5), "it")
    with pytest.raises(TrustError, match="it: dim is 33554433, and all its weights are 5 bytes"):
        check_sizes({"a": [{"dim": large + 1}]}, Amount(1, 5), "it")
    with pytest.raises(TrustError, match="dim is 1000000"):
        check_sizes({"dim": 10**400}, Amount(1, 5), "it")
