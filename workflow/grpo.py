"""Group relative policy optimisation of one phase with TRL's GRPOTrainer; run through workflow.launch."""

import argparse
import tempfile
from pathlib import Path

from workflow import stage
from workflow.params import load_params, pick

LIBRARIES = ["accelerate", "torch", "transformers", "trl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", help="a name under grpo in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to start from")
    parser.add_argument("--dataset", type=Path, required=True, help="prepared parquet with solutions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    params = load_params()
    phase = pick(params.grpo, args.phase, "grpo")

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from workflow.launch import load_hardware
    from workflow.rewards import reward_functions
    from workflow.training import RunLog, finish, load_tokenizer, trainer_options
    from workflow.verify import Verifier

    with tempfile.TemporaryDirectory() as scratch, Verifier() as verifier:
        dataset = Dataset.from_parquet(str(args.dataset), cache_dir=scratch)
        if any(solution is None for solution in dataset["solution"]):
            raise stage.StageError(f"grpo.{args.phase}.dataset has no solutions; name one whose format has them")
        options = trainer_options("grpo", phase, params.seed, load_hardware(), scratch)
        trainer = GRPOTrainer(
            model=str(args.model),
            reward_funcs=reward_functions(list(phase.rewards), verifier),
            args=GRPOConfig(**options, reward_weights=list(phase.rewards.values())),
            train_dataset=dataset.select_columns(["prompt", "solution"]),
            processing_class=load_tokenizer(args.model),
            callbacks=[RunLog(f"grpo {args.phase}", args.log, ["reward", "completions/mean_length"])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        facts = finish(trainer, args.output, args.log)
    if trainer.accelerator.is_main_process:
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        summary = f"{facts['steps']} steps, {f'reward {rewards[-1]:.3f}' if rewards else 'no reward was logged'}"
        stage.record(args.log, "grpo", args.phase, LIBRARIES, summary, **facts)


if __name__ == "__main__":
    stage.run(main)
