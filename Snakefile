# The same DAG as `dvc repro`: one rule per entry of dvc.yaml. Snakemake decides when and where a stage runs, DVC whether
# there is anything to do, and DVC keeps the result. Resources of the jobs are in workflow/profiles/.
from workflow.pipeline import check_profile, load_stages

STAGES = load_stages()
ENTRIES = list(dict.fromkeys(stage.entry for stage in STAGES.values()))
STAMP = ".scratch/stamps/{stage}"
# Only these need a network, or say within a second what is wrong: they run where snakemake was started.
LOCAL = ["check", "download"]
# On one machine a stage has all of it; the jobs of a cluster have the profile's cpus_per_task.
THREADS = workflow.resource_settings.cores or 1

check_profile(workflow.resource_settings)


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
for ENTRY in ENTRIES:

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
        benchmark:
            ".scratch/benchmarks/{stage}.tsv"
        wildcard_constraints:
            stage="{}(@.+)?".format(ENTRY),
        localrule: ENTRY in LOCAL
        threads: THREADS
        resources:
            hardware="auto",
        params:
            # Changed parameters re-run the rule; DVC then looks which of them matter.
            values=parameters,
        run:
            # The software is the locked environment that runs Snakemake itself, so no conda environment per rule.
            # exec: SLURM signals every process of a job, and a shell would die of it before the stage has saved.
            shell(
                "exec python -m workflow.job {wildcards.stage:q} --log {log:q} --stamp {output:q} --hardware {resources.hardware:q}"
            )


# Copies of what a person reads, for `snakemake results --report`.
rule results:
    input:
        STAMP.format(stage="report"),
    output:
        report(
            ".scratch/results/report.html",
            category="Results",
            caption="workflow/results.rst",
        ),
        report(
            ".scratch/results/report.txt",
            category="Results",
            caption="workflow/results.rst",
        ),
    log:
        ".scratch/logs/results.log",
    localrule: True
    run:
        shell(
            "cp data/report/report.html data/report/report.txt .scratch/results 2> {log:q}"
        )
