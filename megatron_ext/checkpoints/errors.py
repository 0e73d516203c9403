"""What may go wrong with a checkpoint: it cannot be written, or it is damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError


class WriteError(UserError):
    """A checkpoint could not be written, on any rank; nothing of it is left, and training may go on."""


class DamageError(UserError):
    """A file of a checkpoint is missing, or is not what was written."""


def cause(error: BaseException) -> str:
    """Why a write failed, such as "No space left on device".

    torch reports the failed write only in the chain of its own error ("unexpected pos 704 vs 598").
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What runs inside writes files; an OSError becomes a :class:`WriteError` that names the file, or else ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{error.filename or path}: {cause(error)}") from None
