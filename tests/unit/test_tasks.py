"""lighteval's numbers over stored verdicts are those of workflow/stats.py."""

import numpy as np
import pyarrow as pa
import pytest

from workflow import stats

# lighteval is imported in the tests: it turns gradients off, which modules that are collected later would see.


@pytest.mark.parametrize(("n_questions", "n"), [(1, 1), (5, 1), (7, 4), (30, 6)])
def test_replay(n_questions, n):
    from workflow import tasks

    draw = np.random.default_rng(n)
    lenient = draw.integers(0, 2, (n_questions, n)).astype(float)
    strict = lenient * draw.integers(0, 2, (n_questions, n))
    rows = [
        {"id": f"q{number}", "prompt": [{"role": "user", "content": "the same question"}], "solution": "the same"}
        for number in range(n_questions)
    ]
    verdicts = {"": lenient.ravel().tolist(), "strict_": strict.ravel().tolist()}
    found = tasks.replay(tasks.task_config("toy", n, verdicts), pa.Table.from_pylist(rows))
    for prefix, scores in (("", lenient), ("strict_", strict)):
        assert found[f"{prefix}pass_at_1"] == pytest.approx(scores.mean(), abs=1e-12)
        assert found[f"{prefix}pass_at_{n}"] == pytest.approx(stats.pass_at_k(scores, n).mean(), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 15, 16])
def test_pass_at_k_is_that_of_lighteval(k):
    from lighteval.metrics.metrics_sample import PassAtK
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    def score(doc: Doc, model_response: ModelResponse) -> int:
        return int(model_response.final_text[0])

    scores = np.tril(np.ones((17, 16)), -1)  # 0 to 16 of 16 correct
    metric = PassAtK(k=k, n=16, sample_scoring_function=score)
    doc = Doc(query="", choices=["gold"], gold_index=0)
    theirs = [metric.compute(doc, ModelResponse(text=[str(int(score)) for score in row])) for row in scores]
    assert stats.pass_at_k(scores, k) == pytest.approx(theirs, abs=1e-12)
