"""Judging answers: LaTeX with math-verify in processes that can be killed, plain numbers with decimals.

math-verify parses what a model wrote with sympy, and some texts (`\\boxed{1E99999999}`) make it compute for hours
or take all memory. Its own timeouts are alarms: they cannot interrupt one long operation on an integer, and they
fail outside the main thread. So it runs here in worker processes with a time and a memory limit of their own.
"""

import hashlib
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections import OrderedDict
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from typing import Literal

from pebble import ProcessPool

Reason = Literal["correct", "wrong", "unparsed", "gold_unparsed", "timeout", "error"]

UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(rf"-?{UNSIGNED}")
# A minus counts only where it cannot be one between two terms.
NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w.)])-\$?)?{UNSIGNED}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one answer compares with its gold."""

    correct: bool | None  # None: the gold itself cannot be read, so nothing can be said about the answer
    reason: Reason
    extracted: str  # the answer that was read out of the text, shortened to 200 characters; "" if there is none


class Verifier:
    """Compares LaTeX answers with golds, in worker processes that are killed when they take too long.

    The workers come from a fork server, a fresh process that has imported math_verify once: starting it is safe
    in a process with torch threads, and a killed worker is replaced within milliseconds. They start with the
    first call of `verify` and live until `close` or the end of the process. Not for use by several threads.

    Args:
        workers: number of processes; one judges 500 to 1000 short answers per second.
        limit: seconds that one pair may take on the clock before its worker is killed.
        memory_mib: address space of one worker in MiB; more makes an answer "unparsed", "wrong" or "error".
        remembered: number of verdicts kept between calls; the least recently used is forgotten first.

    Raises:
        ValueError: memory_mib is less than a worker needs to start.
    """

    def __init__(self, workers: int = 1, limit: float = 5.0, memory_mib: int = 2048, remembered: int = 100_000) -> None:
        if memory_mib < 512:
            raise ValueError(f"memory_mib is {memory_mib}, too little for math-verify; write 512 or more")
        self.limit = limit
        self.remembered = remembered
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["workflow.verify", "math_verify"])
        self._pool = ProcessPool(workers, initializer=_start_worker, initargs=(memory_mib,), context=context)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the verifier cannot be used afterwards."""
        self._pool.stop()
        self._pool.join()

    def verify(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """Judge (gold, answer) pairs as Open-R1's final accuracy reward does.

        The first match in the gold is the gold; in the answer all boxed expressions, or else LaTeX behind words
        such as "answer is" or `<answer>`. Equal pairs are judged once.

        Args:
            pairs: n texts of gold and answer; a bare LaTeX gold must be wrapped by `gold_text` first.

        Returns:
            n verdicts in the same order. An answer that is not read, takes too long ("timeout") or kills its
            worker ("error") is not correct; no text raises.

        Raises:
            ImportError: math-verify is not installed.
        """
        keys = [
            hashlib.blake2b(f"{len(gold)} {gold}{answer}".encode(), digest_size=16).digest() for gold, answer in pairs
        ]
        waiting = {}
        for key, pair in zip(keys, pairs, strict=True):
            if key not in self._verdicts and key not in waiting:
                waiting[key] = self._pool.schedule(_judge, args=(*pair, self.limit), timeout=self.limit)
        judged = {key: self._verdicts[key] for key in keys if key in self._verdicts}
        for key, future in waiting.items():
            try:
                judged[key] = future.result()
            except ImportError:
                raise  # math-verify is not installed: no answer can be judged
            except TimeoutError:
                judged[key] = Verdict(False, "timeout", "")
            except Exception:
                # Whatever math-verify raised, or pebble's ProcessExpired: a model can write anything, and the
                # reason says that this answer was not compared.
                judged[key] = Verdict(False, "error", "")
        for key, verdict in judged.items():
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
        while len(self._verdicts) > self.remembered:
            self._verdicts.popitem(last=False)
        return [judged[key] for key in keys]


def gold_text(solution: str) -> str:
    """A gold that math-verify reads whole: bare LaTeX such as `(3, \\frac{1}{2})` is put between dollar signs.

    Without them math-verify looks for plain numbers and takes `(3, 4)` for 4. A solution that marks its LaTeX
    (`$`, `\\boxed`, `\\(`, `\\[`) is returned as it is.
    """
    marked = any(mark in solution for mark in ("$", "\\boxed", "\\(", "\\["))
    return solution if marked or not solution.strip() else f"${solution.strip()}$"


def number(text: str) -> Decimal | None:
    """The number that is all of the text, but for commas, a dollar sign, `\\boxed{}` and a final period; else None."""
    plain = text.strip().removesuffix(".")
    if plain.startswith("\\boxed{") and plain.endswith("}"):
        plain = plain.removeprefix("\\boxed{").removesuffix("}")
    plain = plain.replace("$", "", 1)
    return Decimal(plain.replace(",", "")) if NUMBER.fullmatch(plain) else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text (`3-5` ends in 5, not in -5), or None where there is none."""
    found = NUMBER_IN_TEXT.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def _start_worker(memory_mib: int) -> None:
    """Make this process one that dies when told to, prints nothing and cannot take the machine's memory."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for the operation to end
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    sys.set_int_max_str_digits(0)  # long integers are bounded by the time limit, and compared instead of refused
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - math_verify prints what it cannot parse
    logging.disable(logging.CRITICAL)


@cache
def _answer_config() -> list:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        nits=False, malformed_operators=False, basic_latex=True, equations=True, boxed="all", units=True
    )
    return [
        LatexExtractionConfig(
            normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
        )
    ]


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list:
    from math_verify import parse

    return parse(gold, extraction_mode="first_match", parsing_timeout=0)


def _judge(gold: str, answer: str, limit: float) -> Verdict:
    """One comparison, in a worker. Zero turns math-verify's own alarms off: a slow answer is then a "timeout"."""
    from math_verify import parse, verify

    # The kernel ends this process should it go on after the main process, which counts the limit, was killed.
    signal.setitimer(signal.ITIMER_PROF, 2 * math.ceil(limit))
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return Verdict(None, "gold_unparsed", "")
    parsed = parse(answer, extraction_config=_answer_config(), extraction_mode="first_match", parsing_timeout=0)
    if not parsed:
        return Verdict(False, "unparsed", "")
    correct = verify(parsed_gold, parsed, timeout_seconds=0)
    return Verdict(correct, "correct" if correct else "wrong", str(parsed[0])[:200])
