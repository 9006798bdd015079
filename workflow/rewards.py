"""Rewards: what a completion earns. A function per name in params.REWARDS, in that order; the table is FUNCTIONS.

TRL calls a reward with the completions in chat form and, as keywords, the columns of the data (`solution` is the
gold answer), the prompts, the token ids of the completions, and two functions that write to the training log. It
returns one float per completion, or None where a row cannot be judged; TRL leaves that reward out for the row.
Keyword-only parameters are the options, `reward_options` in params.yaml.

Names with `_as_published` compute what the published system computed, mistakes included.

Rewards that compare LaTeX answers log shares of the batch: `verify/unparsed`, `verify/gold_unparsed`,
`verify/timeout`, `verify/error` and `verify/unjudged`; the answer they read is a column of the logged completions.
"""

import ast
import difflib
import faulthandler
import importlib
import importlib.util
import inspect
import json
import math
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from workflow import prompts
from workflow.params import GRPOPhase, ParamsError
from workflow.stage import StageError
from workflow.verify import Verdict, Verifier, gold_text, number

Completion = list[dict[str, str]]
Reward = Callable[..., list[float | None]]
Log = Callable[[str, Any], None]
Positive = Annotated[int, Field(gt=0)]

# Seconds that one reward may spend on comparing the answers of one batch; what is left then earns None.
VERIFY_SECONDS = 30.0

# Nothing can be said about the answer.
UNKNOWN = ("gold_unparsed", "error", "unjudged")

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


# What the rewards share


def unlogged(name: str, value: Any) -> None:
    """Takes the place of TRL's `log_metric` and `log_extra` where no trainer runs."""


def texts(completions: list[Completion]) -> list[str]:
    """What the model wrote, n texts."""
    return [completion[0]["content"] for completion in completions]


def judge(
    completions: list[Completion],
    solution: list[str],
    verifier: Verifier,
    log_metric: Log = unlogged,
    published: bool = False,
) -> list[Verdict]:
    """Compare the answers of n completions with their golds, in at most VERIFY_SECONDS; log how many were not read."""
    golds = solution if published else [gold_text(gold) for gold in solution]
    answers = [judged_part(text) for text in texts(completions)]
    verdicts = verifier.verify(list(zip(golds, answers, strict=True)), within=VERIFY_SECONDS, published=published)
    for reason in ("unparsed", "gold_unparsed", "timeout", "error", "unjudged"):
        log_metric(f"verify/{reason}", sum(verdict.reason == reason for verdict in verdicts) / len(verdicts))
    return verdicts


def judged_part(text: str) -> str:
    """The text without its thought where math-verify could read nothing in the thought anyway.

    It reads \\boxed{}, and LaTeX between its marks or behind the word "answer", so a thought without them changes no
    verdict; without it, the many equal answers of a group are verified once.
    """
    answer = prompts.answer_part(text)
    thought = text.removesuffix(answer).lower()
    return text if any(mark in thought for mark in ("\\", "$", "answer")) else answer


# Open-R1


def accuracy(
    completions: list[Completion],
    solution: list[str],
    verifier: Verifier,
    log_metric: Log = unlogged,
    log_extra: Log = unlogged,
    **columns: Any,
) -> list[float | None]:
    """1.0 where math-verify finds the answer equal to the gold, else 0.0; Open-R1's final state (July 2025).

    None where the gold cannot be read, the comparison fails with an exception or there was no time for it. An answer
    that cannot be read or takes too long earns 0.0.
    """
    verdicts = judge(completions, solution, verifier, log_metric)
    log_extra("accuracy/answer", [verdict.extracted for verdict in verdicts])
    return [None if v.reason in UNKNOWN else float(v.correct is True) for v in verdicts]


def accuracy_as_published(
    completions: list[Completion],
    solution: list[str],
    verifier: Verifier,
    log_metric: Log = unlogged,
    log_extra: Log = unlogged,
    **columns: Any,
) -> list[float | None]:
    """`accuracy` as it was in Open-R1 from January 2025 (commit e450a6f) to 2025-04-01: 1.0 or 0.0.

    The gold is read only where it is marked as LaTeX, and one that cannot be read earns 1.0 whatever the answer is: a
    gold `72` without dollar signs rewards everything. Gold and answer are swapped in the comparison. None only
    where there was no time for it.
    """
    verdicts = judge(completions, solution, verifier, log_metric, published=True)
    log_extra("accuracy_as_published/answer", [verdict.extracted for verdict in verdicts])
    return [
        None if v.reason == "unjudged" else float(v.correct is True or v.reason == "gold_unparsed") for v in verdicts
    ]


