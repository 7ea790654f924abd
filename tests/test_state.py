"""Training checkpoints: what is saved comes back bit by bit, in any layout, whatever happens to disk and process."""

from __future__ import annotations

import copy
import gc
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmhub.build import compose
from mmhub.engine import state as state_module
from mmhub.engine import tensors as tensors_module
from mmhub.engine.ranks import Ranks
from mmhub.engine.state import Checkpoints, Position, step_name
from mmhub.engine.tensors import Copied, Stored, _read_box, _state_like, parameter_names
from mmhub.errors import MmhubError, TrustError
from mmhub.model import Model
from mmhub.weights import named_tensors
from tests.conftest import three_modalities


def small_model(seed: int = 0) -> Model:
    """A text classifier; its three classes are too few rows for four processes."""
    torch.manual_seed(seed)
    return compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 6, "embedding_dim": 4}}},
        fusion={"use": "concat"},
        decoder={"use": "classification", "config": {"labels": ["no", "maybe", "yes"]}},
        texts=["a good thing", "bad"],
    )


def adamw(model: Model, **options: Any) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2, **options)


def update(model: Model, optimizer: Any, step: int) -> None:
    """One optimizer step with gradients that depend on names and the step alone."""
    names = parameter_names(model)
    for parameter in model.parameters():
        draw = torch.Generator().manual_seed(1000 * step + sum(names[id(parameter)].encode()))
        gradient = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        parameter.grad = like(parameter, gradient.to(parameter.device))
    optimizer.step()


