"""Send what a manifest lists to the Hub, and nothing else.

It is idempotent: what is already there is not sent again, so a publication that failed goes on with the same command.

Transfers, their retries and the diff against what is there are huggingface_hub's (`create_commit`). Ours is what it leaves out in
2.4: it sends `whoami`, `create_repo`, `repo_info`, `validate-yaml`, the commit and the tag once, so that a single 500 or a cut line
ends a publication (30 of the 66 faults in the tests, without `_Steps`). `upload_folder` does retry its commits, but sends a
model in several of them, of which a stranger may load the first, repeats a commit whose answer was lost, and takes a folder, where
our cards and cleaned configs are made in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from ..folders import RUN_FACTS
from .edits import UnreadableCard, merged
from .http import TransportError
from .manifest import PLOTS, SCORES, TOKEN, WEIGHTS, Item, Manifest, PublishError, one_line

T = TypeVar("T")
# What may pass by itself. 412: somebody has pushed since we looked; the next attempt looks again
_PASSING = (408, 412, 429, 500, 502, 503, 504)
_ATTEMPTS = 3  # of a step
CARD = "README.md"


@dataclass(frozen=True)
class Published:
    """Where it is now. sent: paths that changed on the Hub. tag: the name of this commit. kept: parts of the card that somebody had
    edited on the Hub, and that are still as they were. removed: paths of other weights, and of scores of theirs."""

    repo_id: str
    url: str
    commit: str
    tag: str | None
    sent: tuple[str, ...]
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def publish(manifest: Manifest, *, token: str | None = None) -> Published:
    """Create the repository if need be, send what is not there yet in one commit, tag it, and compare what arrived.

    Raises:
        PublishError: whatever went wrong; the sentence names the step and the command that goes on.
    """
    api = HfApi(token=token)
    kind: Any = {"repo_id": manifest.repo_id, "repo_type": manifest.repo_type}
    step = _Steps(manifest.repo_id, manifest.repo_type, manifest.command, token or get_token())
    step("sign in", lambda: _check_token(api.whoami(), manifest))
    sdk: Any = {"space_sdk": "gradio"} if manifest.repo_type == "space" else {}
    url = step(
        "create the repository",
        lambda: api.create_repo(**kind, **sdk, private=manifest.private or None, exist_ok=True),
    )
    kind["repo_id"] = repo_id = url.repo_id
    info = step("look at the repository", lambda: api.repo_info(**kind))
    if manifest.private and info.private is False:
        raise PublishError(f"{repo_id} exists and is public: make it private in its settings, or leave --private out.")
    if manifest.revision:
        branch = manifest.revision
        step("make the branch", lambda: api.create_branch(**kind, branch=branch, exist_ok=True))
    before = step("list the repository", lambda: _listing(api, kind, manifest.revision))

    def commit() -> tuple[Any, tuple[Item, ...], tuple[str, ...], tuple[str, ...]]:
        # Anew for each attempt: an operation keeps what it knew of the Hub, and an answer that was lost may have been a yes
        head = api.repo_info(**kind, revision=manifest.revision).sha
        listing = _listing(api, kind, head)
        items, kept = manifest.items, cast("tuple[str, ...]", ())
        if CARD in listing:
            items, kept = _with_edits(items, _read_card(api, kind, head), manifest)
        removed = tuple(_stale(listing, manifest))
        operations: list[Any] = [CommitOperationDelete(path) for path in removed]
        operations += [CommitOperationAdd(item.path, item.source) for item in items]
        done = api.create_commit(
            **kind,
            operations=operations,
            commit_message=manifest.message,
            revision=manifest.revision,
            parent_commit=head,  # or an edit of the card from a moment ago would be lost
        )
        return done, items, kept, removed

    done, items, kept, removed = step("send the files", commit)
    after = step("compare what arrived", lambda: _listing(api, kind, done.oid))
    _compare(items, after, manifest)
    name = manifest.tag or f"lingudistill-{done.oid[:8]}"
    if manifest.repo_type == "model":
        step("tag the commit", lambda: _tag(api, kind, name, done.oid))
    sent = tuple(item.path for item in items if before.get(item.path) != after[item.path])
    return Published(repo_id, str(url), done.oid, name if manifest.repo_type == "model" else None, sent, kept, removed)


def whole_name(repo_id: str, command: str, *, token: str | None = None) -> str:
    """`ORG/NAME`: of a name alone, the owner is the user of the token.

    Raises:
        PublishError: if there is no valid token, or the Hub does not answer.
    """
    if "/" in repo_id:
        return repo_id
    step = _Steps(repo_id, "model", command, token or get_token())
    identity = step("sign in", lambda: HfApi(token=token).whoami())
    return f"{identity['name']}/{repo_id}"


def _check_token(identity: Mapping[str, Any], manifest: Manifest) -> None:
    role = ((identity.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PublishError(
            f"The token of {identity.get('name')} can read only: make one that may write at https://huggingface.co/settings/tokens, "
            f"`hf auth login` with it, then: {manifest.command}"
        )


def _listing(api: HfApi, kind: Mapping[str, Any], revision: str | None) -> dict[str, str]:
    """{path: SHA-256 of a large file, git hash of any other}."""
    entries = api.list_repo_tree(**kind, revision=revision, recursive=True)
    files = (entry for entry in entries if isinstance(entry, RepoFile))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _stale(listing: Collection[str], manifest: Manifest) -> list[str]:
    """What would be taken for a part of this model, and is none: other weights; and scores, which are of the weights that were there."""
    if manifest.repo_type != "model":
        return []
    known = {item.path for item in manifest.items}
    # In a repository that was published from here before
    scores = (
        {SCORES, "report.json", *(f"{stem}.{kind}" for stem in PLOTS for kind in ("png", "svg"))}
        if RUN_FACTS in listing
        else set()
    )
    return [path for path in listing if path not in known and (WEIGHTS.fullmatch(path) or path in scores)]


def _read_card(api: HfApi, kind: Mapping[str, Any], revision: str | None) -> str:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(**kind, filename=CARD, revision=revision, cache_dir=cache)
        return Path(path).read_text(encoding="utf-8")


def _with_edits(items: tuple[Item, ...], there: str, manifest: Manifest) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """The items with what somebody edited in the card on the Hub, and the names of that."""
    if not (ours := manifest.text(CARD)):
        return items, ()
    try:
        text, kept = merged(ours, there)
    except UnreadableCard as error:
        raise PublishError(
            f"The {CARD} on {manifest.repo_id} cannot be read: {error}. Mend it there, then: {manifest.command}"
        ) from None
    return tuple(Item(CARD, text.encode()) if item.path == CARD else item for item in items), kept


def _compare(items: tuple[Item, ...], listing: Mapping[str, str], manifest: Manifest) -> None:
    wrong = [item.path for item in items if listing.get(item.path) not in item.oids()]
    if wrong:
        raise PublishError(
            f"{wrong[0]} on {manifest.repo_id} is not what was sent ({len(wrong)} files differ): somebody else may have pushed at "
            f"the same time. To send it again: {manifest.command}"
        )


def _tag(api: HfApi, kind: Mapping[str, Any], name: str, commit: str) -> None:
    api.create_tag(**kind, tag=name, revision=commit, exist_ok=True)
    if (there := api.repo_info(**kind, revision=name).sha) != commit:
        raise PublishError(
            f"The files are on {kind['repo_id']}, but its tag {name!r} names another commit ({str(there)[:8]}): choose another --tag."
        )


@dataclass(frozen=True)
class _Steps:
    """Runs the steps of a publication: tries again what may pass, and turns every failure into one sentence."""

    repo_id: str
    repo_type: str
    command: str
    secret: str | None

    def __call__(self, name: str, action: Callable[[], T]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return action()
            except PublishError:
                raise
            except KeyboardInterrupt:
                raise PublishError(f"Interrupted at: {name}. To go on: {self.command}") from None
            except Exception as error:
                wait = _seconds_to_wait(error, attempt)
                if wait is None or attempt == _ATTEMPTS:
                    # Without the chain: a traceback shows no request, and so no header
                    raise PublishError(self._sentence(name, error)) from None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _sentence(self, step: str, error: Exception) -> str:
        why = _explain(error, self.repo_id, self.repo_type)
        text = f"Could not {step}: {why} The local files are whole. To go on: {self.command}"
        text = text.replace(self.secret, "hf_***") if self.secret else text
        return TOKEN.sub("hf_***", text)


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """How long until the same request may succeed; None if it never will."""
    cause = _cause(error)
    if isinstance(cause, TransportError):
        return float(2**attempt)
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in _PASSING:
        told = cause.response.headers.get("Retry-After", "")
        return float(min(int(told) + 1, 300)) if told.isdigit() else float(2**attempt)
    return None


def _cause(error: BaseException) -> BaseException:
    """The error of the request, which huggingface_hub may wrap."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, HfHubHTTPError | TransportError | OfflineModeIsEnabled | LocalTokenNotFoundError):
            return at
        at = at.__cause__
    return error


def _explain(error: Exception, repo_id: str, repo_type: str) -> str:
    cause = _cause(error)
    if isinstance(cause, LocalTokenNotFoundError):
        return "there is no Hub token; run `hf auth login`, or set HF_TOKEN."
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it."
    if isinstance(cause, TransportError):
        return f"the Hub could not be reached or hung up ({type(cause).__name__}: {one_line(cause)})."
    if not isinstance(cause, HfHubHTTPError):
        return f"{type(error).__name__}: {one_line(error)}."
    status = cause.response.status_code
    if isinstance(cause, RepositoryNotFoundError) and status != 401:
        return (
            f"the Hub has no {repo_type} {repo_id} that this token may see; the name may belong to a repository of another type or of "
            "somebody else. Choose another name."
        )
    if status == 401:
        return (
            "the Hub does not accept the token (expired, revoked or mistyped); run `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return f"the token may not write to {repo_id}; make one with write access at https://huggingface.co/settings/tokens."
    if status == 429:
        return "the Hub asks for fewer requests; wait some minutes."
    if status >= 500:
        return f"the Hub answered {status} several times."
    return f"the Hub answered {status} ({one_line(cause.server_message or cause)})."
