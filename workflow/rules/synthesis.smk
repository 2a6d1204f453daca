# References + layouts -> synthetic cases, several shards a generator.


rule synthesize:
    input:
        cases="results/cases/cases.tsv",
        weights=lambda wildcards: denoiser_of(wildcards.generator),
        external=lambda wildcards: files_of_external(wildcards.generator),
    output:
        ensure(
            "results/synthetic/{generator}/samples-{dose}-{shard}.tsv", non_empty=True
        ),
    log:
        "results/logs/synthesize-{generator}-{dose}-{shard}.log",
    benchmark:
        "results/benchmarks/synthesize-{generator}-{dose}-{shard}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: half_the_cores
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=lambda wildcards: len(denoiser_of(wildcards.generator)),
    params:
        folder=subpath(output[0], parent=True),
        weights=lambda wildcards, input: (
            f"--weights {input.weights}" if input.weights else ""
        ),
        shards=lambda wildcards: shards_of(wildcards.generator),
        external=external_option,
        settings=lambda wildcards: settings_of(
            "synthesis",
            sampling=sampling_of(wildcards.generator),
            run=SETTINGS.diffusion.run,
            window=SETTINGS.grid.window_hu,
        ),
        code=code_fingerprint("layouts", "diffusion", "generators"),
    shell:
        "lungddpm --log {log} synthesize --config results/config.json --generator {wildcards.generator}"
        " --dose {wildcards.dose} --cases {input.cases} {params.weights} {params.external}"
        " --output {params.folder} --shard {wildcards.shard} --shards {params.shards} --table {output} --threads {threads}"
