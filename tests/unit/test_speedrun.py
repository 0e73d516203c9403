"""The speedrun: what is refused, digests and seeds, scores, rows; and a rehearsal from the tool on."""

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.answers import AnswersWriter
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.preprocess.recipe import read_recipe
from megatron_ext.speedrun import commit, frozen, questions, speedrun, submission
from megatron_ext.speedrun.experiment import Cost, Experiment, step_ratio
from megatron_ext.speedrun.figures import figures
from megatron_ext.speedrun.leaderboard import Kind, Leaderboard, Row, tables
from megatron_ext.speedrun.origin import Origin, data_digest
from megatron_ext.speedrun.score import score
from megatron_ext.speedrun.speedrun import Result, Speedrun
from megatron_ext.training.config_checks import validate
from support.programs import ROOT

RECIPE = {
    "world": {"kinds": 4, "objects": 2, "variation": 0},
    "size": 48,
    "scenes": {"train": 40, "validation": 6, "test": 6, "questions": 2, "with_choices": 0, "forms": ["tar"]},
    "split_turns": True,
    "tokenizer": {"grid": 3, "codebook_size": 16, "options": {"held_out": 8}},
    "vocabulary_size": 320,
    "benchmarks": {"kinds": ["presence", "color", "background"]},
    "workers": 1,
}
PAGE = "# Speedrun\n\n<!-- leaderboard -->\nold\n<!-- end of leaderboard -->\n\nBelow.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of a round with a tiny world, which is not prepared."""
    folder = tmp_path_factory.mktemp("round")
    data, world = folder / "world" / "data", folder / "world"
    sources = [("questions", "understanding", 6), ("captions", "understanding", 1), ("captions", "generation", 7)]
    config = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
        "data": {
            "vocabulary": str(world / "vocabulary"),
            "sequence_length": 128,
            "workers": 0,
            "train": [{"path": f"{data}/{name}-train", "task": task, "weight": w} for name, task, w in sources],
            "validation": [{"path": f"{data}/captions-validation", "task": "generation"}],
        },
        "training": {"micro_batch_size": 2, "global_batch_size": 2, "validation_batches": 1},
        "optimizer": {"lr": 3e-3, "schedule": "wsd", "warmup_iterations": 50, "wsd_decay_iterations": 500},
        "logging": {"tensorboard": False},
    }
    tree = {
        "round": 1,
        "recipe": str(folder / "recipe.yaml"),
        "world": str(world),
        "base": [str(folder / "base.yaml")],
        "reference": str(folder / "dense.yaml"),
        "tokens": 256_000,
        "questions": {"pictures": 8, "seed": 77, "options": ["--max-new-tokens", "3"]},
        "dense_step_seconds": 0.5,
        "rehearsal": {"tokens": 2560, "seeds": 1, "pictures": 2},
        "calibration_steps": 7,
        "output": str(folder / "out"),
        "leaderboard": str(folder / "board"),
    }
    reference = {"plan": {"preset": "dense_lossless"}}
    for name, content in {"base": config, "recipe": RECIPE, "frozen": tree, "dense": reference}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "board.md").write_text(PAGE)
    return folder


@pytest.fixture
def round1(folder) -> frozen.Frozen:
    return frozen.read(folder / "frozen.yaml")


@pytest.fixture
def entered(tmp_path, round1):
    """A function that reads a submission with this text."""

    def read(text: str) -> submission.Submission:
        (tmp_path / "my.yaml").write_text(text)
        return submission.read(tmp_path / "my.yaml", round1)

    return read


@pytest.mark.parametrize(
    "key",
    ["model.num_layers", "optimizer.beta1", "optimizer.lr_foo", "data.train", "training.iterations", "plans.x", "plan"],
)
def test_a_key_outside_the_list_is_refused_by_name(entered, key):
    section, _, name = key.partition(".")
    with pytest.raises(UserError, match=rf"my.yaml: '{key}' is not open to submissions; open are plan\.\*"):
        entered(yaml.safe_dump({section: {name: 3} if name else {}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: .nan}", "'optimizer.lr' is nan, must be a number from 0"),
        ("optimizer: {lr: -1}", "'optimizer.lr' is -1, must be a number from 0"),
        ("optimizer: {lr: 0}", "'optimizer.lr' is 0, must be positive"),
        ("data: {weights: {captions-generation: 0}}", r"'data.train\[2\].weight' is 0"),
        ("training: {task_weights: {understanding: 0, generation: 0}}", "'training.task_weights' has no positive"),
        ("optimizer: {warmup_iterations: 1000}", "'optimizer.warmup_iterations' is 1000, must be less than"),
    ],
)
def test_a_value_that_cannot_train_is_refused_before_training(entered, text, message):
    with pytest.raises(UserError, match=f"my.yaml: {message}"):
        entered(text)


