"""Group relative policy optimisation of one phase with TRL's GRPOTrainer; run through workflow.launch."""

import argparse
import os
from pathlib import Path

from workflow import stage
from workflow.params import load_params, pick

LIBRARIES = ["accelerate", "peft", "torch", "transformers", "trl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", help="a name under grpo in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to start from")
    parser.add_argument("--dataset", type=Path, required=True, help="prepared parquet with solutions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--resume", type=Path, help="the checkpoint there to go on from")
    args = parser.parse_args()
    stop = stage.stoppable(f"grpo {args.phase}")
    params = load_params()
    phase = pick(params.grpo, args.phase, "grpo")
    where, run = f"grpo.{args.phase}", f"grpo-{args.phase}-seed{params.seed}"

    from workflow.trackers import trackers

    report_to = trackers(run)

    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import GRPOConfig

    from workflow.launch import load_hardware
    from workflow.rewards import reward_functions
    from workflow.rollouts import RolloutTrainer
    from workflow.training import (
        Checkpoints,
        HealthGate,
        RunLog,
        finish,
        hold_out,
        load_tokenizer,
        lora_config,
        trainer_options,
    )
    from workflow.verify import Verifier, worker_count

    hardware, completions = load_hardware(), args.log / "completions.md"
    with Verifier(workers=worker_count()) as verifier:
        verifier.start()
        dataset = Dataset.from_parquet(str(args.dataset), cache_dir=os.environ.get("DATASET_CACHE", str(args.scratch)))
        if any(solution is None for solution in dataset["solution"]):
            raise stage.StageError(f"{where}.dataset has no solutions; name one whose format has them")
        train, held_out = hold_out(dataset.select_columns(["id", "prompt", "solution"]), phase, params.seed, where)
        tokenizer = load_tokenizer(args.model)
        gate = HealthGate(where, phase)
        options = trainer_options(
            params, "grpo", args.phase, hardware, str(args.scratch), resumed=args.resume is not None
        )
        if options.get("use_vllm"):
            # vLLM reads the eos tokens from the model's folder, where a base model has no end of a turn.
            ends = {"stop_token_ids": [tokenizer.eos_token_id]}
            options["generation_kwargs"] = {**options.get("generation_kwargs", {}), **ends}
        trainer = RolloutTrainer(
            model=str(args.model),
            reward_funcs=reward_functions(phase, verifier, models=args.output.parent),
            args=GRPOConfig(**options, reward_weights=list(phase.rewards.values()), report_to=report_to, run_name=run),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=lora_config(phase),
            callbacks=[
                RunLog(f"grpo {args.phase}", args.log, ["reward", "completions/mean_length"]),
                gate,
            ],
            completions=completions,
        )
        gate.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        checkpoints = Checkpoints(
            f"grpo {args.phase}",
            trainer,
            stop,
            hardware.checkpoint_minutes,
            args.resume,
            # The reference model that moves after the trained one is in no checkpoint.
            may_save=None if trainer.args.sync_ref_model else lambda: trainer.generates_next,
            log=completions,
        )
        trainer.add_callback(checkpoints)
        if options.get("use_vllm"):
            set_seed(
                params.seed, device_specific=True
            )  # vLLM has set the process' number, whatever the recipe's seed is
        trainer.train(resume_from_checkpoint=args.resume and str(args.resume))
        facts = finish(trainer, f"grpo.{args.phase}", phase, args.model, args.output, args.log, checkpoints.earlier)
        facts["warnings"] = list(gate.warned.values())
    if trainer.accelerator.is_main_process:
        reward = f"reward {facts['reward']:.3f}" if "reward" in facts else "no reward was logged"
        summary = f"{facts['steps']} steps, {reward}"
        stage.record(args.log, "grpo", args.phase, LIBRARIES, summary, [args.output], checkpoints.earlier, **facts)
    trainer.accelerator.end_training()  # else a thread of gloo may abort this process while Python shuts down


if __name__ == "__main__":
    stage.run(main)
