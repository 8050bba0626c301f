"""Uploads published folders to the Hub, or to a server at HF_ENDPOINT with its protocol, and downloads heads from it.

`push` takes a folder and a repo id and makes one commit and one tag, or nothing; `pull` takes org/name[@revision] or a
folder and gives a folder that holds a head. The token is that of HF_TOKEN or of the client (HF_TOKEN_PATH, HF_HOME); it
is never written or shown.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as client_logging

from ..config import Config
from ..config_rules import is_repo_id
from ..errors import UserError
from ..runs.folder import RunDir
from . import head_folder
from .head_folder import digest_of, files_of

ORIGIN = "custom_generate/origin.py"
TO_MEASURE = ["config.json", "model.safetensors"]
"""What of a published head is downloaded; its code is not."""
OF_A_NEW_REPO = {".gitattributes", "README.md"}
"""Files that the Hub puts into a repo, and whoever made it on its site may have; the first is not ours to remove."""

WAITS = (1.0, 2.0, 4.0)  # seconds before another attempt
PASSING = {408, 412, 429, 500, 502, 503, 504}
"""Answers that may be others the next time; 412: main has moved since it was looked at."""
CUT_OR_REFUSED = (
    OSError,  # HfHubHTTPError is one, and whatever Xet's own client raises
    httpx2.TransportError,
    json.JSONDecodeError,  # no Hub answers there
    HFValidationError,
)
TIMEOUT = httpx2.Timeout(600.0, connect=20.0)  # seconds; the client itself waits for ever

T = TypeVar("T")


# ---- up


def check(config: Config) -> None:
    """What can be known before anything is made. Raises UserError if there is no token, or no Hub to be asked."""
    if config.publish.target == "hub":
        _token()
        _host()
        if constants.is_offline_mode():
            raise UserError("publish.target=hub: HF_HUB_OFFLINE is set; unset it, or use publish.target=folder")


def publish(run: RunDir, folder: Path, suffix: str) -> None:
    """Push a finished folder of the run if publish.target says so, to publish.repo_id with `suffix`.

    Not if the run's own record says that this very folder was pushed there. The record is a mark of its own: after a
    failure the same command pushes again, and the folder stays as it is. Raises UserError if it did not.
    """
    settings = run.config.publish
    if settings.target != "hub":
        return
    repo_id, mark = f"{settings.repo_id}{suffix}", f"push{suffix}"
    where = {"endpoint": _host(), "repo_id": repo_id, "public": settings.public}
    if run.is_done(mark, [folder], where):
        print(f"push: done already, {repo_id} has it")
        return
    _check_unchanged(run, folder)
    with run.stage(mark, [folder], where) as summary:
        summary["pushed"] = pushed = push(folder, repo_id, run.config.run.name, public=settings.public)
    verb = "pushed as" if pushed["new"] else "nothing changed, nothing pushed: it is there as"
    print(f"push: {verb} {repo_id}@{pushed['tag']}, commit {pushed['commit'][:12]}")


def _check_unchanged(run: RunDir, folder: Path) -> None:
    """Raises UserError unless the folder is what the stage recorded that wrote it; older records say nothing of it."""
    name = folder.relative_to(run.path).as_posix()
    record: dict[str, Any] = next((r for r in reversed(run.records()) if r.get("folder") == name), {})
    digest = digest_of(folder)
    if record.get("sha256", digest) != digest:
        made = (run / "stages" / f"{record['stage']}.json").stat().st_mtime
        newer = [path for path, file in files_of(folder).items() if file.stat().st_mtime > made]
        raise UserError(
            f"{folder}: was changed since it was made and measured ({', '.join(newer) or 'files are gone'}); make it "
            f"anew with --redo {record['stage']}"
        )


def push(folder: Path, repo_id: str, name: str, *, public: bool = False) -> dict[str, Any]:
    """One commit and one tag of the whole folder; neither if the repo has that tag already.

    A new repo is private unless `public`, and a private one becomes public by it. What stood in the repo's main branch
    and is not in the folder is removed from it. Gives repo_id, tag, commit, and whether they are new.

    Raises UserError for whatever is wrong with the card, token, rights, names, the connection or what the repo holds.
    """
    _check_card(folder)
    api = HfApi(token=_token())
    tag = tag_of(folder, name)
    return _patiently(f"publish.repo_id={repo_id}", lambda: _push(api, folder, repo_id, tag, public))


def _check_card(folder: Path) -> None:
    """Raises UserError for a card that says nothing to the Hub, or of which there are no results."""
    card, results = folder / "README.md", folder / "results.json"
    if not card.is_file() or not re.match(r"---\n.+?\n---\n", card.read_text(), re.S):
        raise UserError(f"{card}: no model card (front matter between two lines of ---); make it anew, with --redo")
    if not results.is_file():
        raise UserError(f"{card}: a card without results, {results.name} is missing; make it anew, with --redo")


def _push(api: HfApi, folder: Path, repo_id: str, tag: str, public: bool) -> dict[str, Any]:
    """One attempt. Each looks first at what is there, so that what an earlier one reached is not done twice."""
    private = _repository(api, repo_id, public)
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    new = tag not in tags
    if new:
        if not private and not public:
            raise UserError(
                f"publish.repo_id={repo_id}: is public. publish.public=true (--public) says that this is wanted; or "
                "make it private in its settings on the Hub, or give another name"
            )
        main = next(ref.target_commit for ref in refs.branches if ref.name == "main")
        ours = any(map(_is_tag, tags)) or _is_our_commit(api.list_repo_commits(repo_id, revision=main)[0].title)
        tags[tag] = commit = _commit(api, folder, repo_id, tag, main, ours)
        # Tried again for itself: a tag that is found there then is the one that was just made.
        what = f"publish.repo_id={repo_id}"
        _patiently(what, lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    if private and public:
        api.update_repo_settings(repo_id, private=False)
    return {"repo_id": repo_id, "tag": tag, "commit": tags[tag], "new": new}


def _repository(api: HfApi, repo_id: str, public: bool) -> bool:
    """Is the repo private? Made if it is not there; of a token that is no good the Hub may say that too."""
    try:
        return bool(api.repo_info(repo_id).private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public)
        return not public


def _commit(api: HfApi, folder: Path, repo_id: str, tag: str, main: str, ours: bool) -> str:
    """The commit that holds the folder and nothing else: a new one behind `main`, or `main` if it does already."""
    files, there = _contents(folder, repo_id, tag), set(api.list_repo_files(repo_id, revision=main))
    if not ours and (others := there - OF_A_NEW_REPO):
        raise UserError(
            f"publish.repo_id={repo_id}: holds something else ({', '.join(sorted(others)[:3])}) and was never "
            "published to from here; give the name of a new repo"
        )
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in sorted(there - {".gitattributes"} - files.keys())]
    try:  # one request that names every file; the client's upload_folder may make several commits of a folder
        return api.create_commit(repo_id, operations, commit_message=f"Publish {tag}", parent_commit=main).oid
    except ValueError as error:  # the client asks first what the Hub thinks of the card
        if not isinstance(error.__cause__, BadRequestError):
            raise
        raise UserError(
            f"publish.repo_id={repo_id}: {_host()} does not take the card: {' '.join(str(error).split())}. Set what it "
            "names (publish.licence, prompts.path) and make the folder anew, with --redo"
        ) from None


def _contents(folder: Path, repo_id: str, tag: str) -> dict[str, Path | bytes]:
    """Path in the repo -> what will stand there. Only the pushed origin.py names the repo; the folder's own stays."""
    files: dict[str, Path | bytes] = dict(files_of(folder))
    if ORIGIN in files:
        with tempfile.TemporaryDirectory() as aside:
            (Path(aside) / ORIGIN).parent.mkdir()
            head_folder.write_origin(Path(aside), repo_id, tag)
            files[ORIGIN] = (Path(aside) / ORIGIN).read_bytes()
    return files


