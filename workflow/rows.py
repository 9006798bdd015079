"""On which rows a loss was computed, for the case that it is no number.

Imported inside main(): it needs TRL.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer
from trl import SFTTrainer

from workflow import stage

SHOWN = 5
WORDS = 20  # tokens that are shown of a packed sequence, which has no id


class RowNotes:
    """Makes a trainer remember, until it logs, on which rows each loss was computed; it comes before the trainer.

    Losses are kept as they are, on their device, and are looked at only when something is wrong. Each batch has the
    ids of its rows under `rows`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[int, list[str], torch.Tensor]] = []  # steps done before, ids, loss

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss of a batch; its rows are noted where it is one of training."""
        inputs = dict(inputs)  # GRPO uses a batch several times
        rows = inputs.pop("rows")
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            self.noted.append((self.state.global_step, rows, loss.detach()))
        return found


class SFTRowTrainer(RowNotes, SFTTrainer):
    """SFTTrainer that remembers rows by their column `id`, or packed ones by their first words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        collate = self.data_collator

        def collate_with_rows(examples: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collate(examples), "rows": [self.row(example) for example in examples]}

        self.data_collator = collate_with_rows

    def row(self, example: dict[str, Any]) -> str:
        """The id of a row, or the first words of a packed sequence."""
        return example["id"] if "id" in example else repr(self.processing_class.decode(example["input_ids"][:WORDS]))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "id" not in self._signature_columns:
            self._signature_columns.append("id")


def guilty(trainer: Trainer) -> str:
    """The step and the rows of the first loss that is no finite number, else those of the last step, in words.

    Every process must call it, and gets the same answer.
    """
    mine = [(done, rows, bool(torch.isfinite(loss))) for done, rows, loss in trainer.noted]
    noted = sorted(gather_object(mine), key=lambda one: one[0])
    if not noted:
        return f"the update of step {trainer.state.global_step}"
    wrong = [done for done, _, finite in noted if not finite]
    step = wrong[0] if wrong else noted[-1][0]
    rows = [row for done, rows, finite in noted if done == step and not (wrong and finite) for row in rows]
    return f"step {step + 1}, on {some_rows(rows)}"


def some_rows(rows: Sequence[str]) -> str:
    """Some ids in words, each once."""
    rows = list(dict.fromkeys(rows))
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(rows[:SHOWN])}{more}"


def check_weights(trainer: Trainer, where: str) -> None:
    """Raise StageError, in every process, where a weight is not finite: it would end up in a checkpoint or the model.

    Args:
        where: the phase in params.yaml, e.g. `grpo.reasoning`.
    """
    plugin = trainer.args.deepspeed_plugin
    sharded = plugin is not None and plugin.zero_stage == 3  # each process looks at its own part
    weights = (weight.ds_tensor if sharded else weight.data for weight in trainer.model.parameters())
    fine = torch.tensor([all(bool(weight.isfinite().all()) for weight in weights)], device=trainer.args.device)
    if trainer.accelerator.gather(fine).all():
        return
    if trainer.state.global_step == 0:
        raise stage.StageError(
            f"{where}: the start model has weights that are no finite numbers; name another under start_from, or train "
            "it again"
        )
    raise stage.StageError(
        f"{where}: after step {trainer.state.global_step} there are weights that are no finite numbers (first seen in "
        f"{guilty(trainer)}); the last checkpoint before is kept; write a lower trainer.learning_rate or "
        "trainer.max_grad_norm, or trainer.bf16: true"
    )
