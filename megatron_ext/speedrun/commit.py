"""The commit that a row is about."""

import subprocess
from collections.abc import Collection
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.speedrun.frozen import digest

CODE = ("megatron_ext", "tools", "pretrain_unified.py")


def known_commit(folder: Path, free: Collection[Path] = ()) -> str:
    """The commit that is checked out in ``folder``: part of main, and nothing changed but the files and folders
    ``free`` and new YAML files in the root or in runs/.

    Raises:
        UserError: no repository, a file that was changed or added, or a commit that others do not have.
    """
    root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    commit = _git(folder, "rev-parse", "--verify", "HEAD").strip()
    free = [Path(path).resolve() for path in free]
    entries = _git(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all").split("\0")
    for entry in filter(None, entries):
        file, is_new = root / entry[3:], entry.startswith("??")
        if any(file.is_relative_to(path) for path in free) or (is_new and _is_submission(file, root)):
            continue
        state = "is not in the commit" if is_new else "was changed"
        raise UserError(f"{file}: {state}; a row is about a commit, so commit or remove it")
    # A commit on the local main alone is one that others do not have, if there are others.
    main = "refs/remotes/*/main" if _git(folder, "remote").strip() else "refs/heads/main"
    if not _git(folder, "for-each-ref", "--contains", commit, "--format=%(refname)", main).strip():
        raise UserError(f"{root}: commit {commit[:10]} is not part of main ({main}), so others cannot run it")
    return commit


def code(folder: Path, commit: str) -> str:
    """16 hexadecimal digits that change with every file that a run executes."""
    return digest(_git(folder, "ls-tree", "--full-tree", commit, "--", *CODE))


def _is_submission(file: Path, root: Path) -> bool:
    return file.suffix == ".yaml" and (file.parent == root or file.is_relative_to(root / "runs"))


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"git: {error.strerror}; a row names the commit that was run") from None
    if done.returncode:
        raise UserError(f"{folder}: {done.stderr.strip().splitlines()[-1]}; a row names the commit that was run")
    return done.stdout
