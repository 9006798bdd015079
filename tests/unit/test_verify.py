import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from decimal import Decimal
from threading import Thread

import psutil
import pytest

from workflow.verify import (
    CHUNK,
    Verifier,
    _answer_config,
    _judge,
    decisive,
    gold_text,
    last_number,
    number,
    worker_count,
)

BOMBS = [
    r"\boxed{1E99999999}",
    r"$\boxed{1.0E+999999999}$",
    r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}",
    r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n^n}}",  # a loop in Python, while the others are one long operation
]


# What answers are made of, and what makes reading them hard; put together at random.
BOXES = [r"\boxed{", r"\boxed{42}", r"\boxed{\frac12}", r"\boxed {7}", r"\boxed", r"\fbox{3}", r"$\boxed{7}$"]
MARKS = ["{", "}", "$", "$$", r"\[", r"\]", r"\(", r"\)", "[", "]", r"\}", r"\{", "\\", r"\$", "%", r"\%", ",", ", "]
VALUES = ["42", "-7", ".5", "1,234", r"\frac{1}{2}", r"-\frac{3}{4}", r"\sqrt3", "x=3", r"\left(3,4\right)", "(1,2)"]
FORMULAS = ["$7$", "$x=3$", r"$\frac{1}{2}$", "$ 5 $", r"$\text{a}$", "$3\\$", "$$4$$", "7$5$", "$5$$6$", r"\(8\)"]
WORDS = ["so ", "wait", " is ", " is: ", " and ", " or ", " percent", " pct", r"\text{ cm}", "I hope", "\n", " ", "  "]
ANCHORS = ["answer", "Answer: ", "answer is ", "<answer>\n", "\n</answer>", "final  answer is ", "an\u017fwer is "]
FINAL = [
    "final answer is ",
    "The final answer: ",
    "FINAL ANSWER IS ",
    "final answer, which is ",
    ". I hope it is correct",
]
PIECES = [*BOXES, *MARKS, *VALUES, *FORMULAS, *WORDS, *ANCHORS, *FINAL]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    made = ["".join(draw.choices(PIECES, k=draw.randint(0, draw.choice([4, 8, 16])))) for _ in range(count)]
    return [
        draw.choice(ANCHORS + FINAL) + draw.choice(FORMULAS) + text if draw.random() < 0.3 else text for text in made
    ]


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("$42$", r"\boxed{42}", "correct"),
        ("42", "<think>\nsix times seven\n</think>\n<answer>\n$42$\n</answer>", "correct"),
        (r"so $x=3$ and then \boxed{\frac{3}{4}}", r"\boxed{0.75}", "correct"),
        (r"$\frac{1}{2}$", r"first \boxed{\frac{2}{4}}.", "correct"),
        ("$1,234$", r"The final answer is $1234$.", "correct"),
        (r"$(1,\infty)$", r"\boxed{x>1}", "wrong"),
        ("$x>1$", r"\boxed{(1,\infty)}", "correct"),  # the same pair swapped: gold comes first
        ("$42$", r"\boxed{41} or \boxed{42}", "wrong"),  # all boxed expressions are the answer
        ("$42$", "42", "unparsed"),
        ("$42$", "$42$", "unparsed"),  # LaTeX without an anchor
        ("$42$", "", "unparsed"),
        ("no number", r"\boxed{42}", "gold_unparsed"),
        ("", r"\boxed{42}", "gold_unparsed"),
    ],
)
def test_reason(verifier, gold, answer, reason):
    verdict = verifier.verify([(gold, answer)])[0]
    assert verdict.reason == reason
    assert verdict.correct == {"correct": True, "wrong": False, "unparsed": False, "gold_unparsed": None}[reason]


@pytest.mark.parametrize(
    ("answer", "decides"),
    [
        (r"Let $x=1$ and \[y = \frac{1}{2}\] so $\boxed{ 42 }$.", r"\boxed{42}"),
        (r"\[ \boxed{\frac{1}{2}} \] because \text{if any}", r"\boxed{\frac{1}{2}}"),
        ("Therefore, the answer is $\\frac{3}{4}$. That is all.", r"\boxed{\frac{3}{4}}"),
        ("The final answer is: $7$. I hope it is correct.", r"\boxed{7}"),
        ("<answer>\n$7$\n</answer>", r"\boxed{7}"),
        ("long before the answer is \\(7\\)", r"answer is \(7\)"),
        ("the answer is 42", ""),
        ("$42$", ""),
        ("", ""),
        # All of these are read in another way, so they stay whole.
        (r"$\boxed{5}\%$ of $\boxed{6}$", r"$\boxed{5}\%$ of $\boxed{6}$"),
        (r"$\boxed{5}$ %", r"$\boxed{5}$ %"),
        (r"final answer is $6$. I hope \boxed{5} I hope", r"final answer is $6$. I hope \boxed{5} I hope"),
        (r"answer is $3$ and $4$", r"answer is $3$ and $4$"),
        (r"answer is $3$. The answer: $4$", r"answer is $3$. The answer: $4$"),
        (r"final answer: $3$ is $4$", r"final answer: $3$ is $4$"),
        (r"\boxed{5", ""),
    ],
)
def test_what_decides(answer, decides):
    assert decisive(answer) == decides


