# References + layouts -> synthetic cases, several shards a generator.


rule synthesize:
    input:
        cases="results/cases/cases.tsv",
        weights=denoiser_of,
    output:
        ensure("results/synthetic/{generator}/samples-{shard}.tsv", non_empty=True),
    log:
        "results/logs/synthesize-{generator}-{shard}.log",
    benchmark:
        "results/benchmarks/synthesize-{generator}-{shard}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: half_the_cores
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=lambda wildcards: int(module_of(wildcards.generator).NEEDS_DENOISER),
    params:
        folder=subpath(output[0], parent=True),
        weights=lambda wildcards, input: (
            f"--weights {input.weights}" if input.weights else ""
        ),
        shards=SETTINGS.workflow.synthesis_shards,
        settings=settings_of(
            sampling=SETTINGS.diffusion.sampling.model_dump(),
            run=RUN,
            window=SETTINGS.grid.window_hu,
            doses=SETTINGS.arms.largest_doses(),
            layouts=SETTINGS.synthesis.model_dump(),
        ),
        code=code_fingerprint("layouts", "diffusion", "generators"),
    shell:
        "lungddpm --log {log} synthesize --config results/config.json --generator {wildcards.generator}"
        " --cases {input.cases} {params.weights} --output {params.folder} --shard {wildcards.shard}"
        " --shards {params.shards} --table {output} --threads {threads}"
