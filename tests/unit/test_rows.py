from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def trainer() -> Any:
    """What RowNotes adds to a trainer, over one whose loss is told by its batch."""
    from workflow.rows import RowNotes

    class Losses:
        def __init__(self) -> None:
            self.state = SimpleNamespace(global_step=0)

        def compute_loss(self, model: Any, inputs: dict[str, Any], outputs: bool = False) -> Any:
            assert set(inputs) == {"loss"}
            return (inputs["loss"], None) if outputs else inputs["loss"]

    class Trainer(RowNotes, Losses):
        pass

    return Trainer()


def step(trainer: Any, number: int, *batches: tuple[float, list[str]], training: bool = True) -> None:
    import torch

    trainer.state.global_step = number - 1
    for loss, rows in batches:
        inputs = {"loss": torch.tensor(loss), "rows": rows}
        trainer.compute_loss(SimpleNamespace(training=training), inputs, outputs=len(rows) == 1)
        assert inputs["rows"] == rows  # GRPO uses a batch again


def test_the_rows_of_the_first_loss_that_is_no_number(trainer):
    from workflow.rows import guilty

    step(trainer, 1, (1.0, ["a"]), (0.5, ["b", "c"]))
    step(trainer, 2, (1.0, ["d"]), (float("inf"), ["e", "f"]), (2.0, ["g"]))
    step(trainer, 3, (float("nan"), ["h"]))
    step(trainer, 3, (float("nan"), ["evaluated"]), training=False)
    assert guilty(trainer) == "step 2, on rows e, f"


def test_all_rows_of_the_last_step_where_only_its_gradient_is_wrong(trainer):
    from workflow.rows import guilty

    assert guilty(trainer) == "the update of step 0"
    step(trainer, 8, (1.0, ["a"]))
    step(trainer, 9, (1.0, ["b", "b"]), (1.0, ["c"]))
    assert guilty(trainer) == "step 9, on rows b, c"


def test_few_of_many_rows_are_named():
    from workflow.rows import some_rows

    assert some_rows([f"traces-{n}" for n in range(9)]) == (
        "rows traces-0, traces-1, traces-2, traces-3, traces-4 and 4 more"
    )
    assert some_rows(["a", "a"]) == "row a"


def test_a_packed_sequence_is_named_by_its_first_words(tiny_model):
    from transformers import AutoTokenizer

    from workflow.rows import SFTRowTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    packed = SimpleNamespace(processing_class=tokenizer)
    ids = tokenizer("What is 1 + 2? It is the sum of one and two, which is three.")["input_ids"]
    assert SFTRowTrainer.row(packed, {"input_ids": ids}).startswith("'What is 1 + 2? It")
    assert SFTRowTrainer.row(packed, {"input_ids": ids, "id": "traces-1"}) == "traces-1"
