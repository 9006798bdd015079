"""Judging answers: LaTeX with math-verify in processes that can be killed, plain numbers with decimals.

math-verify parses what a model wrote with sympy, and some texts (`\\boxed{1E99999999}`) make it compute for hours
or take all memory. Its own timeouts are alarms: they cannot interrupt one long operation on an integer, and they
fail outside the main thread. So it runs here in worker processes with a time and a memory limit of their own.
"""

import gc
import hashlib
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache, partial
from multiprocessing import forkserver, resource_tracker
from typing import Any, Literal

from pebble import CONSTS, ProcessPool

from workflow.stage import Progress

Reason = Literal["correct", "wrong", "unparsed", "gold_unparsed", "timeout", "error", "unjudged"]

UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(rf"-?{UNSIGNED}")
# A minus counts only where it cannot be one between two terms.
NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w.)])-\$?)?{UNSIGNED}")

CHUNK = 32  # pairs that a worker is handed at a time: handing one over costs as much as judging an easy one
CHUNK_SECONDS = 1.0  # of computing for one of them; if it takes more, all are judged again, singly

# What math-verify looks for in an answer, see `decisive`.
ANCHOR = re.compile(r"(?i:(?:final )?answer)")
BEGIN = re.compile(r"[$\\\[]")
PERCENT = ("%", "ercent", "pct", "Pct")
BRACE = re.compile(r"[{}]")
LATEX_BEHIND_ANCHOR = re.compile(
    r"(?P<final>(?i:final ))?(?i:answer)(?P<between>[^$\\\[]{0,49})(?<!\d)\$(?P<latex>[^$\n]*[^$\n\\])\$"
    r"(?!\s*(?:\\?%|[Pp]ercent|[Pp]ct|and|or|,))"
)
WHOLE_NUMBER_GOLD = re.compile(r"\$(-?[0-9]{1,30})\$")
WHOLE_NUMBER_ANSWER = re.compile(r"\\boxed\{(-?[0-9]{1,30})\}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one answer compares with its gold."""

    correct: bool | None  # None: the gold cannot be read, or the time was over; nothing is said about the answer
    reason: Reason
    extracted: str  # the answer that was read out of the text, shortened to 200 characters; "" if there is none


class Verifier:
    """Compares LaTeX answers with golds, in worker processes that are killed when they take too long.

    The workers come from a fork server, a fresh process that has imported math_verify once: starting it is safe
    in a process with torch threads, and a killed worker is replaced within milliseconds. They start with the
    first call of `verify` and live until `close` or the end of the process. Not for use by several threads.

    Args:
        workers: number of processes; one judges about 1000 short answers per second.
        limit: seconds that one pair may take on the clock before its worker is killed.
        memory_mib: address space of one worker in MiB; more makes an answer "unparsed", "wrong" or "error".
        remembered: number of verdicts kept between calls; the least recently used is forgotten first.

    Raises:
        ValueError: memory_mib is less than a worker needs to start.
    """

    def __init__(self, workers: int = 1, limit: float = 5.0, memory_mib: int = 2048, remembered: int = 100_000) -> None:
        if memory_mib < 512:
            raise ValueError(f"memory_mib is {memory_mib}, too little for math-verify; write 512 or more")
        self.workers = workers
        self.limit = limit
        self.memory_mib = memory_mib
        self.remembered = remembered
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._closed = False
        self._pool = self._new_pool()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the verifier cannot be used afterwards."""
        self._closed = True
        self._pool.stop()
        self._pool.join()

    def start(self) -> None:
        """Let the fork server import math_verify while the caller does something else; `verify` starts it otherwise.

        Started here it and the workers do not end at a SIGTERM, which SLURM sends to every process of a job: those of
        a training that saves a checkpoint first are still needed.
        """
        resource_tracker.ensure_running()  # it would unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _new_pool(self) -> ProcessPool:
        CONSTS.term_timeout = 0.0  # seconds that pebble waits between SIGTERM and SIGKILL
        context = multiprocessing.get_context("forkserver")
        # What sympy imports only when it compares would otherwise be imported by every worker.
        own, sympy = ["workflow.verify", "workflow.params"], ["sympy.physics.units", "sympy.tensor.tensor"]
        context.set_forkserver_preload([*own, "math_verify", *sympy])
        return ProcessPool(self.workers, initializer=_start_worker, initargs=(self.memory_mib,), context=context)

    def _restart(self) -> None:
        """Kill the workers, forget what is scheduled, and begin anew: a twentieth of a second."""
        self._pool.stop()
        self._pool.join()
        self._pool = self._new_pool()

    def verify(
        self,
        pairs: Iterable[tuple[str, str]],
        within: float | None = None,
        published: bool = False,
        mended: bool = False,
        label: str | None = None,
    ) -> list[Verdict]:
        """Judge (gold, answer) pairs as Open-R1's final accuracy reward does.

        The first match in the gold is the gold; in the answer all boxed expressions, or else LaTeX behind words
        such as "answer is" or `<answer>`. Pairs that are equal in what decides (`decisive`) are judged once, and
        whole numbers, `$-7$` and `\\boxed{-7}`, are compared here.

        Args:
            pairs: n texts of gold and answer; a bare LaTeX gold must be wrapped by `gold_text` first. They are taken
                one by one, while the workers judge those before, so an iterator need not hold long texts in memory.
            within: seconds after which the call returns (and a tenth more), whatever is left; None waits for all.
            published: judge as Open-R1 did until 2025-04-01 instead: a gold is read only where it is marked as LaTeX,
                and gold and answer are swapped in the comparison, which matters for intervals and equations.
            mended: mend operators such as \\frac14 and \\sqrt3 in the answer before it is read, as is done in golds and
                by lighteval: Open-R1's rewards take `\\boxed{\\frac14}` for wrong where the gold is `$\\frac14$`.
            label: what a line of progress begins with, every few seconds; None prints none.

        Returns:
            n verdicts in the same order. An answer that is not read, takes too long ("timeout") or kills its
            worker ("error") is not correct; one that was not judged in time ("unjudged") is neither correct nor
            wrong, and is judged when it is next asked for. No text raises.

        Raises:
            ImportError: math-verify is not installed.
            RuntimeError: the verifier is closed, or somebody kills its workers again and again.
        """
        end = math.inf if within is None else time.monotonic() + within
        kind = (published, mended)
        few = isinstance(pairs, list) and len(pairs) < 4 * self.workers * CHUNK
        size = 1 if few else CHUNK  # of few, some workers would get none
        keys: list[bytes] = []
        judged: dict[bytes, Verdict] = {}
        new: dict[bytes, tuple[str, str]] = {}
        waiting: dict[Future, list[bytes]] = {}
        part: list[bytes] = []
        for gold, answer in pairs:
            pair = (gold, decisive(answer))
            key = _key(*pair, *kind)
            keys.append(key)
            if key in judged or key in new:
                continue
            if verdict := self._verdicts.get(key) or _compare_whole_numbers(*pair):
                judged[key] = verdict
                continue
            if not new and not self._pool.active and not self._closed:
                self._restart()  # a worker was killed since the last call
            new[key] = pair
            part.append(key)
            if len(part) == size:  # the workers begin while the next pairs are looked at
                waiting[self._schedule([new[key] for key in part], kind)] = part
                part = []
        if part:
            waiting[self._schedule([new[key] for key in part], kind)] = part
        progress = None if label is None else Progress(label, len(new))
        try:
            late = self._wait(waiting, end, progress)
            judged |= self._collect(waiting, late)
        except BrokenProcessPool:
            # Somebody killed the workers, as a scheduler does that ends a job: it sends SIGTERM to all its processes,
            # and the training has a step to end before it writes its checkpoint.
            late = set()
            self._restart()
        # Where one of several fails they are judged again, singly, and only that one fails.
        waiting = {self._schedule([new[key]], kind): [key] for key in new if key not in judged}
        late_again = self._wait(waiting, end, progress)
        judged |= self._collect(waiting, late_again)
        if late or late_again:
            self._restart()  # quicker than to cancel: each cancelled pair would still cost a worker
        for key, verdict in judged.items():
            if verdict.reason != "unjudged":
                self._verdicts[key] = verdict
                self._verdicts.move_to_end(key)
        while len(self._verdicts) > self.remembered:
            self._verdicts.popitem(last=False)
        return [judged[key] for key in keys]

    def _schedule(self, pairs: list[tuple[str, str]], kind: tuple[bool, bool]) -> Future:
        seconds = CHUNK_SECONDS if len(pairs) > 1 else 2 * math.ceil(self.limit)
        return self._pool.schedule(_judge_pairs, args=(pairs, seconds, *kind), timeout=len(pairs) * self.limit)

    def _collect(self, waiting: dict[Future, list[bytes]], late: set[Future]) -> dict[bytes, Verdict]:
        """The verdicts on what was scheduled, but for those of several among which one failed."""
        judged: dict[bytes, Verdict] = {}
        for future, part in waiting.items():
            try:
                found = [Verdict(None, "unjudged", "")] * len(part) if future in late else future.result()
            except (ImportError, BrokenProcessPool):
                raise  # there is no math-verify, or no pool: no answer can be judged
            except Exception as error:
                # Whatever math-verify raised, or pebble's ProcessExpired: a model can write anything, and the reason
                # says that this answer was not compared.
                if len(part) > 1:
                    continue
                found = [Verdict(False, "timeout" if isinstance(error, TimeoutError) else "error", "")]
            judged.update(zip(part, found, strict=True))
        return judged

    def _wait(self, waiting: dict[Future, list[bytes]], end: float, progress: Progress | None) -> set[Future]:
        """Wait for the futures until `end` on the monotonic clock; return those that are not done."""
        futures = set(waiting)
        while futures and time.monotonic() < end:
            futures = wait(futures, timeout=min(1.0, end - time.monotonic())).not_done
            if futures and not self._pool.active:
                raise BrokenProcessPool("a worker was killed from outside")  # pebble would let them wait for ever
            if futures and progress:
                progress.update(progress.total - sum(len(waiting[future]) for future in futures))
        return futures


def decisive(answer: str) -> str:
    """What of an answer decides how it is judged: mostly one `\\boxed{…}`, and "" where there is nothing to read.

    With the settings of `_answer_config`, math_verify.parser.parse reads one match only: of the patterns of the first
    priority that has any, the match that ends last. With D for LaTeX in `$ $`, `$$ $$`, `\\( \\)`, `\\[ \\]`, ` [ ] `
    or a \\frac of two numbers, which may be followed by a percent sign and by more D behind "and", "or" or a comma,
    the patterns are

    - 0: the first `\\boxed{` to the last `}`; a D around a `\\boxed{…}`; "final answer is D I hope";
    - 50, 100, 200: "final answer … is D", "answer: … D", "answer … D", with at most 100, 50 and 50 characters between.

    Of a match that has a box, only what is in it is read on. So the verdict stays the same when the answer is cut to

    1. the box, where it is the only one, its braces match, no percent sign comes after it and no "I hope" from it on:
       the first pattern matches, and any that ends later does so behind the box and has the box in its only D;
    2. from the first "answer" on, where no box can match: all other matches start there, with the "final " before it;
    3. of that, to a box around the D, where the D is in single dollars, nothing before it can begin one, nothing
       behind it belongs to it and no D can begin behind a second "answer" ("final answer" must be followed by "is D":
       then all of the patterns that match find this D);
    4. nothing, where behind the first "answer" no D can begin.

    Every other answer is returned whole. Linear in the length of the text, while math-verify's patterns are not.
    """
    start = answer.find("\\boxed{")
    if start >= 0 and answer.rfind("}") > start + len("\\boxed{"):
        if answer.count("\\boxed") > 1 or "\\fbox" in answer or answer.find("I hope", start) >= 0:
            return answer
        content = _balanced(answer, start + len("\\boxed"))
        behind = start + len("\\boxed{}") + len(content)
        if not content.strip() or any(answer.find(sign, behind) >= 0 for sign in PERCENT):
            return answer
        return f"\\boxed{{{content.strip()}}}"
    anchor = ANCHOR.search(answer)
    if anchor is None:
        return ""
    answer = answer[anchor.start() :]
    if not BEGIN.search(answer):
        return ""
    found = LATEX_BEHIND_ANCHOR.match(answer)
    if (
        found is None
        or "box" in found["latex"]
        or found["latex"] != found["latex"].strip()
        or _balanced(f"{{{found['latex']}}}", 0) != found["latex"]
        or (found["final"] and not re.search(r"\sis:?\s*\Z", found["between"]))
        or ((again := ANCHOR.search(answer, found.start("between"))) and BEGIN.search(answer, again.end()))
    ):
        return answer
    return f"\\boxed{{{found['latex']}}}"


def _balanced(text: str, start: int) -> str:
    """What is in the braces that open at `start`, counted as math-verify does, `\\{` too; "" if they never close."""
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()]
    return ""


def _compare_whole_numbers(gold: str, answer: str) -> Verdict | None:
    """The verdict on `$7$` and `\\boxed{7}` or "", as math-verify has it a thousand times slower; None for all else."""
    known, found = WHOLE_NUMBER_GOLD.fullmatch(gold), WHOLE_NUMBER_ANSWER.fullmatch(answer)
    if known and not answer:
        return Verdict(False, "unparsed", "")
    if known is None or found is None:
        return None
    correct = int(known[1]) == int(found[1])
    return Verdict(correct, "correct" if correct else "wrong", str(int(found[1])))


def gold_text(solution: str) -> str:
    """A gold that math-verify reads whole: bare LaTeX such as `(3, \\frac{1}{2})` is put between dollar signs.

    Without them math-verify looks for plain numbers and takes `(3, 4)` for 4. A solution that marks its LaTeX
    (`$`, `\\boxed`, `\\(`, `\\[`) is returned as it is; `\\$` is a price, no mark.
    """
    marked = any(mark in solution.replace("\\$", "") for mark in ("$", "\\boxed", "\\(", "\\["))
    return solution if marked or not solution.strip() else f"${solution.strip()}$"


def number(text: str) -> Decimal | None:
    """The number that is all of the text, but for commas, a dollar sign, `\\boxed{}` and a final period; else None."""
    plain = text.strip().removesuffix(".")
    if plain.startswith("\\boxed{") and plain.endswith("}"):
        plain = plain.removeprefix("\\boxed{").removesuffix("}")
    if len(plain) > 1 and plain.startswith("$") and plain.endswith("$"):
        plain = plain[1:-1]  # a number marked as LaTeX, as some formats mark their golds
    plain = plain.replace("$", "", 1)
    return Decimal(plain.replace(",", "")) if NUMBER.fullmatch(plain) else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text (`3-5` ends in 5, not in -5), or None where there is none."""
    found = NUMBER_IN_TEXT.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def worker_count() -> int:
    """Workers for one training process: half of its share of the cores that this job may use, from 1 to 4.

    One judges a batch in less than a second; more only help against answers that take long.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, len(os.sched_getaffinity(0)) // processes // 2))


def _key(gold: str, answer: str, published: bool, mended: bool) -> bytes:
    """A short name for what is to be judged; the length keeps gold and answer apart."""
    return hashlib.blake2b(f"{published} {mended} {len(gold)} {gold}{answer}".encode(), digest_size=16).digest()


def _start_worker(memory_mib: int) -> None:
    """Make this process one that dies when told to, prints nothing and cannot take the machine's memory."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for the operation to end
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    sys.set_int_max_str_digits(0)  # long integers are bounded by the time limit, and compared instead of refused
    gc.freeze()
    gc.set_threshold(100_000)  # sympy makes much that is soon gone and little garbage: a twentieth of the time
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - math_verify prints what it cannot parse
    logging.disable(logging.CRITICAL)
    _parse_faster()


def _parse_faster() -> None:
    """Halve the time that latex2sympy takes, with the same results.

    Its parser predicts with SLL and, only where that ends in a syntax error, with LL, its default: SLL gives the tree
    that LL gives, or a syntax error (ANTLR's documentation of PredictionMode.SLL, which names these two stages). And
    numbers that were read before are not evaluated again, each time in a new namespace with all of sympy.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.gen.PSParser import PSParser
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    parse_number = _Latex2Sympy.parse_number
    known_number = lru_cache(maxsize=4096)(partial(parse_number, None))  # it reads nothing of the object

    def remembered_number(converter: _Latex2Sympy, text: str) -> Any:
        return known_number(text) if len(text) < 50 else parse_number(converter, text)

    _Latex2Sympy.parse_number = remembered_number
    start_rule = PSParser.math

    def math_in_two_stages(parser: PSParser) -> PSParser.MathContext:
        parser._interp.predictionMode = PredictionMode.SLL
        try:
            return start_rule(parser)
        except Exception:  # latex2sympy raises no other for a syntax error
            parser.reset()
            parser._interp.predictionMode = PredictionMode.LL
            return start_rule(parser)

    PSParser.math = math_in_two_stages


@cache
def _answer_config(boxed: bool, mended: bool) -> list:
    """Open-R1's settings; without the patterns for boxes, which take longest, where there is no box to be found."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        nits=mended, malformed_operators=mended, basic_latex=True, equations=True, boxed="all", units=True
    )
    return [
        LatexExtractionConfig(
            normalization_config=normalization,
            boxed_match_priority=0 if boxed else -1,
            try_extract_without_anchor=False,
        )
    ]


