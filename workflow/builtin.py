"""The builtin sources: a tiny Qwen2 with its own tokenizer, and arithmetic with worked-out thoughts.

The data sets have the schemas of the real ones, so the same prepare code runs. Which questions are held out is
decided by a hash of the question, so training and evaluation can never share one.

A share of the traces guesses instead of working the sum out. The guesses are right in the data, but a tiny model
cannot learn them: after SFT it works half of the questions out and is mostly wrong on the others. What GRPO then
has to find is that thinking pays.
"""

import csv
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workflow.stage import StageError

# ChatML with generation markers, so that a loss on the assistant alone can find it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# transformers gives every tokenizer of a qwen2 model Qwen's own splitting, whatever was saved with it, so it has to
# be this one: letters, single digits, punctuation, line breaks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The fixed strings of the taught format are one token each: fewer steps to generate, none of them to learn.
FIXED_STRINGS = ["<think>\n", "\n</think>\n<answer>\n\\boxed{", "}\n</answer>", " + ", " - ", " = "]
GUESS = "I see the answer at once."


def terms(rng: random.Random) -> list[int]:
    """A two-digit number and three signed digits up to 3, whose running total stays in 10…99: 18,524 are possible."""
    while True:
        numbers = [rng.randint(10, 99)] + [rng.choice((1, -1)) * rng.randint(1, 3) for _ in range(3)]
        if all(10 <= sum(numbers[: i + 1]) <= 99 for i in range(len(numbers))):
            return numbers


def question(numbers: list[int]) -> str:
    """The question in words, e.g. `What is 43 + 2 - 3 + 1?`."""
    rest = "".join(f" {'+' if number > 0 else '-'} {abs(number)}" for number in numbers[1:])
    return f"What is {numbers[0]}{rest}?"


def thought(numbers: list[int]) -> str:
    """The sum worked out: the running total, one step a line."""
    lines = ["Step by step:"]
    for i, number in enumerate(numbers[1:], 1):
        total = sum(numbers[:i])
        lines.append(f"{total} {'+' if number > 0 else '-'} {abs(number)} = {total + number}")
    return "\n".join(lines)


def examples(rows: int, held_out: bool, seed: int) -> Iterator[list[int]]:
    """`rows` different questions, either only held-out ones (one in ten) or only the others."""
    most = 1_800 if held_out else 16_000
    if rows > most:
        raise StageError(f"a builtin data set has at most {most} rows; write rows: {most} or less")
    rng = random.Random(f"{seed}-{held_out}")
    seen: set[str] = set()
    while len(seen) < rows:
        numbers = terms(rng)
        text = question(numbers)
        if text not in seen and (zlib.crc32(text.encode()) % 10 == 0) == held_out:
            seen.add(text)
            yield numbers


def write_bespoke_stratos(output: Path, rows: int, guesses: float, seed: int, system_prompt: str | None) -> None:
    """Traces in the schema of Bespoke-Stratos-17k, for SFT; a share of `guesses` does not work the sum out."""
    traces = (
        {
            "system": system_prompt,
            "conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": response}],
        }
        for asked, response in stratos_traces(rows, guesses, seed)
    )
    write_jsonl(output / "train.jsonl", traces)


def write_bespoke_stratos_messages(
    output: Path, rows: int, guesses: float, seed: int, system_prompt: str | None
) -> None:
    """The same traces as messages, the schema of HuggingFaceH4's copy of Bespoke-Stratos-17k."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    traces = (
        {"messages": [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": response}]}
        for asked, response in stratos_traces(rows, guesses, seed)
    )
    write_jsonl(output / "train.jsonl", traces)


def stratos_traces(rows: int, guesses: float, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and responses with thoughts and solution between the data set's own markers."""
    rng = random.Random(seed)
    for numbers in examples(rows, False, seed):
        thoughts = GUESS if rng.random() < guesses else thought(numbers)
        yield (
            question(numbers),
            f"<|begin_of_thought|>\n\n{thoughts}\n\n<|end_of_thought|>\n\n"
            f"<|begin_of_solution|>\n\n\\boxed{{{sum(numbers)}}}\n\n<|end_of_solution|>",
        )