def like(parameter: Any, whole: Tensor) -> Tensor:
    if not hasattr(parameter, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def trained(steps: int) -> tuple[Model, torch.optim.Optimizer]:
    model = small_model()
    optimizer = adamw(model)
    for step in range(1, steps + 1):
        update(model, optimizer, step)
    return model, optimizer


def everything(model: Model, optimizer: Any) -> dict[str, Any]:
    """All tensors and numbers by name."""
    names = parameter_names(model)
    found: dict[str, Any] = {name: t.detach().clone() for name, t in named_tensors(model.parts())[0].items()}
    for parameter, values in optimizer.state.items():
        found |= {f"{key} of {names[id(parameter)]}": copy.deepcopy(value) for key, value in values.items()}
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype, name
            assert value.device == other[name].device, name
            assert torch.equal(value, other[name]), name
        else:
            assert type(value) is type(other[name]), name
            assert value == other[name], name


def resumed(checkpoints: Checkpoints, optimizer: Callable[[Model], Any] = adamw) -> tuple[Model, Any, Position]:
    path = checkpoints.newest(pytest.fail)
    assert path is not None
    model = checkpoints.load_model(path)
    made = optimizer(model)
    checkpoints.load_tensors(path, model, made)
    return model, made, checkpoints.load_position(path)


# -- there and back ---------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    position = Position(step=2, best=0.5, stream={"shard": 3, "rows": [1, 2]}, pieces=4, fingerprint="ab")
    Checkpoints(tmp_path, 2).save(model, optimizer, position, wait=True)
    again, restored, where = resumed(Checkpoints(tmp_path, 2))
    assert where == position
    assert_same(everything(again, restored), everything(model, optimizer))
    for one in ((model, optimizer), (again, restored)):
        update(*one, 3)
    assert_same(everything(again, restored), everything(model, optimizer))


OPTIMIZERS: dict[str, Callable[[Model], Any]] = {
    "fused": lambda model: adamw(model, fused=True),
    "amsgrad": lambda model: adamw(model, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "none": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "other shapes": lambda model: torch.optim.Adafactor(model.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch_is_restored(tmp_path: Path, name: str) -> None:
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    update(model, optimizer, 1)
    Checkpoints(tmp_path, 2).save(model, optimizer, Position(step=1), wait=True)
    again, restored, _ = resumed(Checkpoints(tmp_path, 2), OPTIMIZERS[name])
    assert_same(everything(again, restored), everything(model, optimizer))
    update(again, restored, 2)
    update(model, optimizer, 2)
    assert_same(everything(again, restored), everything(model, optimizer))


class Odd(torch.optim.SGD):
    """Keeps numbers, other types and other layouts, as optimizers may."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                count = self.state[parameter].get("count", 0) + 1
                master = parameter.detach().double() * count
                self.state[parameter] = {"count": count, "seen": True, "master": master, "mean": master.mean()}
                parameter.data.mul_(0.5)


def test_numbers_scalars_and_other_types_in_the_state_come_back_as_they_were(tmp_path: Path) -> None:
    model = small_model().to(torch.bfloat16)
    model.decoder.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1), wait=True)
    again = small_model(1).to(torch.bfloat16)
    again.decoder.scale = nn.Parameter(torch.tensor(0.0, dtype=torch.bfloat16))
    restored = Odd(again.parameters(), lr=0.1)
    path = checkpoints.newest(pytest.fail)
    assert path is not None
    checkpoints.load_tensors(path, again, restored)
    assert_same(everything(again, restored), everything(model, optimizer))


@pytest.mark.parametrize(
    ("options", "device"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")]
)
def test_steps_are_counted_where_the_optimizer_wants_them(options: dict[str, bool], device: str) -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))  # any device but the CPU
    count = Stored([], torch.float32, [([], torch.tensor(3.0))])
    assert _state_like(parameter, count, "step", "", options).device.type == device
    assert _state_like(parameter, count, "scale", "", options).device.type == "meta"


def test_buffers_counters_and_memory_layouts_are_restored(tmp_path: Path) -> None:
    model = three_modalities("a b").to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 7
            module.running_mean += 1.5
    optimizer = adamw(model)
    update(model, optimizer, 1)
    Checkpoints(tmp_path, 2).save(model, optimizer, Position(step=1), wait=True)
    again = three_modalities("a b").to(memory_format=torch.channels_last)
    restored = adamw(again)
    Checkpoints(tmp_path, 2).load_tensors(tmp_path / step_name(1), again, restored)
    assert_same(everything(again, restored), everything(model, optimizer))
    kept = [value["exp_avg"].stride() for value in restored.state.values()]
    assert kept == [value["exp_avg"].stride() for value in optimizer.state.values()]


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = small_model()
    rnn = model.encoders["text"].layers
    rnn.bias_hh_l0 = rnn.bias_ih_l0
    optimizer = adamw(model)
    update(model, optimizer, 1)
    Checkpoints(tmp_path, 2).save(model, optimizer, Position(step=1), wait=True)
    again, restored, _ = resumed(Checkpoints(tmp_path, 2))
    layers = again.encoders["text"].layers
    assert layers.bias_hh_l0 is layers.bias_ih_l0
    assert_same(everything(again, restored), everything(model, optimizer))


def test_the_folder_of_an_unsharded_run_holds_a_model_that_loads(tmp_path: Path) -> None:
    from mmhub.checkpoint import load

    model, optimizer = trained(1)
    Checkpoints(tmp_path, 2).save(model, optimizer, Position(step=1), wait=True)
    loaded = load(tmp_path / "last" / "model")
    assert loaded.predict([{"text": "a good thing"}]) == model.predict([{"text": "a good thing"}])


def test_a_recipe_that_trains_other_tensors_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1), wait=True)
    other = torch.optim.AdamW(list(model.parameters())[1:])
    count = len(list(model.parameters()))
    expected = f"the checkpoint trains {count} tensors, the recipe {count - 1} .*embed.weight.*; use the same recipe"
    with pytest.raises(MmhubError, match=expected):
        checkpoints.load_tensors(tmp_path / step_name(1), model, other)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1), wait=True)
    model.decoder.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(TrustError, match=r"does not fit the model: decoder\.extra is missing"):
        checkpoints.load_tensors(tmp_path / step_name(1), model)
    rnn = model.encoders["text"].layers
    rnn.bias_ih_l0 = nn.Parameter(torch.zeros(5))
    with pytest.raises(TrustError, match=r"layers.bias_ih_l0 has shape \[12\], not \[5\]"):
        checkpoints.load_tensors(tmp_path / step_name(1), model)


# -- in the background ------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until this event is set."""
    event, real = threading.Event(), state_module.check_space

    def check_space(folder: Path, needed: int) -> None:
        assert event.wait(20)
        real(folder, needed)

    monkeypatch.setattr(state_module, "check_space", check_space)
    return event


def test_training_goes_on_while_files_are_written_and_changes_nothing_in_them(
    tmp_path: Path, gate: threading.Event
) -> None:
    model, optimizer = trained(1)
    before = everything(model, optimizer)
    position = Position(step=1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, position)
    assert checkpoints.newest(pytest.fail) is None
    assert checkpoints.saved == 1
    update(model, optimizer, 2)
    position.step = 99
    gate.set()
    checkpoints.wait()
    again, restored, where = resumed(checkpoints)
    assert where.step == 1
    assert_same(everything(again, restored), before)


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1))
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(model, optimizer, Position(step=2))
    assert (tmp_path / step_name(1) / "manifest.json").exists()
    checkpoints.wait()
    assert names(tmp_path) == [step_name(1), step_name(2)]


def names(folder: Path) -> list[str]:
    """What is there besides the links."""
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


@pytest.mark.parametrize("call", ["write_tensors", "write_structure", "write_file", "publish"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1), wait=True)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, call, full)
        checkpoints.save(model, optimizer, Position(step=2))
        with pytest.raises(MmhubError, match=r"cannot write a training checkpoint to '.*': no space left"):
            checkpoints.wait()
        checkpoints.save(model, optimizer, Position(step=2))
        with pytest.raises(MmhubError, match="no space left"):  # the next save says it too
            checkpoints.save(model, optimizer, Position(step=3))
    assert names(tmp_path) == [step_name(1)]
    checkpoints.save(model, optimizer, Position(step=3), wait=True)
    assert names(tmp_path) == [step_name(1), step_name(3)]


def test_a_disk_too_small_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
    with pytest.raises(MmhubError, match=r"no space left on the device \([\d,]+ bytes are needed and 9 are free\)"):
        Checkpoints(tmp_path, 2).save(model, optimizer, Position(step=1), wait=True)
    assert names(tmp_path) == []


def test_closing_finishes_the_save_and_only_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(step=1))
    checkpoints.close()
    assert names(tmp_path) == [step_name(1)]
    monkeypatch.setattr(state_module, "publish", lambda *paths: (tmp_path / "no" / "where").touch())
    checkpoints.save(model, optimizer, Position(step=2))
    checkpoints.close()
    assert "warning: cannot write a training checkpoint" in capsys.readouterr().err


