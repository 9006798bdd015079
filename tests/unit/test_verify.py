import subprocess
import sys
import time
from decimal import Decimal
from threading import Thread

import pytest

from workflow.verify import Verifier, gold_text, last_number, number

BOMBS = [r"\boxed{1E99999999}", r"$\boxed{1.0E+999999999}$", r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}"]


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


def test_order_is_kept_and_equal_pairs_agree(verifier):
    pairs = [(f"${n % 5}$", rf"\boxed{{{n % 3}}}") for n in range(60)]
    assert [verdict.correct for verdict in verifier.verify(pairs)] == [n % 5 == n % 3 for n in range(60)]
    assert [verdict.extracted for verdict in verifier.verify(pairs[:3])] == ["0", "1", "2"]
    assert verifier.verify([]) == []


def test_bombs_are_bounded_and_harm_nothing_else():
    pairs = [pair for bomb in BOMBS for pair in (("$7$", bomb), ("$3$", r"\boxed{3}"))]
    start = time.monotonic()
    with Verifier(workers=2, limit=1) as verifier:
        verdicts = verifier.verify([*pairs, ("$5$", r"\boxed{5}")])
        seconds = time.monotonic() - start
        assert [verdict.reason for verdict in verdicts] == ["timeout", "correct"] * 3 + ["correct"]
        assert [verdict.correct for verdict in verdicts] == [False, True] * 3 + [True]
        assert verifier.verify([("$8$", r"\boxed{8}")])[0].correct
    assert seconds < 20


def test_known_pairs_need_no_worker_and_the_oldest_are_forgotten():
    pairs = [(f"${n}$", r"\boxed{1}") for n in range(3)]
    verifier = Verifier(remembered=2)
    first = verifier.verify(pairs)
    verifier.close()
    assert verifier.verify(pairs[1:]) == first[1:]
    with pytest.raises(RuntimeError):
        verifier.verify(pairs[:1])


def test_works_outside_the_main_thread():
    found = []

    def judge():
        with Verifier() as verifier:
            found.extend(verifier.verify([("$2$", r"\boxed{2}")]))

    thread = Thread(target=judge)
    thread.start()
    thread.join()
    assert found[0].correct


def test_main_process_imports_neither_math_verify_nor_torch():
    code = (
        "import sys; from workflow.verify import Verifier\n"
        "with Verifier() as verifier: print(verifier.verify([('$2$', '$\\\\boxed{2}$')])[0].reason)\n"
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