def tag_of(folder: Path, name: str) -> str:
    """The run's name and a hash of what the folder holds: equal folders have equal tags, in every repo."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "run"
    return f"{plain}-{digest_of(folder)[:12]}"


def _is_tag(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+-[0-9a-f]{12}", name) is not None


def _is_our_commit(title: str) -> bool:
    """Of a push that was cut before its tag."""
    return title.startswith("Publish ") and _is_tag(title.removeprefix("Publish "))


# ---- down


def pull(head: str) -> Path:
    """The folder of a published head: `head` itself if it is one, else a download of org/name or org/name@revision.

    Raises UserError if there is none, or if it cannot be had.
    """
    if Path(head).is_dir():
        return Path(head)
    repo_id, _, revision = head.partition("@")
    if not is_repo_id(repo_id):
        raise UserError(f"evaluate.head={head}: neither a folder here nor org/name or org/name@revision")
    _host()
    folder = _patiently(
        f"evaluate.head={head}",
        lambda: snapshot_download(repo_id, revision=revision or None, allow_patterns=TO_MEASURE),
    )
    return Path(folder)


def defaults_of(folder: Path, head: str) -> dict[str, Any]:
    """What a config says by default when this head is measured: its own backbone, if that has a name on the Hub.

    Raises UserError if the folder holds no head.
    """
    try:
        backbone = json.loads((folder / "config.json").read_text())["backbone"]
        name, revision = backbone["name"], backbone["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"evaluate.head={head}: {folder} holds no exit head; a published one has a config.json"
        ) from None
    return {"backbone": {"name_or_path": name, "revision": revision}} if is_repo_id(name) else {}


def source_of(head: str, folder: Path) -> str:
    """Where a pulled head came from, as it may be told to others: org/name@commit, or the last part of a folder."""
    return folder.resolve().name if Path(head).is_dir() else f"{head.partition('@')[0]}@{folder.name}"


def run_name_of(head: str) -> str:
    """The run folder in which a published head is measured: named after the repo, or the end of the folder's path."""
    parts = Path(head).resolve().parts[-3:] if Path(head).is_dir() else re.split("[/@]", head)
    return "--".join(part for part in parts if part != "/").lstrip(".")


