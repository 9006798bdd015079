import json
import re
from pathlib import Path
from typing import Any

import pytest

from workflow import builtin, prompts
from workflow.prepare import FORMATS
from workflow.stage import StageError

WRITERS = {
    "bespoke_stratos": (builtin.write_bespoke_stratos, "train.jsonl"),
    "numina_tir": (builtin.write_numina_tir, "train.jsonl"),
    "math": (builtin.write_questions, "test.jsonl"),
}


def write(folder: Path, form: str, rows: int = 300, seed: int = 42, **more: Any) -> list[dict[str, Any]]:
    writer, name = WRITERS[form]
    folder.mkdir(exist_ok=True)
    options = {"guesses": 0.25} if form == "bespoke_stratos" else {}
    writer(folder, rows=rows, seed=seed, system_prompt="Think.", **(options | more))
    assert [file.name for file in folder.iterdir()] == [name]
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


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
        made = FORMATS["bespoke_stratos"](row)
        taught = prompts.parse(made.completion)
        assert taught.answer == f"\\boxed{{{value(made.question)}}}"
        if taught.thought == builtin.GUESS:
            guesses += 1
        else:
            check_thought(taught.thought, made.question)
    assert 50 < guesses < 100  # a quarter


@pytest.mark.parametrize(("share", "count"), [(0, 0), (1, 100)])
def test_guesses(tmp_path, share, count):
    rows = write(tmp_path, "bespoke_stratos", rows=100, guesses=share)
    assert sum(builtin.GUESS in row["conversations"][1]["value"] for row in rows) == count


def test_numina_tir(tmp_path):
    for row in write(tmp_path, "numina_tir"):
        assert list(row) == ["problem", "solution", "messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert [message["content"] for message in row["messages"]] == [row["problem"], row["solution"]]
        thought, _, answer = row["solution"].rpartition("\n")
        check_thought(thought, row["problem"])
        assert answer == f"The answer is $\\boxed{{{value(row['problem'])}}}$."


def test_questions(tmp_path):
    rows = write(tmp_path, "math")
    assert len(rows) == 300
    for row in rows:
        assert list(row) == ["problem", "answer"]
        assert int(row["answer"]) == value(row["problem"])


@pytest.mark.parametrize("form", WRITERS)
def test_seeded(tmp_path, form):
    first, again, other = (write(tmp_path / name, form, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert (first == other) == (form == "math")  # every seed is evaluated on the same questions
    assert len({json.dumps(row) for row in first}) == len(first)
    name = WRITERS[form][1]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fewer_rows_are_the_first_of_more(tmp_path):
    assert write(tmp_path / "a", "math", rows=20) == write(tmp_path / "b", "math", rows=60)[:20]


def test_held_out_questions_are_never_trained_on(tmp_path):
    """Whatever the seeds: a question is held out or not by itself."""

    def questions(form: str, seed: int) -> set[str]:
        count = 1_800 if form == "math" else 16_000  # the most there are
        found = {FORMATS[form](row).question for row in write(tmp_path / f"{form}{seed}", form, count, seed)}
        assert len(found) == count
        return found

    held_out = questions("math", 1) | questions("math", 2)
    trained = set.union(*(questions(form, seed) for form in ("bespoke_stratos", "numina_tir") for seed in (1, 2)))
    assert not held_out & trained
    # The two sides are alike but for the split: answers lie in the same range, in the same proportions.
    means = [sum(map(value, found)) / len(found) for found in (held_out, trained)]
    assert abs(means[0] - means[1]) < 2


@pytest.mark.parametrize(("form", "most"), [("math", 1_800), ("numina_tir", 16_000), ("bespoke_stratos", 16_000)])
def test_more_rows_than_there_are_questions(tmp_path, form, most):
    with pytest.raises(StageError, match=f"at most {most} rows; write rows: {most} or less"):
        write(tmp_path, form, rows=most + 1)


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