@lru_cache(maxsize=4096)
def _parse_gold(gold: str, published: bool) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = [LatexExtractionConfig()] if published else [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(gold, extraction_config=config, extraction_mode="first_match", parsing_timeout=0)


def _judge_pairs(pairs: list[tuple[str, str]], seconds: float, published: bool, mended: bool) -> list[Verdict]:
    """Several comparisons, in a worker, which the kernel ends when one of them computes for more than `seconds`.

    That is how a slow one among many is noticed; a single one is ended before by the main process, on the clock,
    unless that was killed.
    """
    verdicts = []
    for gold, answer in pairs:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdicts.append(_judge(gold, answer, published, mended))
    return verdicts


def _judge(gold: str, answer: str, published: bool, mended: bool) -> Verdict:
    """One comparison, in a worker. Zero turns math-verify's own alarms off: a slow answer is then a "timeout"."""
    from math_verify import parse, verify

    parsed_gold = _parse_gold(gold, published)
    if not parsed_gold:
        return Verdict(None, "gold_unparsed", "")
    config = _answer_config("\\boxed{" in answer, mended)
    parsed = parse(answer, extraction_config=config, extraction_mode="first_match", parsing_timeout=0)
    if not parsed:
        return Verdict(False, "unparsed", "")
    # Each with each, as verify does it, but for an expression with a text, which it never finds equal.
    expressions, texts = _by_type(parsed)
    gold_expressions, gold_texts = _by_type(parsed_gold)
    first, second = (expressions, gold_expressions) if published else (gold_expressions, expressions)
    correct = verify(first, second, timeout_seconds=0) or not texts.isdisjoint(gold_texts)
    return Verdict(correct, "correct" if correct else "wrong", str(parsed[0])[:200])


# CPython keeps frames in chunks of 16 KiB and maps one anew each time that a call crosses the end of the last, which
# took a sixth of the time. A function that claims a stack of 1 MiB gets a chunk with as much room for all it calls.
_judge.__code__ = _judge.__code__.replace(co_stacksize=2**17)


def _by_type(parsed: list) -> tuple[list, set[str]]:
    """The expressions that math-verify read, and the texts, of which it gives one whether it understands it or not."""
    texts = {part.strip() for part in parsed if isinstance(part, str)} - {""}
    return [part for part in parsed if not isinstance(part, str)], texts
