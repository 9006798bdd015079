import json
import re
from pathlib import Path
from typing import Any

import pytest

from workflow import builtin, prompts
from workflow.formats import questions, read, read_rows
from workflow.stage import StageError

# The writer, the file that it writes and the format that reads it, by the builtin's name.
WRITERS = {
    "aime": (builtin.write_aime, "test.jsonl", "aime"),
    "bespoke_stratos": (builtin.write_bespoke_stratos, "train.jsonl", "bespoke_stratos"),
    "bespoke_stratos_messages": (builtin.write_bespoke_stratos_messages, "train.jsonl", "bespoke_stratos"),
    "gpqa": (builtin.write_gpqa, "test.csv", "gpqa"),
    "gsm8k": (builtin.write_gsm8k, "train.jsonl", "gsm8k"),
    "numina_tir": (builtin.write_numina_tir, "train.jsonl", "numina_tir"),
    "questions": (builtin.write_questions, "test.jsonl", "math"),
}
HELD_OUT = ("aime", "gpqa", "questions")  # to evaluate on only


def write(folder: Path, name: str, rows: int = 300, seed: int = 42, **more: Any) -> list[dict[str, Any]]:
    writer, file, _ = WRITERS[name]
    folder.mkdir(exist_ok=True)
    options = {"system_prompt": "Think."} | ({"guesses": 0.25} if name.startswith("bespoke") else {})
    writer(folder, rows=rows, seed=seed, **(options | more))
    assert {path.name for path in folder.iterdir()} == {file} | ({"test.jsonl"} if name == "gsm8k" else set())
    return list(read_rows(folder, file))


def value(text: str) -> int:
    """`What is 43 + 2 - 3?` or `43 + 2`, computed here."""
    total = 0
    for sign, number in re.findall(r"([+-]?) ?(\d+)", text):
        total += -int(number) if sign == "-" else int(number)
    return total


def check_thought(thought: str, question: str) -> None:
    """Every line is right, starts from the last total, and the last total answers the question."""
    before = int(re.search(r"\d+", question)[0])
    start, *lines = thought.split("\n")
    assert start == "Step by step:"
    for line in lines:
        left, right = line.split(" = ")
        assert value(left) == int(right)
        assert int(left.split(" ")[0]) == before
        assert 10 <= int(right) <= 99
        before = int(right)
    assert before == value(question)
    assert len(lines) == question.count(" + ") + question.count(" - ") == 3


def test_bespoke_stratos(tmp_path):
    rows = write(tmp_path, "bespoke_stratos")
    assert len(rows) == 300
    guesses = 0
    for row in rows:
        assert list(row) == ["system", "conversations"] and row["system"] == "Think."
        assert [(list(turn), turn["from"]) for turn in row["conversations"]] == [
            (["from", "value"], "user"),
            (["from", "value"], "assistant"),
        ]
        made = read(row, "bespoke_stratos")
        taught = prompts.parse(made.completion)
        (asked,) = questions(made.prompt)
        assert taught.answer == f"\\boxed{{{value(asked)}}}"
        if taught.thought == builtin.GUESS:
            guesses += 1
        else:
            check_thought(taught.thought, asked)
    assert 50 < guesses < 100  # a quarter


@pytest.mark.parametrize(("share", "count"), [(0, 0), (1, 100)])
def test_guesses(tmp_path, share, count):
    rows = write(tmp_path, "bespoke_stratos", rows=100, guesses=share)
    assert sum(builtin.GUESS in row["conversations"][1]["value"] for row in rows) == count


@pytest.mark.parametrize("system", ["Think.", None])
def test_bespoke_stratos_messages_are_the_same_rows(tmp_path, system):
    rows = write(tmp_path / "a", "bespoke_stratos_messages", system_prompt=system)
    assert all(list(row) == ["messages"] for row in rows)
    assert {tuple(turn) for row in rows for turn in row["messages"]} == {("role", "content")}
    same = write(tmp_path / "b", "bespoke_stratos", system_prompt=system)
    assert [read(row, "bespoke_stratos") for row in rows] == [read(row, "bespoke_stratos") for row in same]
    assert read(rows[0], "bespoke_stratos").prompt[0]["role"] == ("system" if system else "user")


def test_gsm8k(tmp_path):
    train = write(tmp_path, "gsm8k")
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert (len(train), len(test)) == (300, 30)
    assert [row["question"] for row in test] == [row["problem"] for row in write(tmp_path / "q", "questions", rows=30)]
    for row in train + test:
        assert list(row) == ["question", "answer"]
        noted = re.findall(r" = <<(\d+[+-]\d+)=(\d+)>>(\d+)$", row["answer"], re.MULTILINE)
        assert len(noted) == row["answer"].count("<<") == 3
        assert all(value(left) == int(right) == int(after) for left, right, after in noted)
        made = read(row, "gsm8k")
        taught = prompts.parse(made.completion)
        check_thought(taught.thought, row["question"])
        assert taught.answer == f"\\boxed{{{made.solution}}}"
        assert int(made.solution) == value(row["question"])


