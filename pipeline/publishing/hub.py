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
from dataclasses import replace
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

from ..backbones.gguf_files import gguf_record
from ..backbones.load import public_name
from ..backbones.source import load_config
from ..backbones.weight_files import fingerprint_of_files
from ..config import Backbone, Config
from ..config_rules import is_repo_id
from ..errors import UserError
from ..inference.exit_head import ExitHead
from ..runs.folder import RunDir
from . import head_folder
from .head_folder import digest_of, files_of

ORIGIN = "custom_generate/origin.py"
TO_MEASURE = ["config.json", "model.safetensors"]
"""The files of a published head that are downloaded; its code is not."""
OF_A_NEW_REPO = {".gitattributes", "README.md"}
"""Files that a new repo may contain, made by the Hub or on its website. A push never removes .gitattributes."""

WAITS = (1.0, 2.0, 4.0)  # seconds before another attempt
PASSING = {408, 412, 429, 500, 502, 503, 504}
"""Status codes for which another attempt may succeed; 412: main has moved since it was read."""
CUT_OR_REFUSED = (
    OSError,  # includes HfHubHTTPError and the errors of Xet's client
    httpx2.TransportError,
    json.JSONDecodeError,  # the server is not a Hub
    HFValidationError,
)
TIMEOUT = httpx2.Timeout(600.0, connect=20.0)  # seconds; by default the client waits forever

T = TypeVar("T")


# ---- up


def check(config: Config) -> None:
    """Check early what a push needs. Raises UserError if there is no token, HF_ENDPOINT is no URL, or the client is set
    offline."""
    if config.publish.target == "hub":
        _token()
        _host()
        if constants.is_offline_mode():
            raise UserError("publish.target=hub: HF_HUB_OFFLINE is set; unset it, or use publish.target=folder")


def publish(run: RunDir, folder: Path, suffix: str) -> None:
    """Push a finished folder of the run to publish.repo_id with `suffix`, if publish.target is the Hub.

    It does nothing if the run's records say that this folder was pushed there unchanged. The push is recorded
    separately from the folder, so after a failure the same command only pushes again. Raises UserError if the folder
    was changed since it was written, or if the push fails.
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
    """Raises UserError if the folder differs from the digest recorded by the stage that wrote it. Older records have no
    digest; then nothing is checked."""
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
    """Push the whole folder as one commit and one tag; nothing if the repo has that tag already.

    A new repo is private unless `public` is given, which also makes an existing private repo public. Files in the main
    branch that are not in the folder are removed from it. Returns repo_id, tag, commit, and whether they are new.

    Raises UserError for a problem with the card, token, permissions, names, connection, or other contents of the repo.
    """
    _check_card(folder)
    api = HfApi(token=_token())
    tag = tag_of(folder, name)
    return _patiently(f"publish.repo_id={repo_id}", lambda: _push(api, folder, repo_id, tag, public))


def _check_card(folder: Path) -> None:
    """Raises UserError for a card without front matter, or a folder without results.json."""
    card, results = folder / "README.md", folder / "results.json"
    if not card.is_file() or not re.match(r"---\n.+?\n---\n", card.read_text(), re.S):
        raise UserError(f"{card}: no model card (front matter between two lines of ---); make it anew, with --redo")
    if not results.is_file():
        raise UserError(f"{card}: a card without results, {results.name} is missing; make it anew, with --redo")


def _push(api: HfApi, folder: Path, repo_id: str, tag: str, public: bool) -> dict[str, Any]:
    """One attempt to push. It first reads the state of the repo, so that steps done by an earlier attempt are not
    repeated."""
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
        # Retried separately from the commit: an existing tag is then the one that was just made.
        what = f"publish.repo_id={repo_id}"
        _patiently(what, lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    if private and public:
        api.update_repo_settings(repo_id, private=False)
    return {"repo_id": repo_id, "tag": tag, "commit": tags[tag], "new": new}


def _repository(api: HfApi, repo_id: str, public: bool) -> bool:
    """Whether the repo is private. It is created if the Hub does not find it, which may also mean a bad token."""
    try:
        return bool(api.repo_info(repo_id).private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public)
        return not public


def _commit(api: HfApi, folder: Path, repo_id: str, tag: str, main: str, ours: bool) -> str:
    """The commit with exactly the folder's files: a new one on top of `main`, or `main` if it has them already."""
    files, there = _contents(folder, repo_id, tag), set(api.list_repo_files(repo_id, revision=main))
    if not ours and (others := there - OF_A_NEW_REPO):
        raise UserError(
            f"publish.repo_id={repo_id}: holds something else ({', '.join(sorted(others)[:3])}) and was never "
            "published to from here; give the name of a new repo"
        )
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in sorted(there - {".gitattributes"} - files.keys())]
    try:  # a single commit; the client's upload_folder may make several
        return api.create_commit(repo_id, operations, commit_message=f"Publish {tag}", parent_commit=main).oid
    except ValueError as error:  # the client has the Hub validate the card first
        if not isinstance(error.__cause__, BadRequestError):
            raise
        raise UserError(
            f"publish.repo_id={repo_id}: {_host()} does not take the card: {' '.join(str(error).split())}. Set what it "
            "names (publish.licence, prompts.path) and make the folder anew, with --redo"
        ) from None


