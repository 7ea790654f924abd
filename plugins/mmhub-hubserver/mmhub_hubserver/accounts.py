"""Who may use a hub: names, roles and organizations, kept with hashed tokens in one file of the data folder.

The file is read again when it changed on disk, so `mmhub hub user add` works while the server runs. What an account may
do with which repository is left to `routes`.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import string
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mmhub_hubserver import names
from mmhub_hubserver.errors import Conflict, Invalid, StoreUnusable
from mmhub_hubserver.sessions import Sessions

Role = Literal["read", "write"]
_TOKEN = re.compile(r"[!-~]{16,256}")  # what fits an Authorization header, and is too long to guess
_ALPHABET = string.ascii_letters + string.digits
_SCHEMA = 1


@dataclass(frozen=True)
class Account:
    name: str
    role: Role
    orgs: tuple[str, ...] = ()
    fullname: str = ""
    email: str = ""

    def belongs_to(self, namespace: str) -> bool:
        """Say whether repositories under `namespace` are this account's own or one of its organizations'."""
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class Org:
    name: str
    fullname: str
    private_default: bool = False  # new repositories are private unless the client says otherwise


@dataclass(frozen=True)
class _Book:
    """What the file says: every account with the sha256 of its token, and every organization."""

    accounts: tuple[tuple[Account, str], ...]
    orgs: Mapping[str, Org]


_EMPTY = _Book((), {})


class Accounts:
    """The accounts in `path`, which need not exist. True if there is any, or if they are `required`.

    `required` is for a hub that others can reach: it then stays closed even when the last account is removed.

    Every use raises `StoreUnusable` if the file cannot be read: a hub with a damaged file must not become open.
    """

    def __init__(self, path: str | Path, *, required: bool = False) -> None:
        self.path, self.required = Path(path), required
        self.sessions = Sessions()
        self._cached: tuple[tuple[int, ...] | None, _Book] = (None, _EMPTY)

    def __bool__(self) -> bool:
        return self.required or bool(self._book().accounts)

    def list(self) -> list[Account]:
        return [account for account, _ in self._book().accounts]

    def org(self, slug: str) -> Org | None:
        return self._book().orgs.get(slug)

    def authenticate(self, token: str) -> Account | None:
        """Return whose token this is. Takes as long for a wrong token as for any right one."""
        digest, found = _digest(token), None
        for account, known in self._book().accounts:
            if hmac.compare_digest(known, digest):
                found = account
        return found

    def add(
        self,
        name: str,
        *,
        token: str | None = None,
        role: Role = "write",
        orgs: Collection[str] = (),
        fullname: str = "",
        email: str = "",
        org_names: Mapping[str, str] | None = None,
        private_orgs: Collection[str] = (),
    ) -> str:
        """Add an account and return its token, a new one unless given. Organizations come into being by a member.

        Args:
            org_names: display names of organizations by their name.
            private_orgs: those whose new repositories are private by default.

        Raises:
            Invalid: a name, the token or the role is not acceptable.
            Conflict: the name is taken, or the token belongs to another account.
        """
        if role not in get_args(Role):
            raise Invalid(f"{role!r} is not a role: expected one of {', '.join(get_args(Role))}.")
        orgs = tuple(dict.fromkeys(orgs))
        for text in (name, *orgs):
            _check_name(text)
        token = _checked_token(token)
        account = Account(name, role, orgs, fullname, email)
        with self._changing() as book:
            _check_free(book, account)
            known = dict(book.orgs)
            for slug in orgs:
                old = known.get(slug, Org(slug, slug))
                shown = (org_names or {}).get(slug, old.fullname)
                known[slug] = Org(slug, shown, old.private_default or slug in private_orgs)
            self._write(_Book((*_without_token(book, token), (account, _digest(token))), known))
        return token

    def renew(self, name: str, token: str | None = None) -> str:
        """Replace an account's token, the old one stops working at once; return the new one."""
        token = _checked_token(token)
        with self._changing() as book:
            _find(book, name)
            renewed = tuple(
                (account, _digest(token) if account.name == name else known)
                for account, known in _without_token(book, token, but=name)
            )
            self._write(_Book(renewed, book.orgs))
        return token

    def remove(self, name: str) -> None:
        """Remove an account; its repositories stay. An organization goes with its last member."""
        with self._changing() as book:
            _find(book, name)
            rest = tuple(pair for pair in book.accounts if pair[0].name != name)
            used = {slug for account, _ in rest for slug in account.orgs}
            self._write(_Book(rest, {slug: org for slug, org in book.orgs.items() if slug in used}))

    def _book(self) -> _Book:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return _EMPTY
        except OSError as error:
            raise StoreUnusable(f"Cannot read the accounts in {self.path}: {error.strerror}.") from None
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
        if self._cached[0] != stamp:
            self._cached = (stamp, _parse(self.path))  # one assignment: threads see the old pair or the new one
        return self._cached[1]

    @contextmanager
    def _changing(self) -> Iterator[_Book]:
        """Hold the file against other writers, also of other processes."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._book()

    def _write(self, book: _Book) -> None:
        users = [{**asdict(account), "token_sha256": digest} for account, digest in book.accounts]
        data = {"schema": _SCHEMA, "users": users, "orgs": [asdict(org) for org in book.orgs.values()]}
        staged = self.path.with_suffix(".new")
        staged.unlink(missing_ok=True)
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(handle)
        os.replace(staged, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _parse(path: Path) -> _Book:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        if data["schema"] != _SCHEMA:
            raise StoreUnusable(f"{path} has layout {data['schema']!r}; this version reads {_SCHEMA}. Upgrade mmhub.")
        accounts = []
        for user in data["users"]:
            digest = bytes.fromhex(user.pop("token_sha256")).hex()
            accounts.append((Account(**{**user, "orgs": tuple(user["orgs"])}), digest))
        return _Book(tuple(accounts), {org["name"]: Org(**org) for org in data["orgs"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreUnusable(f"Cannot read the accounts in {path}: {error}. Restore the file from a backup.") from None


def _check_name(name: str) -> None:
    """Refuse what could not be the first part of a repo id."""
    try:
        names.check_repo_id(f"{name}/x")
    except Invalid:
        raise Invalid(f"{name!r} is not a name: expected letters, digits, '-', '_' and '.', none reserved.") from None


def _check_free(book: _Book, new: Account) -> None:
    """Refuse a name that is taken; names that differ only in case would be taken for each other."""
    users = {account.name.lower() for account, _ in book.accounts}
    orgs = {slug.lower(): slug for slug in book.orgs}
    if new.name.lower() in users:
        raise Conflict(f"There is already an account '{new.name}'.")
    if new.name.lower() in orgs or new.name.lower() in map(str.lower, new.orgs):
        raise Conflict(f"'{new.name}' is the name of an organization.")
    for slug in new.orgs:
        if slug.lower() in users:
            raise Conflict(f"'{slug}' is the name of an account.")
        if orgs.get(slug.lower(), slug) != slug:
            raise Conflict(f"There is already an organization '{orgs[slug.lower()]}'.")


def _without_token(book: _Book, token: str, but: str | None = None) -> tuple[tuple[Account, str], ...]:
    """Return the accounts, after making sure that none (`but` one) has this token."""
    if any(known == _digest(token) and account.name != but for account, known in book.accounts):
        raise Conflict("Another account has this token.")
    return book.accounts


def _find(book: _Book, name: str) -> Account:
    for account, _ in book.accounts:
        if account.name == name:
            return account
    raise Invalid(f"There is no account '{name}'.")


def _checked_token(token: str | None) -> str:
    if token is None:
        return "hf_" + "".join(secrets.choice(_ALPHABET) for _ in range(34))  # clients look for this prefix
    if not _TOKEN.fullmatch(token):
        raise Invalid("A token has 16 to 256 ASCII letters, digits or signs, and no space.")
    return token


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
