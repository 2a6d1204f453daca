# Cases -> weights of every generator in use that is trained.


rule train_generator:
    input:
        cases="results/cases/cases.tsv",
    output:
        ensure(
            "results/models/{generator}/{run}/{training}/model.safetensors",
            non_empty=True,
        ),
    log:
        "results/logs/train_generator-{generator}-{run}-{training}.log",
    benchmark:
        "results/benchmarks/train_generator-{generator}-{run}-{training}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: cores_of_training
    resources:
        mem_mb=16000,
        runtime=2880,
        gpu=SETTINGS.workflow.training_processes,
        # What the Slurm plugin needs to leave several nodes to the launcher: a task and `gres` on each.
        nodes=several_nodes(SETTINGS.workflow.training_nodes),
        tasks=several_nodes(SETTINGS.workflow.training_nodes),
        tasks_per_gpu=several_nodes(0),
        gres=several_nodes(f"gpu:{SETTINGS.workflow.training_gpus}"),
        mpi=several_nodes("srun"),
    params:
        config=config_of_jobs,
        folder=subpath(output[0], parent=True),
        settings=lambda wildcards: settings_of(
            window=SETTINGS.grid.window_hu,
            **TRAINED[wildcards.generator].settings.decides_weights(
                SETTINGS.workflow.training_processes
            ),
        ),
        code=lambda wildcards: stage_fingerprint(
            "train", SETTINGS.kind_of(wildcards.generator)
        ),
        # As it depends on `threads`, Snakemake does not count it among what makes the job run again.
        launcher=training_launcher,
    shell:
        "{params.launcher} lungddpm --log {log:q} train --configfile {params.config:q} --generator {wildcards.generator}"
        " --cohort {wildcards.training} --cases {input.cases:q} --output {params.folder:q}"
        " --threads {threads}"
