"""Supervised fine-tuning of one phase with TRL's SFTTrainer; run through workflow.launch."""

import argparse
import os
from pathlib import Path

from workflow import stage
from workflow.params import load_params, pick

LIBRARIES = ["accelerate", "peft", "torch", "transformers", "trl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", help="a name under sft in params.yaml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to start from")
    parser.add_argument("--dataset", type=Path, required=True, help="prepared parquet with completions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--resume", type=Path, help="the checkpoint there to go on from")
    args = parser.parse_args()
    stop = stage.stoppable(f"sft {args.phase}")
    params = load_params()
    phase = pick(params.sft, args.phase, "sft")
    where, run = f"sft.{args.phase}", f"sft-{args.phase}-seed{params.seed}"

    from workflow.trackers import trackers

    report_to = trackers(run)

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig

    from workflow.launch import load_hardware
    from workflow.rows import SFTRowTrainer
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

    hardware = load_hardware()
    dataset = Dataset.from_parquet(str(args.dataset), cache_dir=os.environ.get("DATASET_CACHE", str(args.scratch)))
    if any(completion is None for completion in dataset["completion"]):
        raise stage.StageError(f"{where}.dataset has no completions; name one whose format has them")
    train, held_out = hold_out(dataset.select_columns(["id", "prompt", "completion"]), phase, params.seed, where)
    options = trainer_options(params, "sft", args.phase, hardware, str(args.scratch), resumed=args.resume is not None)
    gate = HealthGate(where, phase)
    trainer = SFTRowTrainer(
        model=str(args.model),
        args=SFTConfig(**options, report_to=report_to, run_name=run),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(args.model),
        peft_config=lora_config(phase),
        callbacks=[
            RunLog(f"sft {args.phase}", args.log, ["loss", "mean_token_accuracy"]),
            gate,
        ],
    )
    gate.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    checkpoints = Checkpoints(f"sft {args.phase}", trainer, stop, hardware.checkpoint_minutes, args.resume)
    trainer.add_callback(checkpoints)
    trainer.train(resume_from_checkpoint=args.resume and str(args.resume))
    facts = finish(trainer, f"sft.{args.phase}", phase, args.model, args.output, args.log, checkpoints.earlier)
    if trainer.accelerator.is_main_process:
        summary = f"{facts['steps']} steps, mean loss {facts['loss']:.3f}, {facts['tokens_per_second']} tokens/s"
        stage.record(args.log, "sft", args.phase, LIBRARIES, summary, [args.output], checkpoints.earlier, **facts)
    trainer.accelerator.end_training()  # else a thread of gloo may abort this process while Python shuts down


if __name__ == "__main__":
    stage.run(main)
