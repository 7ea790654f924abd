"""Who is asking, and what they may do: the one place where accounts and repositories meet.

Without accounts everybody who can reach the hub (this machine only) is the user "local" and may do everything. With
accounts, a namespace belongs to the account or organization of that name: its members see its private repositories and,
with a token of role "write", change what is there. Everybody else sees what is public.
"""

import base64
import binascii

from mmhub_hubserver.accounts import Account, Accounts
from mmhub_hubserver.errors import Forbidden, Gated, GatedLogin, RepoHidden, RepoNotFound, Unauthorized
from mmhub_hubserver.store import Repo

LOCAL = Account("local", "write", fullname="Local user")
NOT_FOUND = "Repository not found"  # also for what is private: the same words, so that nothing is given away


class Access:
    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts

    def account(self, authorization: str | None) -> Account | None:
        """Return whose `Authorization` header this is, None for nobody's.

        Raises:
            Unauthorized: the header has no valid token.
        """
        if not self.accounts:
            return LOCAL
        if authorization is None:
            return None
        found = self.accounts.authenticate(_token(authorization))
        if found is None:
            raise Unauthorized("Invalid credentials in Authorization header")
        return found

    def member(self, account: Account | None, namespace: str) -> bool:
        if not self.accounts:
            return True
        return account is not None and account.belongs_to(namespace)

    def sees(self, account: Account | None, repo: Repo) -> bool:
        return not repo.meta["private"] or self.member(account, _namespace(repo))

    def writes(self, account: Account | None, repo: Repo) -> bool:
        return account is not None and account.role == "write" and self.member(account, _namespace(repo))

    def reads(self, account: Account | None, repo: Repo) -> bool:
        """Say whether the account may have the contents of a repository that it sees."""
        meta = repo.meta
        if not meta.get("gated") or self.member(account, _namespace(repo)):
            return True
        return account is not None and meta.get("access", {}).get(account.name, {}).get("status") == "accepted"

    def check_see(self, account: Account | None, repo: Repo) -> None:
        if not self.sees(account, repo):
            raise self.not_found(account)

    def check_read(self, account: Account | None, repo: Repo) -> None:
        self.check_see(account, repo)
        if self.reads(account, repo):
            return
        about = f"Access to {repo.kind.removesuffix('s')} {repo.id} is restricted"
        if account is None:
            raise GatedLogin(f"{about}. You must have access to it and be authenticated to access it. Please log in.")
        raise Gated(f"{about} and you are not in the authorized list. Ask one of {_namespace(repo)} to grant access.")

    def check_write(self, account: Account | None, repo: Repo) -> None:
        self.check_see(account, repo)
        if not self.writes(account, repo):
            raise self.refused(account, f"change {repo.id}")

    def check_create(self, account: Account | None, kind: str, namespace: str) -> None:
        if account is None or account.role != "write" or not self.member(account, namespace):
            raise self.refused(account, f'create a {kind.removesuffix("s")} under the namespace "{namespace}"')

    def check_login(self, account: Account | None) -> Account:
        if account is None:
            raise self.refused(account, "do this")
        return account

    def not_found(self, account: Account | None) -> RepoNotFound:
        return RepoHidden(NOT_FOUND) if account is None else RepoNotFound(NOT_FOUND)

    def refused(self, account: Account | None, what: str) -> Forbidden | Unauthorized:
        """Return the refusal of an action, without a reason that the client cannot act on."""
        if account is None:
            return Unauthorized(f"Log in to {what}: send the token of an account of this hub.")
        if account.role != "write":
            return Forbidden(f"You don't have the rights to {what}: your token can only read.")
        return Forbidden(f"You don't have the rights to {what}.")


def _namespace(repo: Repo) -> str:
    return repo.id.split("/")[0]


def _token(authorization: str) -> str:
    """Return the token of a Bearer header, or of a Basic one (git): there it is the password."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