# -- on disk ----------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_links_lead_to_the_last_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        checkpoints.save(model, optimizer, Position(step=step, best_step=best), wait=True)
        assert names(tmp_path) == [step_name(n) for n in range(max(1, step - 1), step + 1)]
        assert os.readlink(tmp_path / "last") == step_name(step)
        assert (tmp_path / "best").exists() == (tmp_path / "best").is_symlink() == (step != 3)
    assert os.readlink(tmp_path / "best") == step_name(4)


def test_what_killed_processes_left_is_swept_by_the_next_save(tmp_path: Path) -> None:
    for name in (".step-00000007.123.tmp", ".step-00000003.old.tmp"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.newest(pytest.fail) is None
    checkpoints.save(*trained(1), Position(step=1), wait=True)
    assert names(tmp_path) == ["notes.txt", step_name(1)]


def test_the_newest_is_so_by_its_step_not_its_time(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 9)
    for step in (9, 10, 100_000_000):
        checkpoints.save(*trained(1), Position(step=step), wait=True)
    os.utime(tmp_path / step_name(100_000_000), (1, 1))
    assert checkpoints.newest(pytest.fail) == tmp_path / "step-100000000"


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    flips = {"flip first": 0, "flip middle": middle, "flip last": len(content) - 1}
    path.unlink()
    if kind in flips:
        at = flips[kind]
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "link":
        path.symlink_to(shutil.copy2("/dev/null", path.with_name("elsewhere")))
    elif kind == "link to the same":
        path.with_name("elsewhere").write_bytes(content)
        path.symlink_to("elsewhere")
    elif kind == "folder":
        path.mkdir()
    elif kind != "delete":
        path.write_bytes(
            {"empty": b"", "half": content[:middle], "zeros": bytes(len(content))}.get(kind, content + b"x")
        )


KINDS = ("flip first", "flip middle", "flip last", "link", "link to the same", "folder", "delete")
KINDS += ("empty", "half", "zeros", "append")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        Checkpoints(folder, 2).save(*trained(step), Position(step=step), wait=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_happens_to_a_file_the_checkpoint_before_is_taken(pair: Path, tmp_path: Path, kind: str) -> None:
    files = sorted(path.relative_to(pair / step_name(2)) for path in (pair / step_name(2)).rglob("*.*"))
    assert {path.name for path in files} >= {"manifest.json", "state.json", "state.safetensors", "model.safetensors"}
    for name in files:
        folder = tmp_path / name.name
        shutil.copytree(pair, folder, symlinks=True)
        spoil(folder / step_name(2) / name, kind)
        said: list[str] = []
        assert Checkpoints(folder, 2).newest(said.append) == folder / step_name(1), name
        assert len(said) == 1
        assert re.fullmatch(r"checkpoint step-00000002 is damaged \(.+\); trying the one before", said[0])
        assert str(name) in said[0] or name.name == "manifest.json", "another's hash in it may have changed"
        assert ("link" not in kind and kind != "folder") or f"{name} is no file" in said[0]
        assert (folder / step_name(2)).is_dir(), "it is evidence"


@pytest.mark.parametrize("content", ["{}", "[]", '{"format":2,"files":{}}', '{"format":2}', "nul", "{" * 100_000])
def test_a_manifest_that_lists_nothing_is_no_valid_one(pair: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(pair, tmp_path / "run", symlinks=True)
    (folder / step_name(2) / "manifest.json").write_text(content)
    said: list[str] = []
    assert Checkpoints(folder, 2).newest(said.append) == folder / step_name(1)
    assert "manifest.json" in said[0]


def test_a_checkpoint_of_another_format_is_named_as_such(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "run", symlinks=True)
    (folder / step_name(2) / "manifest.json").write_text('{"format": 9, "files": {}}')
    said: list[str] = []
    assert Checkpoints(folder, 2).newest(said.append) == folder / step_name(1)
    assert "has format 9, this version of mmhub reads 2" in said[0]


def test_damaged_checkpoints_do_not_count_among_those_kept(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "run", symlinks=True)
    shutil.move(folder / step_name(2), folder / step_name(5))
    (folder / step_name(5) / "state.json").unlink()
    checkpoints = Checkpoints(folder, 2)
    checkpoints.newest(lambda text: None)
    checkpoints.save(*trained(2), Position(step=2), wait=True)
    assert names(folder) == [step_name(1), step_name(2), step_name(5)]
    checkpoints.save(*trained(5), Position(step=5), wait=True)
    assert names(folder) == [step_name(2), step_name(5)]
    assert checkpoints.newest(pytest.fail) == folder / step_name(5)


def test_when_all_are_damaged_it_says_so_and_touches_nothing(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "run", symlinks=True)
    for step in (1, 2):
        (folder / step_name(step) / "manifest.json").unlink()
    with pytest.raises(TrustError, match="all checkpoints in"):
        Checkpoints(folder, 2).newest(lambda text: None)
    assert names(folder) == [step_name(1), step_name(2)]


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_killed_between_any_two_steps_leaves_whole_checkpoints_only(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change to the disk in turn is the one that does not happen, nor any after it."""
    model, optimizer = trained(1)
    rmtree, unlink = shutil.rmtree, os.unlink
    steps = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink")]
    survived = 0
    for dies_at in range(1, 500):
        folder = tmp_path / str(dies_at)
        count, before = 0, Checkpoints(folder, 1)
        shutil.copytree(pair / step_name(1), folder / step_name(1))
        with monkeypatch.context() as patch:

            def dying(real: Any, dies_at: int = dies_at) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count >= dies_at:
                        for path in list(Path(args[0]).rglob("*.*"))[:1] if real is rmtree else ():
                            unlink(path)
                        raise Killed
                    return real(*args, **options)

                return call

            for owner, name in steps:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                before.save(model, optimizer, Position(step=2), wait=True)
                survived = dies_at
            except (Killed, MmhubError):
                pass
        assert not [path for path in folder.glob("step-*") if state_module._damage(path, 0, 1)], dies_at
        after = Checkpoints(folder, 1)
        found = after.newest(pytest.fail)
        assert found in (folder / step_name(1), folder / step_name(2)), dies_at
        after.save(model, optimizer, Position(step=3), wait=True)
        assert names(folder) == [step_name(3)], dies_at
        shutil.rmtree(folder)
        if survived:
            break
    assert survived > 20


def test_every_file_is_on_disk_before_its_folder_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def on_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def on_rename(old: Any, new: Any) -> None:
        events.append(("rename", f"{old}"))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "rename", on_rename)
    Checkpoints(tmp_path, 2).save(*trained(1), Position(step=1), wait=True)
    (at,) = [i for i, (kind, _) in enumerate(events) if kind == "rename"]
    aside = events[at][1]
    synced = {path for kind, path in events[:at] if kind == "fsync"}
    final = tmp_path / step_name(1)
    assert {f"{aside}/{path.relative_to(final)}" for path in final.rglob("*")} | {aside} <= synced
    assert ("fsync", str(tmp_path)) in events[at:]


# -- several processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [(0, 0), (1, 2), (3, 1), (2, 3)])
def test_any_box_is_read_from_the_pieces_it_overlaps(offset: tuple[int, int]) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    cuts = [([0, 0], whole[:3, :2]), ([0, 2], whole[:3, 2:]), ([3, 0], whole[3:])]
    target = torch.zeros(4 - offset[0], min(3, 6 - offset[1]))
    _read_box(Stored([4, 6], whole.dtype, cuts), target, offset, "x")
    assert torch.equal(target, whole[offset[0] :, offset[1] : offset[1] + 3])
    short = [*cuts[:2], ([3, 0], whole[3:, :3])]
    with pytest.raises(TrustError, match="x is not whole: 21 of 24 numbers are there"):
        _read_box(Stored([4, 6], whole.dtype, short), torch.zeros(4, 6), (0, 0), "x")


class Thread(Ranks):
    """One of several ranks that are threads of this process."""

    meeting: Any = None
    told: Any = None

    def gather(self, data: Any) -> list[Any]:
        self.told[self.rank] = data
        self.meeting.wait(20)
        found = list(self.told)
        self.meeting.wait(20)
        return found


def on_threads(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run `work` as every rank; return what each returned or raised."""
    kind = type("Thread", (Thread,), {"meeting": threading.Barrier(world), "told": [None] * world})
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(kind(rank, world))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_ranks_that_hold_the_same_write_it_once(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path | None:
        model, optimizer = trained(1)
        checkpoints = Checkpoints(tmp_path, 2, ranks)
        checkpoints.save(model, optimizer, Position(step=1), wait=True)
        return checkpoints.newest(pytest.fail)

    assert on_threads(2, work) == [tmp_path / step_name(1)] * 2
    assert not list(tmp_path.rglob("rank-*"))


def test_all_ranks_pass_over_what_one_of_them_finds_damaged(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "run", symlinks=True)
    (folder / step_name(2) / "state.json").write_text("{}")
    said: list[str] = []
    found = on_threads(3, lambda ranks: Checkpoints(folder, 2, ranks).newest(said.append))
    assert found == [folder / step_name(1)] * 3
    assert len(said) == 1


def test_every_device_that_tensors_come_from_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: SimpleNamespace(synchronize=lambda: waited.append(device))
    )
    tensors: Any = [SimpleNamespace(is_cuda=gpu != "cpu", device=gpu) for gpu in ("cuda:0", "cpu", "cuda:1", "cuda:1")]
    tensors_module._await_copies(tensors)
    assert sorted(waited) == ["cuda:0", "cuda:1"]


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(model: Model, optimizer: Any, buffers: Any, **options: Any) -> Copied:
        return Copied({"model/x": torch.ones(2)}, {}, {}, [], {}, sharded=True)

    monkeypatch.setattr(state_module, "copy_tensors", copy)


def test_a_rank_that_cannot_write_fails_them_all_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch)
    real = state_module.write_tensors

    def full(tensors: Any, path: Path) -> None:
        if path.name.startswith("rank-00001"):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state_module, "write_tensors", full)
    model, optimizer = trained(1)
    for error in on_threads(
        2, lambda ranks: Checkpoints(tmp_path, 2, ranks).save(model, optimizer, Position(step=1), wait=True)
    ):
        assert isinstance(error, MmhubError)
        assert "no space left on the device" in error.message
    assert names(tmp_path) == []


def test_where_two_ranks_fail_the_first_ones_own_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch)

    def fail(self: Checkpoints, *args: Any) -> None:
        raise MmhubError(f"reason of {self.ranks.rank}")

    monkeypatch.setattr(Checkpoints, "_write_shard", fail)
    model, optimizer = trained(1)
    errors = on_threads(
        2, lambda ranks: Checkpoints(tmp_path, 2, ranks).save(model, optimizer, Position(step=1), wait=True)
    )
    assert [error.message for error in errors] == ["reason of 0"] * 2


def test_a_rank_that_never_writes_is_named_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch)
    real = Checkpoints._write_shard
    monkeypatch.setattr(Checkpoints, "_write_shard", lambda self, *args: self.ranks.first and real(self, *args))
    model, optimizer = trained(1)
    errors = on_threads(
        2,
        lambda ranks: Checkpoints(tmp_path, 2, ranks, timeout=0.1).save(model, optimizer, Position(step=1), wait=True),
    )
    for error in errors:
        assert "process 1 wrote nothing in 0 s" in error.message
    assert names(tmp_path) == []