def format(completions: list[Completion], **columns: Any) -> list[float | None]:
    """1.0 where the whole text is `<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>`, else 0.0.

    Stricter than Open-R1's, whose pattern lets more lines follow: here the model has to stop after the answer.
    """
    return [float(prompts.parse(text) is not None) for text in texts(completions)]


def format_as_published(completions: list[Completion], **columns: Any) -> list[float | None]:
    """1.0 where `^<think>.*?</think><answer>.*?</answer>$` matches, else 0.0; Open-R1 in January 2025.

    Without DOTALL the dot is no newline, so a thought of more than one line, and every text in the format that is
    taught here, earns 0.0.
    """
    pattern = re.compile(r"^<think>.*?</think><answer>.*?</answer>$")
    return [float(pattern.match(text) is not None) for text in texts(completions)]


def tag_count(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.25 for each of the four tags, with its newlines, that occurs exactly once; from 0 to 1 (Open-R1)."""
    return [sum(0.25 for tag in TAGS if text.count(tag) == 1) for text in texts(completions)]


def reasoning_steps(completions: list[Completion], **columns: Any) -> list[float | None]:
    """A third for each sign of a step, at most 1.0 (Open-R1).

    Signs are `Step 1:`, a line that starts with `1.`, a line that starts with `-` or `*`, and `First,` `Second,`
    `Next,` `Finally,`. Open-R1 forgot MULTILINE: there `1.` counts only where the text starts with it.
    """
    sign = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,", re.MULTILINE)
    return [min(1.0, len(sign.findall(text)) / 3) for text in texts(completions)]


def length(
    completions: list[Completion],
    solution: list[str],
    verifier: Verifier,
    prompts: list[Any],
    log_metric: Log = unlogged,
    **columns: Any,
) -> list[float | None]:
    """Short right answers earn most: from -0.5 to 0.5, by the length in characters among a prompt's completions.

    λ = 0.5 - (length - shortest) / (longest - shortest); a right answer, or one whose gold cannot be read, earns λ, a
    wrong one min(0, λ), and all earn 0 where all have one length. Kimi k1.5 (arXiv 2501.12599, section 2.3.3), as in
    Open-R1, which however took shortest and longest from the whole batch. The completions of a prompt lie side by
    side; where a group is split over processes, each compares its own part.
    """
    verdicts = judge(completions, solution, verifier, log_metric)
    sizes = [len(text) for text in texts(completions)]
    rewards: list[float | None] = []
    for _, group in groupby(range(len(prompts)), key=lambda row: prompts[row]):
        rows = list(group)
        shortest, longest = min(sizes[row] for row in rows), max(sizes[row] for row in rows)
        for row in rows:
            if shortest == longest:
                rewards.append(0.0)
            elif verdicts[row].reason in ("error", "unjudged"):
                rewards.append(None)
            else:
                shorter = 0.5 - (sizes[row] - shortest) / (longest - shortest)
                right = verdicts[row].reason in ("correct", "gold_unparsed")
                rewards.append(shorter if right else min(0.0, shorter))
    return rewards


def cosine(
    completions: list[Completion],
    solution: list[str],
    verifier: Verifier,
    log_metric: Log = unlogged,
    *,
    max_length: Positive = 1000,
    min_value_wrong: float = 0.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """Correctness on a cosine of the length in characters: lo + (hi - lo) / 2 · (1 + cos(π · length / max_length)).

    (lo, hi) is (min_value_correct, max_value_correct) where the answer is right and (max_value_wrong,
    min_value_wrong), the ends swapped, where it is wrong: `hi` is earned by an empty text, `lo` by one of max_length.
    1.0 where the gold cannot be read. Arithmetic and defaults are Open-R1's, with which a long wrong answer earns
    less than a short one; "Demystifying long chain-of-thought" (arXiv 2502.03373, appendix C.1) wants the opposite:
    min_value_wrong -0.5 and max_value_wrong 0.0. Not cut off at max_length: beyond it the cosine turns back. TRL's
    function for this counts tokens, and cuts off.
    """
    rewards: list[float | None] = []
    for text, verdict in zip(texts(completions), judge(completions, solution, verifier, log_metric), strict=True):
        correct = (min_value_correct, max_value_correct)
        low, high = correct if verdict.correct else (max_value_wrong, min_value_wrong)
        if verdict.reason == "gold_unparsed":
            rewards.append(1.0)
        elif verdict.reason in ("error", "unjudged"):
            rewards.append(None)
        else:
            rewards.append(low + (high - low) / 2 * (1 + math.cos(math.pi * len(text) / max_length)))
    return rewards


def repetition_penalty(
    completions: list[Completion],
    *,
    ngram_size: Positive = 3,
    max_penalty: Annotated[float, Field(le=0)] = -1.0,
    **columns: Any,
) -> list[float | None]:
    """max_penalty times the share of repeated n-grams, 1 - different / all; 0.0 for a text of fewer than n words.

    Words are what stands between blanks, in lower case: Open-R1's English variant of "Demystifying long
    chain-of-thought" (arXiv 2502.03373, appendix C.2). TRL's function for this counts n-grams of tokens.
    """
    rewards: list[float | None] = []
    for text in texts(completions):
        words = text.lower().split()
        ngrams = list(zip(*(words[start:] for start in range(ngram_size)), strict=False))
        repeated = len(ngrams) - len(set(ngrams))
        rewards.append(repeated / len(ngrams) * max_penalty if repeated else 0.0)
    return rewards


def soft_overlong_punishment(
    completion_ids: list[list[int]],
    *,
    max_completion_length: Positive = 16384,
    soft_punish_cache: Annotated[int, Field(ge=0)] = 4096,
    **columns: Any,
) -> list[float | None]:
    """0 up to L - C tokens, (L - C - length) / C up to L, -1 beyond: DAPO (arXiv 2503.14476, eq. 13), by TRL.

    L is max_completion_length, C is soft_punish_cache.
    """
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(max_completion_length, soft_punish_cache)(completion_ids)


# R1-Zero on GSM8K: correctness, int, strict_format, soft_format and xmlcount, at most 4 together


def tagged_answer(text: str) -> str:
    """What stands between the last `<answer>` and the next `</answer>`, stripped; all of it where a tag is missing."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def correctness(
    completions: list[Completion],
    solution: list[str],
    log_metric: Log = unlogged,
    log_extra: Log = unlogged,
    **columns: Any,
) -> list[float | None]:
    """2.0 where the tagged answer equals the gold, else 0.0: as numbers where both are, else letter by letter.

    Numbers are read by `workflow.verify.number`, so 1,000 and `\\boxed{1000.0}` are one number. Logs the share of
    answers and of golds that are no numbers as `verify/unparsed` and `verify/gold_unparsed`.
    """
    answers = [tagged_answer(text) for text in texts(completions)]
    pairs = [(number(answer), number(gold)) for answer, gold in zip(answers, solution, strict=True)]
    log_metric("verify/unparsed", sum(answer is None for answer, _ in pairs) / len(pairs))
    log_metric("verify/gold_unparsed", sum(gold is None for _, gold in pairs) / len(pairs))
    log_extra("correctness/answer", answers)
    return [
        2.0 if (text == gold if None in pair else pair[0] == pair[1]) else 0.0
        for text, gold, pair in zip(answers, solution, pairs, strict=True)
    ]


