"""Publish a checkpoint: stage, validate, merge the card, send everything as one commit, and check what arrived."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmhub.adapters import adapter_of, merge
from mmhub.checkpoint import ALLOWED, is_checkpoint, load, read_config
from mmhub.errors import NetworkError, NotFoundError, TrustError, UsageError
from mmhub.hashes import git_sha1_of, sha256_of
from mmhub.hub.cache import as_table, read_json
from mmhub.hub.card import join_cards, merge_card, read_card
from mmhub.hub.client import api, download_options, endpoint, hub_errors, is_offline, is_public_hub
from mmhub.hub.findings import Finding, refusal
from mmhub.hub.foreign import recognise, write_layout
from mmhub.hub.gate import decide, findings, with_forced
from mmhub.hub.readme import strings
from mmhub.hub.signed import GIT, check_sender, signers_of
from mmhub.hub.signing import NAME as SIGNATURE
from mmhub.hub.signing import is_signed
from mmhub.hub.signing import sign as make_signature
from mmhub.hub.staging import Staged, listed, look
from mmhub.model import Model

PROPOSAL = "pr"  # as a revision: a pull request instead of a commit to a branch
# Files of an older push that this one no longer has must not stay beside it; the user's own texts may.
_OURS = re.compile(rf"(?!README\.md|LICENSE|config\.json)(?:{ALLOWED.pattern})")
_LIBRARY_WEIGHTS = re.compile(r"(\d+_Dense/)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
Gate = Literal["auto", "manual"]


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do: files by name with their size in bytes.

    `left_out` are files of the folder that belong to no checkpoint and are never sent; `pull_request` is its address.
    `changed` is False where the repository held exactly this already, so that no commit was made. `findings` are what
    its owner should know, and what would have been refused and was forced.
    """

    repo: str
    url: str
    commit: str
    files: dict[str, int]
    deleted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pull_request: str = ""
    dry_run: bool = False
    changed: bool = True
    findings: tuple[Finding, ...] = ()


def push(
    model: Model | str | Path,
    repo: str,
    *,
    license: str = "",
    message: str = "",
    private: bool | None = None,
    gated: Gate | None = None,
    revision: str | None = None,
    tag: str = "",
    layout: str = "",
    dry_run: bool = False,
    force: str | None = None,
    sign: str | Path = "",
    passphrase: str = "",
) -> Pushed:
    """Publish a model or checkpoint folder to `repo` ("org/name") as one commit; the repository is made if needed.

    The user's text and metadata in the folder's card are published; where the folder's card has none, those already in
    the repository survive. Files outside the checkpoint layout are never sent. Files that an interrupted push sent
    whole are not sent again. `revision` is a branch, made if needed; "pr" opens a pull request instead, and
    "refs/pr/N" adds to one. `layout` publishes a model of one encoder as another library's users load it:
    "transformers", "sentence-transformers" or "timm".

    `sign` is the file of a private key, or "sigstore": everything that the repository then holds is signed, and the
    signature, `model.sig`, is part of the commit. Without it, the signature of an older version is removed.

    What may be forced of what forbids publishing, see `mmhub.hub.gate`, passes where `force` is a text, the reason. It
    is then listed under "forced" in the published provenance.json; the folder's own stays as it is.

    Raises:
        UsageError: no licence is known, or the repository holds something else. TrustError: the folder is damaged or
        holds a secret or a personal path, it was measured on its training data, or what arrived is not what was sent.
        NetworkError. MmhubError: somebody else pushed meanwhile.
    """
    plan = _Plan(repo, license, message, private, gated, revision, tag, layout, dry_run, str(sign), passphrase, force)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", repo):
        raise UsageError(f"{repo!r} is no repository name", "use org/name, e.g. my-team/digits")
    if tag and (plan.proposes or (revision or "").startswith("refs/pr/")):
        raise UsageError("a pull request cannot be tagged", "leave out --tag, and tag after it is merged")
    if not sign and signers_of(repo):
        raise TrustError(f"a registry.toml asks that '{repo}' be signed", "add --sign KEY")
    if not isinstance(model, Model):
        return _push_folder(plan, Path(model))
    with tempfile.TemporaryDirectory() as temporary:
        return _push_folder(plan, model.save(Path(temporary) / "model"))