def test_numina_tir(tmp_path):
    for row in write(tmp_path, "numina_tir"):
        assert list(row) == ["problem", "solution", "messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert [message["content"] for message in row["messages"]] == [row["problem"], row["solution"]]
        thought, _, answer = row["solution"].rpartition("\n")
        check_thought(thought, row["problem"])
        assert answer == f"The answer is $\\boxed{{{value(row['problem'])}}}$."


def test_questions(tmp_path):
    rows = write(tmp_path, "questions")
    assert len(rows) == 300
    for row in rows:
        assert list(row) == ["problem", "answer"]
        assert int(row["answer"]) == value(row["problem"])


def test_aime(tmp_path):
    rows = write(tmp_path / "a", "aime")
    assert [row["problem"] for row in rows] == [row["problem"] for row in write(tmp_path / "q", "questions")]
    for row in rows:
        assert {"id", "problem", "solution", "answer"} == set(row) and len(row["answer"]) == 3
        assert read(row, "aime").solution == f"${value(row['problem'])}$"


def test_gpqa(tmp_path):
    rows = write(tmp_path / "a", "gpqa")
    assert [row["Question"] for row in rows] == [row["problem"] for row in write(tmp_path / "q", "questions")]
    golds = set()
    for row in rows:
        made = read(row, "gpqa")
        (asked,) = questions(made.prompt)
        (right,) = re.findall(rf"^{made.solution}\) (\d+)$", asked, re.MULTILINE)
        assert int(right) == value(row["Question"])
        golds.add(made.solution)
    assert golds == set("ABCD")


@pytest.mark.parametrize("name", WRITERS)
def test_seeded(tmp_path, name):
    first, again, other = (write(tmp_path / folder, name, seed=seed) for folder, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert (first == other) == (name in HELD_OUT)  # every seed is evaluated on the same questions
    assert len({json.dumps(row) for row in first}) == len(first)
    file = WRITERS[name][1]
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fewer_rows_are_the_first_of_more(tmp_path):
    assert write(tmp_path / "a", "questions", rows=20) == write(tmp_path / "b", "questions", rows=60)[:20]


def test_held_out_questions_are_never_trained_on(tmp_path):
    """Whatever the seeds: a question is held out or not by itself."""

    def asked(name: str, seed: int) -> set[str]:
        most = 1_800 if name == "questions" else 16_000  # the most there are
        rows = write(tmp_path / f"{name}{seed}", name, most, seed)
        found = {question for row in rows for question in questions(read(row, WRITERS[name][2]).prompt)}
        assert len(found) == most
        return found

    held_out = asked("questions", 1) | asked("questions", 2)
    trained = set.union(*(asked(name, seed) for name in ("bespoke_stratos", "gsm8k", "numina_tir") for seed in (1, 2)))
    assert not held_out & trained
    # The two sides are alike but for the split: answers lie in the same range, in the same proportions.
    means = [sum(map(value, found)) / len(found) for found in (held_out, trained)]
    assert abs(means[0] - means[1]) < 2


@pytest.mark.parametrize("name", WRITERS)
def test_more_rows_than_there_are_questions(tmp_path, name):
    most = 1_800 if name in HELD_OUT else 16_000
    with pytest.raises(StageError, match=f"at most {most} rows; write rows: {most} or less"):
        write(tmp_path, name, rows=most + 1)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes the tiny model with a seed; imports torch."""

    def run(seed: int, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        shape = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
        shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        builtin.make_model(folder, seed=seed, system_prompt="Think.", **shape, **options)
        return folder

    return run


def test_model_is_seeded(make):
    first, again, other = (files(make(seed)) for seed in (1, 1, 2))
    assert first == again
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(first)
    assert first["model.safetensors"] != other["model.safetensors"]


def test_model_fits_its_tokenizer(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.config.bos_token_id is None and tokenizer.bos_token is None


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """As every stage loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 43 + 8 - 5?",
        prompts.build("43 + 8 = 51\n51 - 5 = 46", r"\boxed{46}"),
        "Zürich, 漢字, \U0001f600, tab\t, two  blanks, windows\r\n, \x00, \u2028",
        " leading and trailing ",
        "it's the user's , . !",
        r"$\frac{1}{2}$ \[x\] {<think>}",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_token_each(tokenizer):
    assert set(tokenizer.all_special_tokens) == set(builtin.SPECIAL_TOKENS)
    for token in builtin.SPECIAL_TOKENS:
        assert tokenizer.tokenize(f"a{token}b") == ["a", token, "b"]


def test_fixed_strings_are_one_token_each(tokenizer):
    """Every completion carries them, so they decide how long a training step takes; digits stand alone."""
    assert len(tokenizer.tokenize(prompts.build("43 + 8 = 51", r"\boxed{51}"))) == 3 + 7 + 2
    assert builtin.FIXED_STRINGS
    for string in builtin.FIXED_STRINGS:
        ids = tokenizer(f"1{string}2")["input_ids"]
        assert len(ids) == 3 and tokenizer.decode(ids, skip_special_tokens=True) == f"1{string}2"


def test_what_was_trained_is_what_is_loaded(tokenizer, tiny_model):
    """AutoTokenizer picks a class by the model's type, and the class may split words in its own way."""
    saved = json.loads((tiny_model / "tokenizer.json").read_text())
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert loaded[part] == saved[part], part
    assert loaded["model"]["vocab"] == saved["model"]["vocab"]
    assert loaded["model"]["merges"] == saved["model"]["merges"]


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    prompt = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    messages.append({"role": "assistant", "content": "A"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "A<|im_end|>\n"
    masked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = [i for i, mask in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(ids) == "A<|im_end|>"


def test_corpus_is_learnt(make, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "corpus.txt").write_text("photosynthesis happens\n" * 50)
    taught = AutoTokenizer.from_pretrained(make(1, corpus=str(tmp_path / "corpus.txt")))
    assert len(taught.tokenize("photosynthesis")) < 4
