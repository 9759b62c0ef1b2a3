"""Uploads: a checked folder becomes one commit, or nothing changes on the Hub."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..conversion.source import PROCESSOR_FILES
from ..modeling.remote_code import REMOTE_CODE_FILE
from .check import check_folder
from .eval_results import FOLDER as EVAL_RESULTS
from .model_card import CARD, LOG, THIS_FOLDER, Origin, render_model_card


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What is uploaded. Checkpoints, pseudo targets and records of runs beside the model stay at home.
UPLOADED = (
    "config.json", *PROCESSOR_FILES, "additional_chat_templates/*.jinja", REMOTE_CODE_FILE, *WEIGHTS, LOG,
    f"{EVAL_RESULTS}/*.yaml", "*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg",
)  # fmt: skip
# What a repository may hold of an earlier model, and Transformers would load in place of or on top of the new one.
STALE = (*WEIGHTS, "*.bin", "*.bin.index.json", "adapter_config.json")


def prepare_repo(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """
    Creates a model repository and the branch unless they exist: what would stop an upload shows before the work.

    Args:
        repo_id (`str`): `ORG/NAME`, or `NAME` in the user's own namespace.
        private (`bool`, *optional*): Whether a new repository is private; by default as the organization says.
        revision (`str`, *optional*): Branch to upload to, by default `main`.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.

    Returns:
        `str`: The full name, `ORG/NAME`.

    Raises:
        `ValueError`: The name is not valid, or `private` is asked of a repository that is public already.
        `OSError`: No network, no token, or no right to write there.
    """
    api = HfApi(library_name="linmu-hf")
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
        if private and not api.repo_info(name, token=token).private:
            raise ValueError(f"{name} exists and is public: make it private on the Hub first, or leave private out")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True, token=token)
    except ValueError:
        raise
    except Exception as error:  # OSError, or one of the HTTP client's, which are of no common kind
        raise OSError(f"cannot push to {repo_id}: {reason(error)}") from error
    return name


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload LinMU model",
) -> CommitInfo:
    """
    Uploads a saved model with its processor and card as one commit, once [`check_folder`] has passed it.

    Weights go first, into the Hub's storage, unseen; then a single commit shows everything at once. An
    upload that fails leaves the repository as it was, and a repeated one sends only what is not there yet. Weights of
    an earlier model that the new one does not replace are deleted in the same commit: Transformers might load them.

    A folder without a `README.md` gets a card in the repository. `model.push_to_hub(...)` works too, as everywhere in
    Transformers: it uploads the model alone, without processor, check or this card.

    Args:
        folder (`str` or `Path`): What `linmu-convert`, `linmu-distill` or `save_pretrained` left. Of its files those
            are uploaded that belong to the model; folders and checkpoints inside are not.
        repo_id (`str`): `ORG/NAME`, or `NAME` in the user's own namespace.
        private, revision, token: As in [`prepare_repo`].
        commit_message (`str`, *optional*, defaults to `"Upload LinMU model"`): First line of the commit.

    Raises:
        `FileNotFoundError`, `ValueError`: The folder is not whole; nothing was sent.
        `OSError`: The upload failed; run it again.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    files = files_to_upload(folder)
    name = prepare_repo(repo_id, private=private, revision=revision, token=token)
    api = HfApi(library_name="linmu-hf")
    try:
        operations: list = [CommitOperationAdd(file, folder / file) for file in files if file != CARD]
        operations.append(CommitOperationAdd(CARD, _card(folder, name, revision).encode()))
        present = api.list_repo_files(name, revision=revision, token=token)
        stale = [file for file in present if _matches(file, STALE) and file not in files]
        operations += [CommitOperationDelete(file) for file in stale]
        return api.create_commit(name, operations, commit_message=commit_message, revision=revision, token=token)
    except Exception as error:  # OSError, RuntimeError, or one of the HTTP client's
        raise OSError(
            f"the upload to {name} failed ({reason(error)}); {folder} is whole: push it again, "
            "which sends what is not there yet"
        ) from error


def files_to_upload(folder: Path) -> list[str]:
    """Returns the files of a folder that belong to the model, as paths in the repository."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(file for file in files if _matches(file, UPLOADED))


def reason(error: BaseException) -> str:
    """Returns what went wrong, in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "error while uploading", and no more
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _card(folder: Path, name: str, revision: str | None) -> str:
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8")
    else:
        text = render_model_card(folder, Origin())
    return text.replace(THIS_FOLDER, f'model="{name}"' + (f', revision="{revision}"' if revision else ""))


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, pattern) and file.count("/") == pattern.count("/") for pattern in patterns)