@dataclass(frozen=True)
class _Plan:
    """What the user asked for."""

    repo: str
    license: str
    message: str
    private: bool | None
    gated: Gate | None
    revision: str | None
    tag: str
    layout: str
    dry_run: bool
    sign: str = ""
    passphrase: str = ""
    force: str | None = None

    @property
    def proposes(self) -> bool:
        return self.revision == PROPOSAL

    @property
    def branch(self) -> str | None:
        return None if self.proposes else self.revision


def _push_folder(plan: _Plan, folder: Path) -> Pushed:
    if not is_checkpoint(folder):
        inside = folder / "model" / "config.json"
        hint = f"push '{inside.parent}'" if inside.is_file() else "name the folder with config.json"
        if (folder / "config.json").is_file():
            hint = "if it is another library's model, load and save it first: mmhub.load(...).save(...)"
        raise NotFoundError(f"'{folder}' is no mmhub checkpoint folder", hint)
    staged = look(folder)
    if staged.forbidden:
        raise refusal(str(folder), staged.findings, staged.left_out)
    if not plan.layout:
        _check_bases(folder)
    model = load(folder)  # a checkpoint that does not load strictly is not published
    if not plan.layout:
        return _publish(plan, folder, folder, staged)
    if any(adapter_of(part) for part in model.parts().values()):
        merge(model)
    with tempfile.TemporaryDirectory() as temporary:
        written = write_layout(model, Path(temporary) / "model", plan.layout)
        there = look(written, every=True)
        found = tuple(dict.fromkeys((*staged.findings, *there.findings)))
        return _publish(plan, folder, written, replace(there, left_out=staged.left_out, findings=found))


def _check_bases(folder: Path) -> None:
    """Refuse an adapter for weights that nobody else has."""
    for role, record in read_config(folder).components.items():
        base = record.adapter.base if record.adapter and record.adapter.weights else None
        if base is not None and not base.commit:
            raise UsageError(
                f"the {role} is an adapter for '{base.name}', which is on this machine alone",
                f"merge it (mmhub models merge '{folder}' OUT) and push that, or push the base and train from there",
            )


def _publish(plan: _Plan, source: Path, folder: Path, staged: Staged) -> Pushed:
    """Send the staged files of `folder`, with a card made from the checkpoint in `source`."""
    repo, local = plan.repo, _read_text(source / "README.md")
    if plan.dry_run:
        card = _card(plan, source, folder, local)
        found = _decide(plan, source, staged, card)
        with with_forced(folder, source, staged, found, plan.force or "") as (folder, staged):
            signature = _sign(plan, _digests(folder, _sent(staged), card), ()) if plan.sign else b""
            return replace(_pushed(folder, repo, staged, card, signature, dry_run=True), findings=tuple(found))
    if is_offline():
        raise NetworkError("nothing can be pushed while HF_HUB_OFFLINE is set", "unset it, or use --dry-run")
    _decide(plan, source, staged, _card(plan, source, folder, local), local=True)
    with hub_errors(repo, plan.branch):
        head = _find_head(repo, plan.branch)
    if head:
        _check_head(plan, head)
    elif plan.proposes:
        raise NotFoundError(f"no repository '{repo}' at {endpoint()} to propose a change to", "leave out --revision pr")
    card = _card(plan, source, folder, join_cards(local, head.card) if head else local)
    found = _decide(plan, source, staged, card)
    with hub_errors(repo, plan.branch):
        if head and plan.tag:
            _check_tag(repo, plan.tag)
        if head is None:
            head = _create(repo, plan.private, plan.branch)
        if head.branch_missing:
            api().create_branch(repo, branch=plan.branch, exist_ok=True)
        if plan.gated:
            api().update_repo_settings(repo, gated=plan.gated)
    try:
        with with_forced(folder, source, staged, found, plan.force or "") as (folder, staged):
            return replace(_commit(plan, folder, staged, card, head), findings=tuple(found))
    except NetworkError as error:
        raise NetworkError(error.message, "push again: files that arrived whole are not sent a second time") from None


def _decide(plan: _Plan, source: Path, staged: Staged, card: str, *, local: bool = False) -> list[Finding]:
    """Let the gate decide: what was found, if nothing of it forbids publishing.

    `local` is before the Hub is asked: its card may have the licence and statements that ours lacks.
    """
    found = findings(source, card, staged.findings, repo=plan.repo, message=plan.message, reason=plan.force or "")
    if local:
        found = [one for one in found if one.kind not in ("licence", "statement")]
    return decide(source, found, plan.force, staged.left_out)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is not UTF-8 text", "save it as UTF-8") from None