def correctness_as_published(
    completions: list[Completion], solution: list[str], log_extra: Log = unlogged, **columns: Any
) -> list[float | None]:
    """2.0 where the tagged answer is the gold letter by letter, else 0.0: `1000` never equals the gold `1,000`."""
    answers = [tagged_answer(text) for text in texts(completions)]
    log_extra("correctness_as_published/answer", answers)
    return [2.0 if answer == gold else 0.0 for answer, gold in zip(answers, solution, strict=True)]


def int_(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.5 where the tagged answer is a number that `correctness` can compare, else 0.0.

    Signs, decimals, thousands separators, a dollar sign and `\\boxed{}` are allowed.
    """
    return [0.5 if number(tagged_answer(text)) is not None else 0.0 for text in texts(completions)]


def int_as_published(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.5 where the tagged answer is digits only, else 0.0: -3, 2.5 and 1,000 earn nothing."""
    return [0.5 if tagged_answer(text).isdigit() else 0.0 for text in texts(completions)]


def strict_format(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.5 where the whole text is in the taught format, with or without a newline after it, else 0.0."""
    return [0.5 if prompts.parse(text.removesuffix("\n")) else 0.0 for text in texts(completions)]


def strict_format_as_published(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.5 where the published pattern matches, else 0.0.

    Without DOTALL it matches thoughts and answers of one line only, and it asks for a newline at the end.
    """
    pattern = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>\n$")
    return [0.5 if pattern.match(text) else 0.0 for text in texts(completions)]


def soft_format(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.5 where the text starts with a thought and an answer between their tags, else 0.0; anything may follow."""
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    return [0.5 if pattern.match(text) else 0.0 for text in texts(completions)]


def soft_format_as_published(completions: list[Completion], **columns: Any) -> list[float | None]:
    """`soft_format` without DOTALL: a thought or an answer of more than one line earns 0.0."""
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>")
    return [0.5 if pattern.match(text) else 0.0 for text in texts(completions)]


def xmlcount(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.125 for each of the four tags that occurs exactly once, less 0.001 for each character behind the last."""
    rewards: list[float | None] = []
    for text in texts(completions):
        behind = text.partition(TAGS[-1])[2].removeprefix("\n")
        rewards.append(sum(0.125 for tag in TAGS if text.count(tag) == 1) - 0.001 * len(behind))
    return rewards


def xmlcount_as_published(completions: list[Completion], **columns: Any) -> list[float | None]:
    """0.125 for each of the four tags that occurs exactly once, less 0.001 for each character after the end.

    What counts as "after" `\\n</answer>\\n` is the whole text where no newline follows the last tag, so at most 0.5 is
    earned, by a text that ends in `\\n</answer>\\n`, and long texts without that newline earn less than nothing.
    """
    rewards: list[float | None] = []
    for text in texts(completions):
        reward = sum(0.125 for tag in TAGS if text.count(tag) == 1)
        if text.count("\n<answer>\n") == 1:
            reward -= 0.001 * len(text.split("\n</answer>\n")[-1])
        if text.count("\n</answer>") == 1:
            reward -= 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
        rewards.append(reward)
    return rewards


FUNCTIONS: dict[str, Reward] = {
    "accuracy": accuracy,
    "accuracy_as_published": accuracy_as_published,
    "format": format,
    "format_as_published": format_as_published,
    "tag_count": tag_count,
    "reasoning_steps": reasoning_steps,
    "length": length,
    "cosine": cosine,
    "repetition_penalty": repetition_penalty,
    "soft_overlong_punishment": soft_overlong_punishment,
    "correctness": correctness,
    "correctness_as_published": correctness_as_published,
    "int": int_,
    "int_as_published": int_as_published,
    "strict_format": strict_format,
    "strict_format_as_published": strict_format_as_published,
    "soft_format": soft_format,
    "soft_format_as_published": soft_format_as_published,
    "xmlcount": xmlcount,
    "xmlcount_as_published": xmlcount_as_published,
}


# From a phase of params.yaml to what GRPOTrainer takes


def reward_functions(phase: GRPOPhase, verifier: Verifier, models: Path) -> list[Reward | str]:
    """What to pass to GRPOTrainer as `reward_funcs`, in the order of `phase.rewards`.

    Args:
        verifier: compares LaTeX answers, for the rewards that do.
        models: the folder of reward models.

    Returns:
        Functions whose `__name__` is the reward's name, under which TRL logs them, and for reward models the folder,
        which TRL loads with its tokenizer.

    Raises:
        ParamsError: an option or an own reward does not exist.
        StageError: a reward model cannot be used as one.
    """
    check_rewards(phase)
    return [_reward(name, phase, verifier, models) for name in phase.rewards]


def _reward(name: str, phase: GRPOPhase, verifier: Verifier, models: Path) -> Reward | str:
    options = phase.reward_options.get(name, {})
    if name in FUNCTIONS:
        return checked(name, partial(FUNCTIONS[name], verifier=verifier, **options), phase.reward_seconds)
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # an own module can raise anything when it is imported
            raise ParamsError(f"rewards has {name!r}, which cannot be imported: {_cause(error)}") from error
        return checked(name, partial(function, **options), phase.reward_seconds)
    return _model(models / name)


GRACE = 30.0  # seconds; a process that has to wait for a core or a disk is not one that hangs


class OutOfTime(BaseException):
    """A reward has taken too long; no Exception, which an own reward may catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the `with` block after so many seconds, and again every second.

    Python cannot interrupt a long operation in C, nor another thread than the main one. So after twice the time, and
    not before GRACE, the process ends with exit code 1, and where it hung is on stderr.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    faulthandler.dump_traceback_later(max(2 * seconds, GRACE), exit=True, file=sys.__stderr__)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def checked(name: str, reward: Reward, seconds: float = 600.0) -> Reward:
    """The reward under its name, with whatever goes wrong in it as one sentence.

    Args:
        seconds: that one call may take.

    Raises:
        StageError: when called, where the reward raises, takes too long, or does not return one finite number or None
            per completion.
    """

    def call(completions: list[Completion], **columns: Any) -> list[float | None]:
        step = f" in step {columns['trainer_state'].global_step + 1}" if "trainer_state" in columns else ""
        try:
            with time_limit(seconds):
                found = reward(completions=completions, **columns)
        except OutOfTime as error:
            place = traceback.extract_tb(error.__traceback__)[-2]  # the last one is where it is raised
            raise StageError(
                f"reward {name} took more than {seconds:g} s{step}, at line {place.lineno} of {place.filename}; make "
                "it faster, or write more reward_seconds under the phase"
            ) from error
        except Exception as error:  # an own reward can raise anything
            raise StageError(f"reward {name} failed{step}: {_cause(error)}; mend it") from error
        if not isinstance(found, list | tuple) or len(found) != len(completions):
            size = f" of {len(found)}" if isinstance(found, list | tuple) else ""
            raise StageError(
                f"reward {name} returned{step} a {type(found).__name__}{size} for {len(completions)} completions; "
                "return a list with one number or None for each"
            )
        for row, value in enumerate(found):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                where = f", row {columns['id'][row]}" if "id" in columns else ""
                raise StageError(
                    f"reward {name} returned {value!r}{step} for completion {row} of {len(found)}{where}; return a "
                    "finite number, or None where there is nothing to say"
                )
        return [None if value is None else float(value) for value in found]

    call.__name__ = name
    return call


def _cause(error: Exception) -> str:
    """Type, message and place of an exception, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__} ({message}) in line {place.lineno} of {place.filename}"


def _model(folder: Path) -> str:
    """The folder of a reward model, checked: TRL would put a new, random head on a model with another one."""
    from transformers import AutoTokenizer

    file = folder / "config.json"
    if not file.is_file():
        raise StageError(f"reward model {folder} has no config.json; name a model under sources")
    config = json.loads(file.read_text())
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise StageError(
            f"reward model {folder} has {labels} labels; name a sequence classification model with one (num_labels=1)"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise StageError(f"reward model {folder} has no tokenizer; TRL needs the model's own in its folder")
    if AutoTokenizer.from_pretrained(folder).chat_template is None:
        raise StageError(f"the tokenizer of reward model {folder} has no chat template; write chat_template under it")
    return str(folder)


def check_rewards(phase: GRPOPhase) -> None:
    """Raise ParamsError where an own reward cannot be found or an option does not exist; imports no own module."""
    for name in phase.rewards:
        options = phase.reward_options.get(name, {})
        if name in FUNCTIONS:
            _check_options(name, options)
        elif "." in name:
            _check_own(name, options)
        elif options:
            raise ParamsError(f"reward_options.{name} belongs to a reward model, which has no options; remove it")


def _check_options(name: str, options: dict[str, Any]) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    known = {
        parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option, value in options.items():
        if option not in known:
            instead = f"write one of: {', '.join(known)}" if known else "it has none, so remove it"
            raise ParamsError(f"reward_options.{name} has {option!r}, which is no option of {name}; {instead}")
        try:
            TypeAdapter(known[option]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise ParamsError(f"reward_options.{name}.{option} is {value!r}; write what fits: {reason}") from None


def _check_own(name: str, options: dict[str, Any]) -> None:
    """Look an own reward up in the source of its module, which may import torch or start a server."""
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ParamsError(f"rewards has {name!r}, which is a part of Python and no reward; write a module of your own")
    instead = "write module.function, with the module in the current folder or installed"
    try:
        found = importlib.util.find_spec(module)  # imports the packages around the module
    except ModuleNotFoundError as error:
        raise ParamsError(f"rewards has {name!r}, which cannot be found ({error}); {instead}") from None
    if found is None or not str(found.origin).endswith(".py"):
        raise ParamsError(f"rewards has {name!r}, which cannot be found (no Python file is {module}); {instead}")
    try:
        tree = ast.parse(Path(found.origin).read_bytes())
    except SyntaxError as error:
        raise ParamsError(f"rewards has {name!r}, but line {error.lineno} of {found.origin} is not Python") from None
    names = {name for node in ast.walk(tree) for name in _defined(node)}
    if attribute not in names and "*" not in names:
        close = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {module}.{close[0]}?" if close else "; define it there"
        raise ParamsError(f"rewards has {name!r}, but {found.origin} has no {attribute}{hint}")
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name == attribute:
            raise ParamsError(f"rewards has {name!r}, which is a coroutine; write it with def, not async def")
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            known = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            strange = [option for option in options if option not in known]
            if strange:
                raise ParamsError(
                    f"reward_options.{name} has {strange[0]!r}, which is no parameter of it; write one of: "
                    f"{', '.join(known)}"
                )


def _defined(node: ast.AST) -> list[str]:
    """The names that a statement brings into being, wherever it stands."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [node.asname or node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return []


# Before training: do the golds themselves earn the most?


@dataclass(frozen=True, slots=True)
class DryRun:
    """What the gold solutions earn of one reward."""

    reward: str
    mean: float | None  # over the golds that can be judged; None: not run, or there are none
    maximum: float | None  # what the mean should be; None: the reward has no best text
    unreadable: int  # golds that the reward cannot read: never rewarded, or always in accuracy_as_published


# xmlcount_as_published has none: it takes the taught format, which has no newline at its end, for a very long tail.
MAXIMA = {
    "accuracy": 1.0,
    "accuracy_as_published": 1.0,
    "format": 1.0,
    "format_as_published": 1.0,
    "tag_count": 1.0,
    "correctness": 2.0,
    "correctness_as_published": 2.0,
    "int": 0.5,
    "int_as_published": 0.5,
    "strict_format": 0.5,
    "strict_format_as_published": 0.5,
    "soft_format": 0.5,
    "soft_format_as_published": 0.5,
    "xmlcount": 0.5,
}


def dry_run(phase: GRPOPhase, solutions: list[str], verifier: Verifier) -> list[DryRun]:
    """Reward the gold solutions themselves, put into the taught format behind a thought of two lines.

    Rewards that read LaTeX get the gold as it is, between dollar signs where it is bare; math-verify takes the same
    part of a worked solution for the answer on both sides. The others get it as plain text. Reward models, own rewards
    and soft_overlong_punishment are not run: they want more than text.

    Args:
        solutions: n golds, the column `solution`.

    Returns:
        One entry per reward of the phase, in order.
    """
    return [_dry_run(name, phase.reward_options.get(name, {}), solutions, verifier) for name in phase.rewards]


def _dry_run(name: str, options: dict[str, Any], solutions: list[str], verifier: Verifier) -> DryRun:
    if name not in FUNCTIONS or name == "soft_overlong_punishment":
        return DryRun(name, None, None, 0)
    reads_latex = "verifier" in inspect.signature(FUNCTIONS[name]).parameters
    answers = [gold_text(gold) for gold in solutions] if reads_latex else solutions
    completions = [
        [{"role": "assistant", "content": prompts.build("One line.\nAnother line.", answer)}] for answer in answers
    ]
    reward = checked(name, partial(FUNCTIONS[name], verifier=verifier, **options))
    earned = reward(completions, solution=solutions, prompts=list(range(len(solutions))))
    judged = [value for value in earned if value is not None]
    unreadable = 0
    if reads_latex:
        verdicts = judge(completions, solutions, verifier, published=name.endswith("_as_published"))
        unreadable = sum(verdict.reason == "gold_unparsed" for verdict in verdicts)
    elif name.startswith("correctness"):
        unreadable = sum(number(gold) is None for gold in solutions)
    return DryRun(name, sum(judged) / len(judged) if judged else None, MAXIMA.get(name), unreadable)