def test_a_submission_has_at_most_twenty_lines(entered):
    assert entered("#\n" * 19 + "plan: {preset: himix}").config.plan.preset == "himix"
    with pytest.raises(UserError, match="my.yaml: has 21 lines; a submission has at most 20"):
        entered("#\n" * 20 + "plan: {preset: himix}")


def test_the_digest_changes_with_values_and_not_with_how_they_are_written(entered):
    written = entered("optimizer: {lr: 2e-3, warmup_iterations: 60}\nplan: {preset: himix, himix_start: 1}")
    same = [
        "# a comment\nplan:\n  himix_start: 1\n  preset: himix\noptimizer:\n  warmup_iterations: 60\n  lr: 0.002\n",
        "optimizer: {lr: 2.0e-3, warmup_iterations: 60, schedule: wsd}\nplan: {preset: himix, himix_start: 1}",
        "optimizer: {lr: 2e-3, warmup_iterations: 60}\n"
        "plan: {preset: dense, table: [{layers: 1, task: understanding, modality: image, role: kv_only}]}",
        "optimizer: {lr: 2e-3, warmup_iterations: 60}\nplan: {preset: himix, himix_start: 1}\n"
        "data: {weights: {questions-understanding: 12, captions-understanding: 2, captions-generation: 14}}",
        # Practically the same training gives no other seeds.
        "optimizer: {lr: 2.0000001e-3, warmup_iterations: 60}\nplan: {preset: himix, himix_start: 1}\n"
        "data: {caption_dropout: 0.1000001}\ntraining: {task_weights: {understanding: 2, generation: 2, text: 3}}",
    ]
    assert {entered(text).digest for text in same} == {written.digest}
    other = [
        "optimizer: {lr: 2e-3, warmup_iterations: 60}\nplan: {preset: himix}",
        "optimizer: {lr: 2.1e-3, warmup_iterations: 60}\nplan: {preset: himix, himix_start: 1}",
        same[0] + "data: {caption_dropout: 0.2}",
        same[0] + "data: {weights: {captions-generation: 8}}",
        same[0] + "training: {task_weights: {generation: 2}}",
        same[1].replace("himix_start: 1", "himix_start: 1, drawn_tables: {count: 3}"),
        same[1].replace("himix_start: 1", "himix_start: 1, dense_share: {of: documents}"),
    ]
    assert len({entered(text).digest for text in [same[0], *other]}) == 8
    assert entered(other[-2].replace("count: 3", "count: 3, seed: 9")).digest == entered(other[-2]).digest


