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
        gpu=1,
    params:
        folder=subpath(output[0], parent=True),
        section=lambda wildcards: SECTION_OF_RUN[wildcards.run],
        settings=lambda wildcards: settings_of(
            window=SETTINGS.grid.window_hu,
            **SETTINGS.denoisers()[SECTION_OF_RUN[wildcards.run]].decides_weights(),
        ),
        code=code_fingerprint("diffusion"),
        # Several GPUs (--set-resources train_denoiser:gpu=4): a process each.
        launcher=lambda wildcards, resources: (
            f"torchrun --standalone --nproc-per-node {resources.gpu} --no-python --"
            if resources.gpu > 1
            else ""
        ),
    shell:
        "{params.launcher} lungddpm --log {log} train --config results/config.json --section {params.section} --cases {input.cases}"
        " --output {params.folder} --threads {threads}"