def _card(plan: _Plan, source: Path, folder: Path, old: str) -> str:
    known = plan.license or read_card(old)[0].get("license")
    architectures = as_table(read_json(folder / "config.json")).get("architectures") if plan.layout else None
    return merge_card(
        source,
        read_config(source),
        name=plan.repo,
        old=old,
        metadata={"license": known},
        library=plan.layout or "mmhub",
        architecture=(strings(architectures) or [""])[0],
    )


def _pushed(
    folder: Path, repo: str, staged: Staged, card: str, signature: bytes, *, commit: str = "", dry_run: bool = False
) -> Pushed:
    sizes = {name: (folder / name).stat().st_size for name in _sent(staged)} | {"README.md": len(card.encode())}
    sizes |= {SIGNATURE: len(signature)} if signature else {}
    return Pushed(
        repo, f"{endpoint()}/{repo}", commit, dict(sorted(sizes.items())), left_out=staged.left_out, dry_run=dry_run
    )


@dataclass(frozen=True)
class _Head:
    """The branch to push to, as it is now."""

    commit: str
    files: tuple[str, ...] = ()
    card: str = ""
    private: bool | None = None
    library: str = ""  # whose model it holds, '' if none
    branch_missing: bool = False


def _find_head(repo: str, revision: str | None) -> _Head | None:
    """The newest commit with its file names and README, None if there is no such repository yet."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _read_head(repo, revision)
    except RevisionNotFoundError:
        if revision and revision.startswith("refs/"):
            raise
        return replace(_read_head(repo, None), branch_missing=True)  # it will start from main
    except RepositoryNotFoundError:
        return None


def _read_head(repo: str, revision: str | None) -> _Head:
    info = api().model_info(repo, revision=revision)
    names = tuple(file.rfilename for file in info.siblings or ())
    texts = {
        name: _download(repo, name, info.sha).decode("utf-8", errors="replace") if name in names else ""
        for name in ("README.md", "config.json")
    }
    return _Head(info.sha, names, texts["README.md"], info.private, _library_of(names, texts))


def _download(repo: str, name: str, commit: str) -> bytes:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=commit, **download_options())).read_bytes()


def _library_of(names: Sequence[str], texts: Mapping[str, str]) -> str:
    """Whose model a repository holds: by its config.json, not by its card, which many lack or do not keep up."""
    if not any(name == "config.json" or name.endswith(".safetensors") for name in names):
        return ""
    try:
        config = as_table(json.loads(texts["config.json"] or "{}"))
    except (ValueError, RecursionError):
        config = {}
    known = "mmhub" if "mmhub_format" in config else recognise(config, names)[0]
    return known or str(read_card(texts["README.md"])[0].get("library_name") or "another library")


def _check_head(plan: _Plan, head: _Head) -> None:
    """Refuse to write over another library's model, and to publish openly what was meant to be private."""
    repo, wanted = plan.repo, plan.layout or "mmhub"
    if head.library not in ("", wanted):
        raise UsageError(
            f"'{repo}' at {endpoint()} holds a model in the layout of {head.library}, not {wanted}",
            "choose another repository name",
        )
    if plan.private is not None and head.private is not None and head.private != plan.private:
        is_now = "private" if head.private else "public"
        raise UsageError(
            f"'{repo}' at {endpoint()} exists and is {is_now}; nothing was sent",
            "change that in its settings, or leave out --private/--public",
        )


def _create(repo: str, private: bool | None, revision: str | None) -> _Head:
    api().create_repo(repo, private=private, exist_ok=True)
    head = _find_head(repo, revision)
    assert head is not None, "it was made just now"
    return head


def _check_tag(repo: str, tag: str) -> None:
    if any(ref.name == tag for ref in api().list_repo_refs(repo).tags):
        raise UsageError(f"'{repo}' already has a tag '{tag}'", "choose another --tag; nothing was sent")