def test_the_submissions_of_the_first_round_are_valid_and_all_different(monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = Path("examples/speedrun")
    first = frozen.read(folder / "frozen.yaml")
    files = sorted(set(folder.glob("*.yaml")) - {folder / "frozen.yaml"})
    entries = {file.stem: submission.read(file, first) for file in files}
    assert len({entry.digest for entry in entries.values()}) == len(files)
    assert entries["dense"].is_dense and not entries["share_partial"].is_dense
    for entry in entries.values():
        validate(entry.config, 1)
    assert tables(Leaderboard(Path(first.leaderboard)).rows) in Path("docs/speedrun.md").read_text()


def test_seeds_follow_from_the_digest_the_round_and_the_word(round1):
    first = submission.seeds(round1, "0123")
    assert len(set(first)) == 4 and first == submission.seeds(round1, "0123")
    others = [submission.seeds(round1, "0124"), submission.seeds(round1, "0123", "word")]
    round1.round = 2
    assert len({*first, *(seed for seeds in [*others, submission.seeds(round1, "0123")] for seed in seeds)}) == 16


def test_a_row_is_about_a_commit_of_main_and_nothing_else(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    with pytest.raises(UserError, match="not a git repository"):
        commit.known_commit(tmp_path)
    git("init", "--initial-branch", "main")
    code, board = tmp_path / "code.py", tmp_path / "board.json"
    code.write_text("a")
    board.write_text("[]")
    git("add", "-A")
    git("commit", "-m", "first")
    known = commit.known_commit(tmp_path)
    assert len(known) == 40
    board.write_text("[1]")
    for name in ("other.yaml", "runs/mine/best.yaml", "rows/round1/my.json", "docs/my.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    free = [board, tmp_path / "rows"]
    assert commit.known_commit(tmp_path, [*free, tmp_path / "docs/my.yaml"]) == known
    with pytest.raises(UserError, match=r"docs/my\.yaml: is not in the commit"):
        commit.known_commit(tmp_path, free)
    code.write_text("b")
    with pytest.raises(UserError, match=r"code\.py: was changed; a row is about a commit"):
        commit.known_commit(tmp_path, [*free, tmp_path / "docs"])
    git("checkout", "-b", "mine")
    git("add", "-A")
    git("commit", "-m", "second")
    with pytest.raises(UserError, match="is not part of main .refs/heads/main., so others cannot run it"):
        commit.known_commit(tmp_path)
    assert commit.code(tmp_path, "HEAD") == commit.code(tmp_path, known)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "speedrun.py").write_text("")
    git("add", "-A")
    git("commit", "-m", "third")
    assert commit.code(tmp_path, "HEAD") != commit.code(tmp_path, known)
    git("checkout", "main")
    git("remote", "add", "origin", "nowhere")
    with pytest.raises(UserError, match="is not part of main .refs/remotes/./main., so others"):
        commit.known_commit(tmp_path)
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert commit.known_commit(tmp_path) == known


def test_the_score_is_the_bound_of_the_smaller_figure_relative_to_dense():
    dense = {"understanding": [50, 70, 60, 60], "generation": [40, 40, 30, 50]}
    scored = score({"understanding": [48, 60, 66, 60], "generation": [60, 44, 36, 20]}, dense, 0.9)
    assert scored.understanding == pytest.approx([0.8, 1.0, 1.1, 1.0])
    assert scored.generation == pytest.approx([1.5, 1.1, 0.9, 0.5])
    # Of 0.8, 1, 0.9, 0.5: mean 0.8, standard error sqrt(0.14 / 3 / 4); 1.6377 is in tables of t with 3 degrees.
    assert scored.score == pytest.approx(0.8 - 1.6377 * (0.14 / 12) ** 0.5, abs=1e-5)
    sold = score({"understanding": [90.0] * 4, "generation": [-3, 0, -1, -2]}, dense, 0.9)
    assert sold.generation == [0.0] * 4 and sold.score == 0.0
    with pytest.raises(UserError, match="dense has -1.0 % above chance in generation"):
        score(dense, {**dense, "generation": [-1, -1, 0, -2]}, 0.9)


def test_constant_answers_and_equal_pictures_score_nothing_and_right_ones_everything(tmp_path, folder):
    asked = questions.write(tmp_path / "questions", read_recipe(folder / "recipe.yaml"), 6, 5)
    items, prompts = GQA.read(asked / "gqa"), mjhq.read(asked / "mjhq")
    assert {questions.split_of(item.id) for item in items} == {"validation", "test"}

    def answer(name: str, answer_of, picture_of) -> dict:
        with AnswersWriter(tmp_path / name / "gqa.jsonl") as writer:
            for item in items:
                writer.write(item.id, answer_of(item))
        for prompt in prompts:
            file = tmp_path / name / "mjhq" / prompt.category / f"{prompt.id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(mjhq.image_file(asked / "mjhq", picture_of(prompt)), file)
        return figures(asked, tmp_path / name)

    commonest = {"presence": "yes", "color": "red", "background": "navy"}
    constant = answer("constant", lambda item: commonest[item.kind], lambda prompt: prompts[0])
    for figures_of_split in constant.values():
        assert figures_of_split["understanding"] <= 0 and figures_of_split["generation"] == pytest.approx(0)
    # A picture for each split: pooled, its facts would be above those under others' captions.
    first = {questions.split_of(prompt.id): prompt for prompt in reversed(prompts)}
    two = answer("two", lambda item: commonest[item.kind], lambda prompt: first[questions.split_of(prompt.id)])
    assert two["mean"]["generation"] == pytest.approx(0)
    right = answer("right", lambda item: item.answer, lambda prompt: prompt)
    assert all(f["understanding"] == 100 and f["generation"] > 90 for f in right.values())
    collapsed = {"understanding": [100.0] * 4, "generation": [constant["mean"]["generation"]] * 4}
    assert score(collapsed, {"understanding": [60], "generation": [40]}, 0.9).score == pytest.approx(0)


def test_flops_or_time_over_the_cap_make_no_row(folder, round1, entered, monkeypatch):
    reference = submission.read(folder / "dense.yaml", round1)
    same = {"understanding": [50.0] * 4, "generation": [40.0] * 4}

    def enter(what: submission.Submission, flops_ratio: float, step_ratio: float | None = 0.7):
        cost, splits = Cost(flops_ratio, step_ratio, 1.5, 3000.0, 5000.0), ("validation", "test", "mean")
        result = Result([1, 2, 3, 4], dict.fromkeys(splits, same), cost, score(same, same, 0.9))
        made = Origin("c" * 40, "other" if step_ratio == 0.8 else "code", "data")
        return Speedrun(round1, what).enter(result, made, "b|*")

    monkeypatch.setattr(commit, "known_commit", lambda *_: "c" * 40)
    mine = entered("plan: {preset: himix_hmgen_share_all}")
    with pytest.raises(UserError, match="has no run of .*dense.yaml, which all others are relative to"):
        Speedrun(round1, mine).check_entry([])
    enter(reference, 1.0)
    Speedrun(round1, mine).check_entry([])
    share = dataclasses.replace(entered("plan: {preset: himix_hmgen_share_partial}"), name="share")
    Speedrun(round1, share).check_entry([])
    with pytest.raises(UserError, match="my: 0.601 x the FLOPs of lossless dense, the cap is 0.6"):
        enter(mine, 0.601)
    with pytest.raises(UserError, match="my: a step takes 0.91 x the time of lossless dense, the cap is 0.9"):
        enter(mine, 0.6, 0.91)
    with pytest.raises(UserError, match="too few steps to be timed"):
        enter(mine, 0.6, None)
    row = enter(mine, 0.6, 0.8)
    assert (row.attempt, row.score, Leaderboard(folder / "board").named(round1, "my")) == (2, 1.0, row)
    assert row.differs == ["code"] and (folder / "board/round1/my.json").is_file()
    with pytest.raises(UserError, match="has this recipe already, as my with 1.000"):
        Speedrun(round1, mine).check_entry([])
    with pytest.raises(UserError, match="round 1 has another recipe named my"):
        Speedrun(round1, dataclasses.replace(share, name="my")).check_entry([])
    page = (folder / "board.md").read_text()
    assert (
        page.startswith("# Speedrun\n\n<!-- leaderboard -->\n") and page.endswith("\n\nBelow.\n") and "old" not in page
    )
    cells = (
        "| my |  | 1.000 | 1.00 1.00 1.00 1.00 | 1.00 1.00 1.00 1.00 | 0.600 | 0.80 | 1.50 | 2 | b\\|\\* | `cccccccccc`"
    )
    assert f"|  {cells}, other code |" in page and "Lossless dense:\n\n| submission |" in page
    with pytest.raises(UserError, match="round 1 has no verification_word"):
        Speedrun(round1, mine, "verification")
    round1.verification_word = "word"
    again = Speedrun(round1, mine, "verification")
    assert not set(again.experiment.seeds) & set(Speedrun(round1, mine).experiment.seeds)
    with pytest.raises(UserError, match="round 1 has no verification of .*dense.yaml"):
        again.check_entry([])
    monkeypatch.setattr(commit, "known_commit", lambda *_: "d" * 40)
    with pytest.raises(UserError, match="was begun at commit cccccccccc"):
        Speedrun(round1, share).check_entry([])


def test_verified_rows_are_ranked_by_their_verification_and_others_stand_below(folder):
    splits = dict.fromkeys(("validation", "test"), {"understanding": [1.0], "generation": [2.0]})

    def row(name: str, score: float, kind: Kind = "run", is_dense: bool = False) -> Row:
        figures = {"score": score, "understanding": [1.0], "generation": [1.0], "figures": splits, "is_dense": is_dense}
        made = {"commit": "c", "code": "", "data": "", "differs": [], "digest": name, "frozen": "", "settings": {}}
        cost = dict.fromkeys(("flops_ratio", "step_ratio", "core_hours", "wall_seconds", "cpu_seconds"), 0.5)
        return Row(name=name, author="a", kind=kind, round=1, attempt=1, seeds=[1], **figures, **made, **cost)

    rows = [row("dense", 0.97, is_dense=True), row("dense", 0.9, "verification", is_dense=True)]
    rows += [row("claim", 1.2), row("lucky", 1.1), row("steady", 0.9)]
    rows += [row("steady", 0.88, "verification"), row("lucky", 0.7, "verification")]
    lines = [[cell.strip() for cell in line.split("|")[1:5]] for line in tables(rows).splitlines() if "`c`" in line]
    assert lines[:3] == [
        ["1", "steady", "0.880", "0.900"],
        ["2", "lucky", "0.700", "1.100"],
        ["", "claim", "", "1.200"],
    ]
    assert lines[3][:3] == ["dense", "0.900", "0.970"] and len(lines) == 4


def test_time_is_relative_to_dense_and_told_from_twenty_steps():
    # Whatever disturbs the slower three quarters of the steps does not count.
    assert step_ratio([3.0] * 8 + [9.0] * 12, [4.0] * 20) == 0.75
    assert step_ratio([3.0] * 19, [4.0] * 20) is None and step_ratio([3.0] * 20, [4.0] * 19) is None


def test_a_submission_is_relative_to_the_row_of_dense_and_dense_to_itself(
    folder, round1, entered, monkeypatch, tmp_path
):
    round1.leaderboard = str(tmp_path / "board")
    (tmp_path / "board.md").write_text(PAGE)
    cost, splits = Cost(0.5, 0.5, 1.0, 1.0, 1.0), ("validation", "test", "mean")
    monkeypatch.setattr(Experiment, "execute", lambda *_, **__: None)
    monkeypatch.setattr(Experiment, "cost", lambda _: cost)
    monkeypatch.setattr(Experiment, "answers", lambda e: [20 if e.submission.is_dense else 30] * 4)
    both = ("understanding", "generation")
    monkeypatch.setattr(speedrun, "figures", lambda _, a: dict.fromkeys(splits, dict.fromkeys(both, float(a))))
    dense, mine = submission.read(folder / "dense.yaml", round1), entered("plan: {preset: himix}")
    of_dense = Speedrun(round1, dense).run(1)
    assert of_dense.score.score == 1.0
    Speedrun(round1, dense).enter(of_dense, Origin("c" * 40, "code", "data"), "a")
    assert Speedrun(round1, mine).run(1).score.generation == [1.5] * 4
    assert Speedrun(round1, mine, "rehearsal").run(1).score is None
    round1.verification_word = "word"
    verified = dataclasses.replace(Leaderboard(tmp_path / "board").rows[0], kind="verification")
    Leaderboard(tmp_path / "board").append(verified)
    monkeypatch.setattr(speedrun, "origin", lambda *_: Origin("d" * 40, "code", "other"))
    assert Speedrun(round1, mine).origin("d" * 40).data == "other"
    with pytest.raises(UserError, match="my: data differ from those of dense's verification at commit cccccccccc"):
        Speedrun(round1, mine, "verification").origin("d" * 40)


def test_a_rehearsal_takes_the_whole_path_and_a_plan_that_saves_nothing_is_refused(
    folder, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(ROOT)

    def run_tool(*arguments) -> dict:
        tool = [str(ROOT / "tools/speedrun.py"), *arguments, "--frozen", folder / "lenient.yaml"]
        monkeypatch.setattr(sys, "argv", [*map(str, tool), "--json", str(folder / "numbers.json")])
        runpy.run_path(tool[0], run_name="__main__")
        return json.loads((folder / "numbers.json").read_text())

    # So small a model on so small pictures computes mostly text and logits.
    (folder / "lenient.yaml").write_text((folder / "frozen.yaml").read_text() + "flops_cap: 0.95")
    (folder / "half.yaml").write_text("plan: {preset: himix_hmgen_share_all, shallow_count: 1}")
    (folder / "plain.yaml").write_text("plan: {preset: dense}")
    with pytest.raises(SystemExit):
        run_tool(folder / "plain.yaml", "--estimate")
    assert "x the FLOPs of lossless dense, the cap is 0.95" in capsys.readouterr().err
    rehearsed = run_tool(folder / "half.yaml", "--rehearse")
    assert "a rehearsal: nothing was recorded" in capsys.readouterr().out
    assert rehearsed["cost"]["flops_ratio"] == pytest.approx(
        run_tool(folder / "half.yaml", "--estimate")["flops_ratio"], rel=0.05
    )
    assert rehearsed["cost"]["core_hours"] is None and len(rehearsed["seeds"]) == 1
    assert rehearsed["figures"].keys() == {"validation", "test", "mean"}
    assert run_tool(folder / "half.yaml", "--rehearse")["figures"] == rehearsed["figures"]
    assert "already complete" in capsys.readouterr().out
    asked = tmp_path / "questions"
    asked.mkdir()
    data = frozen.read(folder / "lenient.yaml").config.data
    digests = set()
    for fingerprint in ("a", "b", "b"):
        (asked / questions.TOGETHER).write_text(json.dumps({"test": fingerprint}))
        digests.add(data_digest(data, asked))
    data.train.pop(0)
    assert len(digests) == 2 and data_digest(data, asked) not in digests
    run_tool("--write-page")
    assert "board.md: " in capsys.readouterr().out
