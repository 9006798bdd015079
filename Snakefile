# The same DAG as `dvc repro`: one rule per entry of dvc.yaml. Snakemake decides when a stage runs, DVC whether
# there is anything to do, and DVC keeps the result. `snakemake --cores all` runs everything.
from pathlib import Path

from workflow.pipeline import load_stages, made

STAGES = load_stages()
STAMP = ".scratch/stamps/{stage}"


def upstream(wildcards):
    return [STAMP.format(stage=name) for name in STAGES[wildcards.stage].upstream]


def code(wildcards):
    return STAGES[wildcards.stage].files


def parameters(wildcards):
    return STAGES[wildcards.stage].params


rule all:
    input:
        [STAMP.format(stage=name) for name in STAGES],


# Named functions and constant text, no lambda or f-string: in a loop those would see only the last entry.
for ENTRY in dict.fromkeys(stage.entry for stage in STAGES.values()):

    rule:
        name:
            ENTRY
        input:
            upstream,
            code,
        output:
            # A stamp, never the artifact: Snakemake would delete it when a job fails. It holds the hashes of what the
            # stage made, because for Snakemake an input with the same content is not a new one.
            STAMP,
        log:
            ".scratch/logs/{stage}.log",
        wildcard_constraints:
            stage=ENTRY + "(@.+)?",
        threads: workflow.cores
        params:
            # Changed parameters re-run the rule; DVC then looks which of them matter.
            values=parameters,
        run:
            # The software is the locked environment that runs Snakemake itself, so no conda environment per rule.
            shell(
                "dvc --wait-for-lock repro --single-item '{wildcards.stage}' 2>&1 | tee '{log}'"
            )
            Path(output[0]).write_text(made(wildcards.stage))