def test_math_verify_reads_the_same_in_what_decides():
    from math_verify import parse

    def read(text: str, boxed: bool, mended: bool) -> list[tuple[type, str]]:
        found = parse(text, _answer_config(boxed, mended), extraction_mode="first_match", parsing_timeout=0)
        return [(type(part), str(part)) for part in found]

    kinds = {"nothing": 0, "box": 0, "formula": 0, "end": 0}
    for place, text in enumerate(texts(5000, seed=1)):
        cut, mended = decisive(text), place % 2 == 0
        assert decisive(cut) == cut
        if cut != text:
            assert read(cut, "\\boxed{" in cut, mended) == read(text, True, mended), text
            kind = "nothing" if not cut else "end" if not cut.startswith("\\boxed{") else "box"
            kinds["formula" if kind == "box" and "\\boxed{" not in text else kind] += 1
    assert min(kinds.values()) > 100, kinds


def test_verdicts_are_those_of_math_verify_itself(verifier):
    """Without the cut, the comparison of whole numbers and the faster parser, none of which is in this process."""
    golds = ["$42$", "$-7$", r"$\frac{1}{2}$", "$x=3$", "$(3,4)$", r"$\text{cm}$", "$1,234$", "no gold"]
    golds += [r"$\frac14$", r"$11\sqrt2$"]
    answers = (
        r"42~-7~07~0.5~.5~\frac{2}{4}~\frac14~11\sqrt2~x=3~3~(3, 4)~3,4~42\text{ cm}~42\%~42%~1234~1,234~\$42~4210_{5}"
    )
    answers += r"~--7~x^2~x > 1~\begin{pmatrix} 1 \\ 2 \end{pmatrix}~6-5i~{}~ "
    pairs = [(gold, rf"so $\boxed{{{answer}}}$, then") for gold in golds for answer in answers.split("~")]
    pairs += list(zip(golds * 40, texts(400, seed=2), strict=True))
    for published, mended in ((False, False), (True, False), (False, True)):
        expected = [_judge(*pair, published, mended) for pair in pairs]
        assert verifier.verify(pairs, published=published, mended=mended) == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("so " * 400_000 + r"\boxed{3.5}", "correct"),
        (r"\boxed{3.5}" + " and so on" * 100_000, "correct"),
        ("the answer is not clear. " * 40_000, "unparsed"),
        ("\\boxed{" * 150_000, "unparsed"),
        (r"$\boxed{3.5" * 100_000, "unparsed"),
        ("$ " * 500_000, "unparsed"),
    ],
)
def test_a_megabyte_is_judged_quickly(verifier, answer, reason):
    verifier.verify([("$1.5$", "")])  # the worker is there
    start = time.monotonic()
    assert verifier.verify([("$3.5$", answer)])[0].reason == reason
    assert time.monotonic() - start < 1


def test_a_megabyte_that_takes_long_is_counted():
    answers = [r"\[ \boxed{1} " * 70_000, r"\boxed{" + "1+" * 500_000 + "1}"]
    with Verifier(workers=2, limit=1) as verifier:
        verdicts = verifier.verify([("$1.5$", answer) for answer in answers])
    assert all(not verdict.correct and verdict.reason != "correct" for verdict in verdicts)