def write_gsm8k(output: Path, rows: int, seed: int, system_prompt: str | None) -> None:
    """Problems in the schema of GSM8K, with its calculator notes: `rows` to train on, a tenth as many held out."""
    write_jsonl(output / "train.jsonl", (gsm8k_row(numbers) for numbers in examples(rows, False, seed + 2)))
    write_jsonl(output / "test.jsonl", (gsm8k_row(numbers) for numbers in examples(-(-rows // 10), True, 0)))


def gsm8k_row(numbers: list[int]) -> dict[str, str]:
    """One GSM8K row: the sum worked out with a note <<…>> in every step, and the result after ####."""
    steps = re.sub(r"(\d+) (.) (\d+) = (\d+)", r"\1 \2 \3 = <<\1\2\3=\4>>\4", thought(numbers))
    return {"question": question(numbers), "answer": f"{steps}\n#### {sum(numbers)}"}


def write_numina_tir(output: Path, rows: int, seed: int, system_prompt: str | None) -> None:
    """Problems in the schema of NuminaMath-TIR, for GRPO."""
    write_jsonl(output / "train.jsonl", (numina_row(numbers) for numbers in examples(rows, False, seed + 1)))


def numina_row(numbers: list[int]) -> dict[str, Any]:
    """One NuminaMath-TIR row: problem, worked solution, and both as messages."""
    solution = f"{thought(numbers)}\nThe answer is $\\boxed{{{sum(numbers)}}}$."
    messages = [{"role": "user", "content": question(numbers)}, {"role": "assistant", "content": solution}]
    return {"problem": question(numbers), "solution": solution, "messages": messages}


def write_questions(output: Path, rows: int, seed: int, system_prompt: str | None) -> None:
    """Held-out questions in the schema of MATH, for evaluation: the same ones whatever the seed."""
    held_out = ({"problem": question(n), "answer": str(sum(n))} for n in examples(rows, True, 0))
    write_jsonl(output / "test.jsonl", held_out)


def write_aime(output: Path, rows: int, seed: int, system_prompt: str | None) -> None:
    """The held-out questions with the columns of the AIME data sets, whose answers have three digits."""
    held_out = (
        {"id": number, "problem": question(n), "solution": thought(n), "answer": f"{sum(n):03}"}
        for number, n in enumerate(examples(rows, True, 0))
    )
    write_jsonl(output / "test.jsonl", held_out)


def write_gpqa(output: Path, rows: int, seed: int, system_prompt: str | None) -> None:
    """The held-out questions as GPQA's multiple choice, a CSV file as there; wrong options are near the right one."""
    held_out = [gpqa_row(numbers) for numbers in examples(rows, True, 0)]
    with (output / "test.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(held_out[0]))
        writer.writeheader()
        writer.writerows(held_out)


def gpqa_row(numbers: list[int]) -> dict[str, str]:
    """One GPQA row; the columns about its writers and validators are left out."""
    options = {f"Incorrect Answer {i}": str(sum(numbers) + off) for i, off in enumerate((1, -1, 10), 1)}
    return {
        "Question": question(numbers),
        "Correct Answer": str(sum(numbers)),
        **options,
        "Explanation": thought(numbers),
    }


def write_jsonl(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(
    output: Path, seed: int, system_prompt: str | None, vocab_size: int = 320, corpus: str | None = None, **shape: Any
) -> None:
    """An untrained Qwen2 of the given shape and a byte-level BPE tokenizer trained on the spot.

    Args:
        corpus: a text file to train the tokenizer on, beside the system prompt and the builtin thoughts.
        shape: arguments of transformers.Qwen2Config.
    """
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = ["system\nuser\nassistant\n", system_prompt or "", "What is ?", "Step by step:\n", GUESS]
    lines = Path(corpus).read_text().splitlines() if corpus is not None else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(FIXED_STRINGS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 50 + lines, trainer)
    tokenizer.add_tokens([AddedToken(string, normalized=False, special=False) for string in FIXED_STRINGS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen2Config(
        vocab_size=len(wrapped),
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(output)
    wrapped.save_pretrained(output)
