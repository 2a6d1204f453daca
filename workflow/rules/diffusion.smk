# Cases -> denoisers: of Lung-DDPM, and of Lung-DDPM+ where its generator is in use.


rule train_denoiser:
    input:
        cases="results/cases/cases.tsv",
    output:
        ensure("results/diffusion/{run}/model.safetensors", non_empty=True),
    log:
        "results/logs/train_denoiser-{run}.log",
    benchmark:
        "results/benchmarks/train_denoiser-{run}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: half_the_cores
    resources:
        mem_mb=16000,
        runtime=2880,
        gpu=SETTINGS.workflow.denoiser_processes,
        # What the Slurm plugin needs to leave several nodes to the launcher: a task and `gres` on each.
        nodes=several_nodes(SETTINGS.workflow.denoiser_nodes),
        tasks=several_nodes(SETTINGS.workflow.denoiser_nodes),
        tasks_per_gpu=several_nodes(0),
        gres=several_nodes(f"gpu:{SETTINGS.workflow.denoiser_gpus}"),
        mpi=several_nodes("srun"),
    params:
        folder=subpath(output[0], parent=True),
        section=lambda wildcards: SECTION_OF_RUN[wildcards.run],
        settings=lambda wildcards: settings_of(
            window=SETTINGS.grid.window_hu,
            **SETTINGS.denoisers()[SECTION_OF_RUN[wildcards.run]].decides_weights(
                SETTINGS.workflow.denoiser_processes
            ),
        ),
        code=stage_fingerprint("train"),
        # As these depend on `threads`, Snakemake does not count them among what makes the job run again.
        launcher=denoiser_launcher,
        threads_each=lambda wildcards, threads: max(
            1, threads // SETTINGS.workflow.denoiser_gpus
        ),
    shell:
        "{params.launcher} lungddpm --log {log} train --config results/config.json --section {params.section} --cases {input.cases}"
        " --output {params.folder} --threads {params.threads_each}"
