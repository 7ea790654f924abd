"""Accounts: who is let in, what is refused, and what the file gives away."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from mmhub_hubserver.accounts import Account, Accounts, Org
from mmhub_hubserver.errors import Conflict, HubError, Invalid, StoreUnusable

TOKEN = "hf_" + "a" * 34


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "accounts.json"


def test_no_file_means_no_accounts(path: Path) -> None:
    accounts = Accounts(path)
    assert not accounts
    assert accounts.list() == []
    assert accounts.authenticate(TOKEN) is None


def test_required_accounts_stay_in_force_when_there_are_none(path: Path) -> None:
    assert Accounts(path, required=True)


def test_the_token_given_out_names_the_account(path: Path) -> None:
    accounts = Accounts(path)
    token = accounts.add("ann", orgs=["lab"], role="read", fullname="Ann", email="ann@lab.example")
    assert token.startswith("hf_") and len(token) == 37
    assert accounts
    assert accounts.authenticate(token) == Account("ann", "read", ("lab",), "Ann", "ann@lab.example")


@pytest.mark.parametrize("wrong", ["", "hf_", TOKEN[:-1], TOKEN + "a", TOKEN.upper(), "ä" * 20, "\udcff"])
def test_another_token_names_nobody(path: Path, wrong: str) -> None:
    accounts = Accounts(path)
    accounts.add("ann", token=TOKEN)
    assert accounts.authenticate(wrong) is None


def test_an_account_belongs_to_its_own_and_its_organizations_namespace() -> None:
    ann = Account("ann", "write", ("lab",))
    assert ann.belongs_to("ann") and ann.belongs_to("lab")
    assert not ann.belongs_to("bob") and not ann.belongs_to("")


def test_the_file_has_no_token_and_is_for_its_owner_alone(path: Path) -> None:
    token = Accounts(path).add("ann")
    assert token not in path.read_text() and token[3:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == ["accounts.json", "accounts.lock"]


def test_an_account_added_by_another_process_is_seen_at_once(path: Path) -> None:
    running = Accounts(path)
    assert not running
    Accounts(path).add("ann", token=TOKEN)
    assert running.authenticate(TOKEN) is not None
    Accounts(path).remove("ann")
    assert running.authenticate(TOKEN) is None


def test_a_renewed_token_replaces_the_old_one(path: Path) -> None:
    accounts = Accounts(path)
    accounts.add("ann", token=TOKEN, orgs=["lab"])
    new = accounts.renew("ann")
    assert accounts.authenticate(TOKEN) is None
    assert accounts.authenticate(new) == Account("ann", "write", ("lab",))
    assert accounts.renew("ann", new) == new


def test_organizations_have_display_names_and_go_with_their_last_member(path: Path) -> None:
    accounts = Accounts(path)
    accounts.add("ann", orgs=["lab", "lab"], org_names={"lab": "The Lab"}, private_orgs=["lab"])
    accounts.add("bob", orgs=["lab", "team"])
    assert accounts.org("lab") == Org("lab", "The Lab", private_default=True)
    assert accounts.org("team") == Org("team", "team")
    assert accounts.list()[0].orgs == ("lab",)
    accounts.remove("ann")
    assert accounts.org("lab") == Org("lab", "The Lab", private_default=True)
    accounts.remove("bob")
    assert accounts.org("lab") is None and accounts.org("team") is None


@pytest.mark.parametrize(
    "name", ["", "api", "datasets", "a/b", "a b", "..", "-a", "a--b", "x" * 97, "Ünal", "a\n", "a.git/../b"]
)
def test_a_name_that_no_repository_can_have_is_refused(path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="is not a name"):
        Accounts(path).add(name)
    with pytest.raises(Invalid, match="is not a name"):
        Accounts(path).add("ann", orgs=[name])
    assert not path.exists()


@pytest.mark.parametrize("token", ["", "short", "with space " * 3, "x" * 257, "é" * 20, "line\n" * 5])
def test_a_weak_or_unusable_token_is_refused(path: Path, token: str) -> None:
    with pytest.raises(Invalid, match="16 to 256"):
        Accounts(path).add("ann", token=token)


def test_an_unknown_role_is_refused(path: Path) -> None:
    with pytest.raises(Invalid, match="'admin' is not a role: expected one of read, write"):
        Accounts(path).add("ann", role="admin")  # type: ignore[arg-type]


def test_names_and_tokens_are_given_once(path: Path) -> None:
    accounts = Accounts(path)
    accounts.add("ann", token=TOKEN, orgs=["lab"])
    accounts.add("bob")
    for name, orgs in (("ann", []), ("Ann", []), ("lab", []), ("LAB", []), ("eve", ["ann"]), ("eve", ["Lab"])):
        with pytest.raises(Conflict):
            accounts.add(name, orgs=orgs)
    with pytest.raises(Conflict):
        accounts.add("same", orgs=["same"])
    with pytest.raises(Conflict, match="Another account has this token"):
        accounts.add("eve", token=TOKEN)
    with pytest.raises(Conflict, match="Another account has this token"):
        accounts.renew("bob", TOKEN)
    assert [account.name for account in accounts.list()] == ["ann", "bob"]


def test_an_unknown_account_is_named(path: Path) -> None:
    with pytest.raises(Invalid, match="There is no account 'ann'"):
        Accounts(path).remove("ann")
    with pytest.raises(Invalid, match="There is no account 'ann'"):
        Accounts(path).renew("ann")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"schema": 1}',
        '{"schema": 2, "users": [], "orgs": []}',
        '{"schema": 1, "users": [{"name": "a"}], "orgs": []}',
        '{"schema": 1, "users": [{"name": "a", "token_sha256": "zz", "orgs": [], "role": "read"}], "orgs": []}',
        '{"schema": 1, "users": [1], "orgs": []}',
    ],
)
def test_a_damaged_file_closes_the_hub_instead_of_opening_it(path: Path, content: str) -> None:
    accounts = Accounts(path)
    accounts.add("ann", token=TOKEN)
    path.write_text(content)
    for use in (lambda: bool(accounts), lambda: accounts.authenticate(TOKEN), lambda: accounts.add("bob")):
        with pytest.raises(StoreUnusable, match=r"accounts\.json"):
            use()
    assert path.read_text() == content


def test_accounts_added_at_the_same_time_are_all_kept(path: Path) -> None:
    threads = [threading.Thread(target=Accounts(path).add, args=(f"user{number}",)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.name for a in Accounts(path).list()) == sorted(f"user{number}" for number in range(20))


def test_a_crash_while_writing_leaves_the_old_accounts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts(path)
    accounts.add("ann", token=TOKEN)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            accounts.add("bob")
    assert [account.name for account in accounts.list()] == ["ann"]
    accounts.add("bob")
    assert len(json.loads(path.read_text())["users"]) == 2


def test_an_account_error_is_a_refusal_of_the_hub() -> None:
    assert issubclass(StoreUnusable, HubError) and StoreUnusable("x").status == 500