def one_of(rank: int, world: int, mode: str, folder: Path) -> None:
    """Resume in `folder` as one of `world` processes, take a step, and save."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder, 99, Ranks(rank, world))
    dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=world)
    path = checkpoints.newest(pytest.fail)
    assert path is not None
    if mode != "ddp":  # "hsdp" shards over two and replicates over the others
        shape = {"copies": world // 2, "pieces": 2} if mode == "hsdp" else {"pieces": world}
        mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
        model = checkpoints.load_model(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # what the pieces hold afterwards was read into them
        fully_shard(model.encoders["text"], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = checkpoints.load_model(path)
    optimizer = adamw(model)
    checkpoints.load_tensors(path, model, optimizer)
    position = checkpoints.load_position(path)
    position.step += 1
    update(model, optimizer, position.step)
    checkpoints.save(model, optimizer, position, wait=True)
    sharded = [t for t in model.parameters() if hasattr(t, "placements")]
    assert len(sharded) == (len(list(model.parameters())) if mode != "ddp" else 0)
    gc.collect()  # a model wrapped for the group must not outlive the group's threads
    dist.destroy_process_group()


def pass_on(folder: Path, mode: str, world: int) -> None:
    """Let `world` processes do one step of the run in `folder`."""
    meeting = folder.with_name(f"{folder.name}.meeting")
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(one_of, (world, mode, folder), nprocs=world)  # type: ignore[no-untyped-call]


def check_chain(folder: Path, *chain: tuple[str, int]) -> None:
    """One step after the other is done by another kind of run, and the end is that of a run in one process."""
    Checkpoints(folder, 99).save(*trained(1), Position(step=1), wait=True)
    for mode, world in chain:
        pass_on(folder, mode, world)
    model, optimizer, position = resumed(Checkpoints(folder, 99))
    assert position.step == 1 + len(chain)
    assert_same(everything(model, optimizer), everything(*trained(position.step)))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded_over_two_and_then_on_one(tmp_path: Path) -> None:
    check_chain(tmp_path / "run", ("fsdp", 2))
    step = tmp_path / "run" / step_name(2)
    assert len(list(step.glob("rank-*-of-00002.safetensors"))) == len(list(step.glob("rank-*.json"))) == 2
    assert not list(step.rglob("model.safetensors")), "weights are written once"


@pytest.mark.slow
def test_a_run_sharded_over_four_goes_on_over_two_three_and_replicated(tmp_path: Path) -> None:
    check_chain(tmp_path / "run", ("fsdp", 4), ("fsdp", 2), ("fsdp", 3), ("ddp", 2), ("fsdp", 2))


@pytest.mark.slow
@pytest.mark.parametrize("last", [("fsdp", 4), ("hsdp", 4), ("ddp", 3)])
def test_a_run_of_many_processes_goes_on_in_one(tmp_path: Path, last: tuple[str, int]) -> None:
    check_chain(tmp_path / "run", ("fsdp", 3), last)


@pytest.mark.gpu
def test_a_checkpoint_of_a_gpu_goes_on_there_and_on_the_cpu(tmp_path: Path) -> None:
    device = torch.device("cuda")
    model = small_model().to(device)
    optimizer = adamw(model, fused=True)
    update(model, optimizer, 1)
    checkpoints = Checkpoints(tmp_path, 2, Ranks(device=device))
    checkpoints.save(model, optimizer, Position(step=1))
    assert all(buffer.is_pinned() for buffer in checkpoints._buffers.values())
    before = everything(model, optimizer)
    update(model, optimizer, 2)
    checkpoints.wait()
    path = checkpoints.newest(pytest.fail)
    assert path is not None
    again = checkpoints.load_model(path).to(device)
    restored = adamw(again, fused=True)
    checkpoints.load_tensors(path, again, restored)
    assert all(value.is_cuda for value in everything(again, restored).values())
    found = everything(again, restored)
    assert all(torch.equal(found[name], value) for name, value in before.items() if not name.startswith("step"))
    update(again, restored, 2)
    assert_same(everything(again, restored), everything(model, optimizer))
    whole, on_cpu, _ = resumed(Checkpoints(tmp_path, 2))
    assert not any(value.is_cuda for value in everything(whole, on_cpu).values())