# ---- what can go wrong


def _token() -> str:
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError("publish.target=hub: there is no token; set HF_TOKEN to one that may write, or `hf auth login`")
    return token


def _host() -> str:
    """Where the Hub is, without what a URL may hold of a user."""
    parts = urlsplit(constants.ENDPOINT)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"HF_ENDPOINT={host or constants.ENDPOINT}: a URL such as https://huggingface.co is needed")
    return host


def _patiently(what: str, attempt: Callable[[], T]) -> T:
    """Try again where that may help; a UserError about `what` where it cannot or did not."""
    client_logging.set_verbosity_error()  # its warnings quote URLs that a storage has signed
    if not sys.stderr.isatty():
        disable_progress_bars()
    waits = iter(WAITS)
    while True:
        huggingface_hub.get_session().timeout = TIMEOUT
        try:
            return attempt()
        except (*CUT_OR_REFUSED, RuntimeError) as error:
            reason = _reason(error)
            wait = next(waits, None) if _passes(reason) and not isinstance(error, RuntimeError) else None
            if wait is None:
                raise UserError(f"{what}: {_told(reason)}") from None
        print(f"hub: {_host()} cannot be reached or is busy; again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def _reason(error: BaseException) -> BaseException:
    """What happened, out of what the client wraps it in; with a RuntimeError it ends an upload that it tried six times.

    Raises the error again if it has nothing to do with the connection.
    """
    reason = error.__cause__ if _is_of_the_hub(error.__cause__) else error
    if reason is None or not _is_of_the_hub(reason):
        raise error
    return reason


def _is_of_the_hub(error: BaseException | None) -> bool:
    """And not of this machine's files: those have an errno."""
    of_files = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
    return isinstance(error, CUT_OR_REFUSED) and not of_files


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return not isinstance(error, OfflineModeIsEnabled | json.JSONDecodeError | HFValidationError | PermissionError)


def _told(error: BaseException) -> str:
    """What it is, and what the user can do about it; nothing of what was sent."""
    host = _host()
    if isinstance(error, OfflineModeIsEnabled):
        return "is not in the cache (HF_HOME), and HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HFValidationError):
        return str(error)
    if isinstance(error, PermissionError):  # XetAuthenticationError
        return f"the storage of {host} does not take the token (HF_TOKEN, `hf auth login`): {type(error).__name__}"
    if isinstance(error, json.JSONDecodeError):
        return f"{host} does not answer as a Hub does; see HF_ENDPOINT"
    if isinstance(error, RevisionNotFoundError):
        return f"no such revision on {host}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repo on {host}, or a private one that the token (HF_TOKEN, `hf auth login`) may not see"
    if not isinstance(error, HfHubHTTPError):
        status_of_xet = re.search(r"\((\d{3} [A-Za-z ]+)\)", str(error))
        found = status_of_xet[1] if status_of_xet else type(error).__name__
        return (
            f"{host} cannot be reached, or cuts the connection ({found}); the same command goes on. "
            "See HF_ENDPOINT, and for a Hub without Xet storage set HF_HUB_DISABLE_XET=1"
        )
    status = error.response.status_code
    if status == 401:
        return f"{host} does not know the token; set HF_TOKEN to a valid one, or `hf auth login`"
    if status == 403:
        return f"the token may not do that on {host}: it needs the right to write there"
    return f"{host} answered {status}: {error.server_message or 'no reason given'}"
