"""What a row was made with: commit, code, data."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import DataConfig
from megatron_ext.files import read_json
from megatron_ext.speedrun import commit as commits
from megatron_ext.speedrun.frozen import digest
from megatron_ext.speedrun.questions import TOGETHER


@dataclass(frozen=True)
class Origin:
    """What a row was made with.

    Attributes:
        code: digest of the files that a run executes.
        data: digest of data sets, tokenizer, questions and captions. With other versions of libraries the same recipe
            may give others.
    """

    commit: str
    code: str
    data: str

    def differs(self, code: str, data: str) -> list[str]:
        """Which of code and data are others."""
        return [name for name, other in (("code", code), ("data", data)) if getattr(self, name) != other]


def origin(folder: Path, commit: str, data: DataConfig, questions: Path) -> Origin:
    """The origin of a row at a commit of the repository in ``folder``, with prepared data sets and questions."""
    return Origin(commit, commits.code(folder, commit), data_digest(data, questions))


def data_digest(data: DataConfig, questions: Path) -> str:
    """16 hexadecimal digits that change with the content of data sets and of the questions of :mod:`.questions`."""
    content = {"questions": read_json(questions / TOGETHER)}
    for source in (*data.train, *data.validation):
        metadata = read_json(Path(f"{source.path}.json"))
        content[Path(source.path).name] = [metadata[key] for key in ("files", "vocabulary", "vq")]
    return digest(content)
