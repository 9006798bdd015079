"""Our tasks as lighteval sees them: stored samples are replayed through its Pipeline, which aggregates the verdicts.

Answers are judged before (workflow/judge.py), all at once in killable processes. What lighteval is shown of a sample
is its place in the list of verdicts, where its metrics look it up: completions of gigabytes need not be in memory.
Nothing is downloaded, and nothing of lighteval's own tasks or normalisation can move a score.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pyarrow as pa
from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.metrics.metrics_sample import AvgAtN, PassAtK
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.registry import Registry
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.cache_management import SampleCache


def task_config(name: str, n_samples: int, verdicts: dict[str, list[float]]) -> LightevalTaskConfig:
    """A task with one question per row of the prepared data, n samples each.

    Args:
        name: the task's name in params.yaml.
        n_samples: samples per question.
        verdicts: by what they call correct, e.g. {"": lenient, "strict_": strict}; the key is put before the
            metric's name. One number per sample, 1.0 where it is correct: the n samples of the first question, then
            of the second, … Metrics: `pass_at_1` (mean of the samples) and, for n > 1, `pass_at_<n>`.
    """
    metrics = []
    for prefix, found in verdicts.items():
        scores = {f"{prefix}pass_at_1": AvgAtN(n=n_samples, sample_scoring_function=_look_up(found))}
        if n_samples > 1:
            scores[f"{prefix}pass_at_{n_samples}"] = PassAtK(
                k=n_samples, n=n_samples, sample_scoring_function=_look_up(found)
            )
        metrics += [
            SampleLevelMetric(
                metric_name=metric,
                sample_level_fn=score,
                category=SamplingMethod.GENERATIVE,
                corpus_level_fn=np.mean,
                higher_is_better=True,
            )
            for metric, score in scores.items()
        ]
    return LightevalTaskConfig(
        name=name,
        prompt_function=_question,
        hf_repo="",  # the rows are handed over by _Replay
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        few_shots_split="test",
        metrics=metrics,
    )


def replay(config: LightevalTaskConfig, questions: pa.Table) -> dict[str, float]:
    """Run lighteval's Pipeline over stored samples.

    Args:
        config: from `task_config`.
        questions: rows of the prepared schema (id, prompt, solution), in the order of the verdicts.

    Returns:
        lighteval's aggregated results: each metric, and `<metric>_stderr` where there are two or more questions.
    """
    with TemporaryDirectory() as scratch:  # lighteval makes its cache and output folders; we keep neither
        pipeline = _Replay(config, questions, Path(scratch))
        pipeline.evaluate()
        return pipeline.get_results()["results"][config.full_name.replace("|", ":")]


def _look_up(verdicts: list[float]):
    def score(doc: Doc, model_response: ModelResponse) -> float:
        return verdicts[int(model_response.final_text[0])]

    return score


def _question(row: dict, task_name: str) -> Doc:
    return Doc(
        query=row["prompt"][-1]["content"],
        choices=[row["solution"]],
        gold_index=0,
        specific={"id": row["id"]},  # lighteval shuffles its docs: the samples are found by this id
        task_name=task_name,
    )


class _StoredSamples(LightevalModel):
    """A model whose n answers to a question are their places in the list of verdicts.

    lighteval's base class wants the other members too; a generative task never uses them, so they refuse.
    """

    def __init__(self, ids: list[str], cache_dir: Path) -> None:
        self.config = ModelConfig(model_name="stored-samples", cache_dir=str(cache_dir))
        self._cache = SampleCache(self.config)  # Pipeline expects every model to have one
        self.question = {key: number for number, key in enumerate(ids)}

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        starts = [self.question[doc.specific["id"]] * doc.num_samples for doc in docs]
        return [
            ModelResponse(text=[str(place) for place in range(start, start + doc.num_samples)])
            for start, doc in zip(starts, docs, strict=True)
        ]

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        raise NotImplementedError("samples have no log-likelihoods")

    loglikelihood_rolling = loglikelihood

    @property
    def tokenizer(self):
        raise NotImplementedError("samples are text")

    @property
    def add_special_tokens(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return 0


class _OurTask(Registry):
    """A registry of one task: lighteval's constructor imports all built-in ones, and one of them downloads."""

    def __init__(self, config: LightevalTaskConfig) -> None:
        self._task_registry = {config.name: config}


class _Replay(Pipeline):
    """lighteval's Pipeline with the task and its rows handed over instead of looked up and downloaded."""

    def __init__(self, config: LightevalTaskConfig, questions: pa.Table, scratch: Path) -> None:
        self.config = config
        self.questions = questions
        parameters = PipelineParameters(launcher_type=ParallelismManager.NONE)
        tracker = EvaluationTracker(output_dir=str(scratch), save_details=False)
        model = _StoredSamples(questions["id"].to_pylist(), scratch)
        super().__init__(config.name, parameters, tracker, model=model)

    def _init_tasks_and_requests(self, tasks: str) -> None:
        task = LightevalTask(self.config)
        task.dataset = datasets.DatasetDict({"test": datasets.Dataset(self.questions)})
        self.registry = _OurTask(self.config)
        self.tasks_dict = {task.full_name: task}
        self.documents_dict = {task.full_name: task.get_docs()}
        self.sampling_docs = {SamplingMethod.GENERATIVE: self.documents_dict[task.full_name]}
        self.evaluation_tracker.task_config_logger.log(self.tasks_dict)