def test_a_bomb_among_many_costs_only_its_own_verdict():
    pairs = [(f"${n}.5$", rf"\boxed{{{n % 7}.5}}") for n in range(4 * CHUNK)]
    pairs[3 * CHUNK // 2] = ("$7.5$", BOMBS[0])
    with Verifier(limit=2) as verifier:
        reasons = [verdict.reason for verdict in verifier.verify(pairs)]
    assert reasons.pop(3 * CHUNK // 2) == "timeout"
    assert reasons == ["correct" if n < 7 else "wrong" for n in range(4 * CHUNK - 1)]


def test_long_judgings_print_how_far_they_are(capsys):
    with Verifier(limit=6.5) as verifier:
        verifier.verify([("$7.5$", r"\boxed{7.5}"), ("$7$", BOMBS[0])], label="score")
    assert capsys.readouterr().out.startswith("score: 1/2")


def test_order_is_kept_and_equal_pairs_agree(verifier):
    pairs = [(f"${n % 5}$", rf"\boxed{{{n % 3}}}") for n in range(60)]
    assert [verdict.correct for verdict in verifier.verify(pairs)] == [n % 5 == n % 3 for n in range(60)]
    assert [verdict.extracted for verdict in verifier.verify(pairs[:3])] == ["0", "1", "2"]
    pairs = [(f"${n % 5}/7$", rf"\boxed{{{n % 3}/7}}") for n in range(60)]
    assert [verdict.correct for verdict in verifier.verify(pairs)] == [n % 5 == n % 3 for n in range(60)]
    assert verifier.verify([]) == []


def test_bombs_are_bounded_and_harm_nothing_else():
    pairs = [pair for bomb in BOMBS for pair in (("$7$", bomb), ("$3$", r"\boxed{3}"))]
    start = time.monotonic()
    with Verifier(workers=2, limit=1) as verifier:
        verdicts = verifier.verify([*pairs, ("$5$", r"\boxed{5}")])
        seconds = time.monotonic() - start
        assert [verdict.reason for verdict in verdicts] == ["timeout", "correct"] * 4 + ["correct"]
        assert [verdict.correct for verdict in verdicts] == [False, True] * 4 + [True]
        assert verifier.verify([("$8$", r"\boxed{8}")])[0].correct
    assert seconds < 20


@pytest.mark.parametrize("padding", [0, 20_000])  # 5 MB of answers fill the pipe to the workers
def test_a_call_is_bounded_and_the_next_one_starts_fresh(verifier, padding):
    verifier.verify([("$1.5$", r"\boxed{1.5}")])  # the fork server is there
    bombs = [("$7$", rf"\boxed{{1E{99_000_000 + n}}}" + " " * padding) for n in range(8 * 32)]
    normal = [(f"${n}.5$", rf"\boxed{{{n}.5}}") for n in range(8 * 32)]
    start = time.monotonic()
    verdicts = verifier.verify(bombs, within=2)
    assert time.monotonic() - start < 4
    assert {(verdict.correct, verdict.reason) for verdict in verdicts} == {(None, "unjudged")}
    start = time.monotonic()
    assert {verdict.reason for verdict in verifier.verify(normal)} == {"correct"}
    assert time.monotonic() - start < 10  # had the bombs to be taken off the queue one by one, it would be 25


def test_what_was_judged_in_time_is_kept_and_the_rest_is_judged_later():
    pairs = [("$3.5$", r"\boxed{3.5}"), ("$7$", BOMBS[0]), ("$5.5$", r"\boxed{5.5}")]
    with Verifier(limit=3) as verifier:
        assert [verdict.reason for verdict in verifier.verify(pairs, within=1.5)][1:] == ["unjudged", "unjudged"]
        assert [verdict.reason for verdict in verifier.verify(pairs)] == ["correct", "timeout", "correct"]


def test_memory_of_a_worker_is_bounded():
    with Verifier(memory_mib=512) as verifier, pytest.raises(MemoryError):
        verifier._pool.schedule(bytearray, args=[600 * 2**20]).result()


def test_a_worker_killed_while_idle_is_replaced():
    with Verifier() as verifier:
        assert verifier.verify([("$2.5$", r"\boxed{2.5}")])[0].correct
        for process in psutil.Process().children(recursive=True):
            if process.pid in verifier._pool._pool_manager.worker_manager.workers:
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.5)
        assert verifier.verify([("$3.5$", r"\boxed{3.5}")])[0].correct


def test_workers_killed_just_before_their_work_are_replaced():
    """By SIGTERM, and the fork server too, as SLURM sends it to all processes of a job."""
    with Verifier(workers=2) as verifier:
        verifier.verify([("$0.5$", r"\boxed{0.5}")])
        for n in range(1, 6):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "resource_tracker" not in " ".join(process.cmdline()):
                        process.terminate()
            texts = [(f"${n}.{m}$", rf"\boxed{{{n}.{m}}}") for m in range(1, 9)]
            assert all(verdict.correct for verdict in verifier.verify(texts))


STARTED = """
from threading import Timer
import psutil
from workflow.verify import Verifier

def terminate(processes):
    for process in processes:
        process.terminate()

if __name__ == "__main__":
    with Verifier(workers=2) as verifier:
        verifier.start()
        verifier.verify([("$0.5$", r"\\boxed{0.5}")])
        processes = psutil.Process().children(recursive=True)
        for n in range(1, 9):
            timer = Timer(0.005 * n, terminate, [processes])
            timer.start()
            texts = [(f"${n}.{m}$", rf"\\boxed{{{n}.{m}}}") for m in range(1, 19)]
            assert all(verdict.correct for verdict in verifier.verify(texts))
            timer.join()
        assert psutil.Process().children(recursive=True) == processes
"""


def test_workers_that_were_started_first_do_not_end_at_a_sigterm(tmp_path, environment):
    """Not in the middle of their work either, where the verdict would be that an answer cannot be compared."""
    (tmp_path / "started.py").write_text(STARTED)
    subprocess.run([sys.executable, tmp_path / "started.py"], env=environment, check=True)


def test_worker_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert worker_count() == 1


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("$42$", r"\boxed{42}", "correct"),
        (r"$(1,\infty)$", r"\boxed{x>1}", "correct"),
        ("$x>1$", r"\boxed{(1,\infty)}", "wrong"),
        ("42", r"\boxed{42}", "gold_unparsed"),
        (r"so \boxed{42}", "$42$", "unparsed"),
    ],
)
def test_as_published(verifier, gold, answer, reason):
    assert verifier.verify([(gold, answer)], published=True)[0].reason == reason