def _commit(plan: _Plan, folder: Path, staged: Staged, card: str, head: _Head) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, files = plan.repo, _sent(staged)
    pattern = _LIBRARY_WEIGHTS if plan.layout else _OURS
    stale = [name for name in head.files if pattern.fullmatch(name) and name not in (*files, SIGNATURE)]
    digests = _digests(folder, files, card) if plan.sign else {}
    signature = _sign(plan, digests, set(head.files) - set(stale), head.commit) if plan.sign else b""
    if SIGNATURE in head.files and not signature:
        stale.append(SIGNATURE)  # it is of other files
    with _opened(folder, files) as contents:
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        operations += [CommitOperationAdd(SIGNATURE, signature)] if signature else []
        operations += [CommitOperationDelete(name) for name in stale]
        with hub_errors(repo, plan.revision), _without_notes():
            done = api().create_commit(
                repo,
                operations,
                commit_message=plan.message or "Publish with mmhub",
                revision=plan.branch,
                create_pr=plan.proposes,
                parent_commit=head.commit,
            )
    _check_arrived(repo, folder, files, done.oid)
    if signature and digests != _digests(folder, files, card):
        raise TrustError(f"'{folder}' was changed while it was signed and sent", "push again: the signature is void")
    if plan.tag:
        with hub_errors(repo, plan.tag):
            api().create_tag(repo, tag=plan.tag, revision=done.oid)
    pushed = _pushed(folder, repo, staged, card, signature, commit=done.oid)
    made = done.oid != head.commit
    return replace(pushed, deleted=tuple(stale), pull_request=done.pr_url or "", changed=made)


def _sent(staged: Staged) -> list[str]:
    """What is sent as it is: the card is made anew, and so is a signature."""
    return [name for name in staged.files if name not in ("README.md", SIGNATURE)]


def _digests(folder: Path, files: Sequence[str], card: str) -> dict[str, str]:
    """The SHA-256 of all that is published."""
    sums = {name: sha256_of(folder / name) for name in files}
    return dict(sorted((sums | {"README.md": hashlib.sha256(card.encode()).hexdigest()}).items()))


def _sign(plan: _Plan, digests: Mapping[str, str], there: Collection[str], commit: str = "") -> bytes:
    """Sign all that a repository will hold, which holds the files `there` now, at `commit`.

    A signature of the very same stays as it is, for each new one differs, and would make a commit of nothing.

    Raises:
        UsageError: it would go on holding others, which are not here to be signed. TrustError: a registry names
            another signer.
    """
    others = sorted(set(there) - set(digests) - {SIGNATURE, GIT})
    if others:
        raise UsageError(
            f"'{plan.repo}' also holds {listed(others)}, which cannot be signed from here",
            "put it into the folder if it belongs to the model, else delete it there; nothing was sent",
        )
    old = _download(plan.repo, SIGNATURE, commit) if SIGNATURE in there else b""
    same = bool(old) and is_signed(old, digests, plan.sign, plan.repo, plan.passphrase)
    signature = old if same else make_signature(digests, plan.sign, plan.repo, plan.passphrase)
    check_sender(plan.repo, signature)
    return signature


def _check_arrived(repo: str, folder: Path, files: Sequence[str], commit: str) -> None:
    """Compare the server's record of the new commit with the files here, byte for byte by their hashes.

    Raises:
        TrustError: they differ: the folder changed while it was sent, or the server is broken.
    """
    from mmhub.hub.download import list_files

    with hub_errors(repo, commit):
        there = list_files(repo, commit)
    for name in files:
        hash = there[name].hash if name in there else "nothing"
        if hash != (git_sha1_of if len(hash) == 40 else sha256_of)(folder / name):
            raise TrustError(
                f"'{repo}' at {commit[:12]} does not hold the '{name}' that is in '{folder}'",
                "the folder was changed while it was sent, or the server is damaged; push again",
            )


@contextmanager
def _opened(folder: Path, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Paths for the public Hub; open files for another, which makes the client use LFS instead of Xet."""
    if is_public_hub():
        yield {name: str((folder / name).resolve()) for name in files}
        return
    handles: dict[str, io.BufferedIOBase] = {}
    try:
        for name in files:
            handles[name] = (folder / name).open("rb")
        yield dict(handles)
    finally:
        for handle in handles.values():
            handle.close()


@contextmanager
def _without_notes() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in ("not supported by Xet", "No files have been modified"))

    logs = [logging.getLogger(f"huggingface_hub.{name}") for name in ("_commit_api", "hf_api")]
    for log in logs:
        log.addFilter(keep)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(keep)