def _contents(folder: Path, repo_id: str, tag: str) -> dict[str, Path | bytes]:
    """Path in the repo -> its contents. Only the pushed origin.py names the repo; the file in the folder is kept."""
    files: dict[str, Path | bytes] = dict(files_of(folder))
    if ORIGIN in files:
        with tempfile.TemporaryDirectory() as aside:
            (Path(aside) / ORIGIN).parent.mkdir()
            head_folder.write_origin(Path(aside), repo_id, tag)
            files[ORIGIN] = (Path(aside) / ORIGIN).read_bytes()
    return files


def tag_of(folder: Path, name: str) -> str:
    """The run's name and a hash of the folder's contents: equal folders of a run have equal tags in every repo."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "run"
    return f"{plain}-{digest_of(folder)[:12]}"


def _is_tag(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+-[0-9a-f]{12}", name) is not None


def _is_our_commit(title: str) -> bool:
    """Whether a commit was made by a push, perhaps one that was interrupted before its tag."""
    return title.startswith("Publish ") and _is_tag(title.removeprefix("Publish "))


# ---- down


def pull(head: str, key: str = "evaluate.head") -> Path:
    """The folder of a published head: `head` itself if it is a folder, else a download of org/name[@revision].

    `key` is the config key that names it, for messages. Raises UserError for another form of name, or if the download
    fails.
    """
    if Path(head).is_dir():
        return Path(head)
    repo_id, _, revision = head.partition("@")
    if not is_repo_id(repo_id):
        raise UserError(f"{key}={head}: neither a folder here nor org/name or org/name@revision")
    _host()
    folder = _patiently(
        f"{key}={head}",
        lambda: snapshot_download(repo_id, revision=revision or None, allow_patterns=TO_MEASURE),
    )
    return Path(folder)


def defaults_of(folder: Path, head: str, key: str = "evaluate.head") -> dict[str, Any]:
    """Config defaults for using this head: the backbone it was trained for, if that is on the Hub.

    Raises UserError if the folder holds no head.
    """
    try:
        backbone = json.loads((folder / "config.json").read_text())["backbone"]
        name, revision = backbone["name"], backbone["revision"]
        gguf = {"gguf_file": backbone["gguf"]["file"]} if "gguf" in backbone else {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{key}={head}: {folder} holds no exit head; a published one has a config.json") from None
    return {"backbone": {"name_or_path": name, "revision": revision, **gguf}} if is_repo_id(name) else {}


def load_head(
    folder: Path, head: str, backbone: Backbone, key: str = "evaluate.head", allow_other: bool = False
) -> tuple[ExitHead, dict[str, Any] | None]:
    """The head in a pulled folder, and None. The backbone is not loaded for that.

    With `allow_other` a head of another backbone with as many layers is taken too: then its `backbone` is the given
    one, and the backbone that it was trained for comes second.
    Raises UserError if the folder holds no head, or one that cannot be taken.
    """
    try:
        loaded = ExitHead.load(folder)
    except ValueError as error:
        raise UserError(f"{key}={head}: {error}") from None
    belongs, found = loaded.backbone, fingerprint_of_files(backbone)
    if belongs["fingerprint"] == found:
        return loaded, None
    section, config = key.partition(".")[0], load_config(backbone)
    what = (
        f"backbone.name_or_path={backbone.name_or_path}: not the backbone of {head}, which belongs to "
        f"{belongs['name']} (fingerprint {belongs['fingerprint'][:12]}, not {found[:12]})"
    )
    if not allow_other:
        raise UserError(
            f"{what}. Give the backbone that it belongs to; if this one is another version of the same model, such as "
            f"its unquantised weights, {section}.allow_other_backbone=true (--allow-other-backbone) takes the head"
        )
    if (config.model_type, config.num_hidden_layers) != (belongs["model_type"], loaded.num_layers):
        raise UserError(
            f"{what}; {section}.allow_other_backbone=true cannot help, as this is a {config.model_type} of "
            f"{config.num_hidden_layers} layers and that a {belongs['model_type']} of {loaded.num_layers}"
        )
    name = public_name(backbone)
    given = {"name": name, "revision": backbone.revision, "fingerprint": found, "model_type": config.model_type}
    if gguf := gguf_record(backbone):
        given["gguf"] = gguf
    return replace(loaded, backbone=given), belongs


def source_of(head: str, folder: Path) -> str:
    """The origin of a pulled head in a form that can be published: org/name@commit, or the last part of a folder."""
    return folder.resolve().name if Path(head).is_dir() else f"{head.partition('@')[0]}@{folder.name}"


def run_name_of(head: str) -> str:
    """The name of the run in which a published head is measured: the repo's, or the end of the folder's path."""
    parts = Path(head).resolve().parts[-3:] if Path(head).is_dir() else re.split("[/@]", head)
    return "--".join(part for part in parts if part != "/").lstrip(".")


# ---- token, host and errors


def _token() -> str:
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError("publish.target=hub: there is no token; set HF_TOKEN to one that may write, or `hf auth login`")
    return token


def _host() -> str:
    """The host of the Hub, without a user name or password that the URL may contain."""
    parts = urlsplit(constants.ENDPOINT)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"HF_ENDPOINT={host or constants.ENDPOINT}: a URL such as https://huggingface.co is needed")
    return host


def _patiently(what: str, attempt: Callable[[], T]) -> T:
    """Call `attempt`, and again after errors that may pass. Raises UserError about `what` when it finally fails."""
    client_logging.set_verbosity_error()  # its warnings contain signed URLs of the storage
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
    """The underlying error of one that the client wraps, such as its RuntimeError after six attempts to upload.

    Raises the error again if it has nothing to do with the connection.
    """
    reason = error.__cause__ if _is_of_the_hub(error.__cause__) else error
    if reason is None or not _is_of_the_hub(reason):
        raise error
    return reason


def _is_of_the_hub(error: BaseException | None) -> bool:
    """Whether an error comes from the Hub or the connection. Errors of local files are told apart by their errno."""
    of_files = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
    return isinstance(error, CUT_OR_REFUSED) and not of_files


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return not isinstance(error, OfflineModeIsEnabled | json.JSONDecodeError | HFValidationError | PermissionError)


def _told(error: BaseException) -> str:
    """The message for the user: what failed and the remedy, without anything of what was sent."""
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
