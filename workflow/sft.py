"""Supervised fine-tuning of one phase with TRL's SFTTrainer; run through workflow.launch."""

import argparse
import tempfile
from pathlib import Path

from workflow import stage
from workflow.params import load_params, pick

LIBRARIES = ["accelerate", "torch", "transformers", "trl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", help="a name under sft in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to start from")
    parser.add_argument("--dataset", type=Path, required=True, help="prepared parquet with completions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    phase = pick(params.sft, args.phase, "sft")

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from workflow.launch import load_hardware
    from workflow.training import RunLog, finish, load_tokenizer, trainer_options

    with tempfile.TemporaryDirectory() as scratch:
        dataset = Dataset.from_parquet(str(args.dataset), cache_dir=scratch)
        if any(completion is None for completion in dataset["completion"]):
            raise stage.StageError(f"sft.{args.phase}.dataset has no completions; name one whose format has them")
        trainer = SFTTrainer(
            model=str(args.model),
            args=SFTConfig(**trainer_options("sft", phase, params.seed, load_hardware(), scratch)),
            train_dataset=dataset.select_columns(["prompt", "completion"]),
            processing_class=load_tokenizer(args.model),
            callbacks=[RunLog(f"sft {args.phase}", args.log, ["loss", "mean_token_accuracy"])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        facts = finish(trainer, args.output, args.log)
    if trainer.accelerator.is_main_process:
        summary = f"{facts['steps']} steps, mean loss {facts['loss']:.3f}, {facts['tokens_per_second']} tokens/s"
        stage.record(args.log, "sft", args.phase, LIBRARIES, summary, **facts)


if __name__ == "__main__":
    stage.run(main)