def test_mended(verifier):
    pair = (r"$\frac14$", r"\boxed{\frac14}")
    assert [verifier.verify([pair], mended=mended)[0].correct for mended in (False, True)] == [False, True]


def test_published_and_final_verdicts_are_remembered_apart(verifier):
    pair = ("$x>2$", r"\boxed{(2,\infty)}")
    found = [verifier.verify([pair], published=published)[0].correct for published in (False, True, False, True)]
    assert found == [True, False, True, False]


def test_known_pairs_need_no_worker_and_the_oldest_are_forgotten():
    pairs = [(f"${n}.5$", r"\boxed{1.5}") for n in range(3)]
    verifier = Verifier(remembered=2)
    first = verifier.verify(pairs)
    verifier.close()
    assert verifier.verify(pairs[1:]) == first[1:]
    with pytest.raises(RuntimeError):
        verifier.verify(pairs[:1])


def test_works_outside_the_main_thread():
    found = []

    def judge():
        with Verifier(limit=1) as verifier:
            found.extend(verifier.verify([("$\\pi$", r"\boxed{\pi}"), ("$2$", BOMBS[0]), ("$e$", r"\boxed{e}")]))

    thread = Thread(target=judge)
    thread.start()
    thread.join()
    assert [verdict.reason for verdict in found] == ["correct", "timeout", "correct"]


def test_main_process_imports_neither_math_verify_nor_torch():
    code = (
        "import sys; from workflow.verify import Verifier\n"
        "with Verifier() as verifier: print(verifier.verify([('$2.5$', '$\\\\boxed{2.5}$')])[0].reason)\n"
        "print([name for name in ('math_verify', 'sympy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["correct", "[]"]
    assert done.stderr == ""


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match="write 512 or more"):
        Verifier(memory_mib=100)


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("42", "$42$"),
        (r"(3, \frac{1}{2})", r"$(3, \frac{1}{2})$"),
        ("$42$", "$42$"),
        (r"thus \boxed{42}", r"thus \boxed{42}"),
        (r"\(x\)", r"\(x\)"),
        (r"\$36", r"$\$36$"),
        ("", ""),
    ],
)
def test_gold_text(solution, text):
    assert gold_text(solution) == text


def test_bare_tuple_is_read_whole(verifier):
    answer = r"\boxed{(3, 4)}"
    verdicts = verifier.verify([("(3, 4)", answer), (gold_text("(3, 4)"), answer)])
    assert [verdict.correct for verdict in verdicts] == [False, True]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        (" 1,234 ", "1234"),
        ("$5.", "5"),
        ("$5$", "5"),
        ("$-1,234$", "-1234"),
        ("$", None),
        ("-$3.50", "-3.5"),
        ("42.0", "42"),
        ("1,23", None),
        ("42 apples", None),
        ("", None),
        ("1E99999999", None),
        ("9" * 100_000, "9" * 100_000),
    ],
)
def test_number(text, value):
    assert number(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3-5", "5"),
        ("x = -5.", "-5"),
        ("(-3)", "-3"),
        ("it costs $1,234.50, all in all", "1234.5"),
        ("first 1, then 2", "2"),
        ("-$7", "-7"),
        (r"\boxed{42}", "42"),
        ("half is .5", "0.5"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else Decimal(value))
