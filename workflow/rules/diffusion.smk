# Cases -> denoiser.


rule train_denoiser:
    input:
        cases="results/cases/cases.tsv",
    output:
        ensure(f"results/diffusion/{RUN}/model.safetensors", non_empty=True),
    log:
        "results/logs/train_denoiser.log",
    benchmark:
        "results/benchmarks/train_denoiser.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: half_the_cores
    resources:
        mem_mb=16000,
        runtime=2880,
        gpu=1,
    params:
        folder=subpath(output[0], parent=True),
        settings=settings_of(
            window=SETTINGS.grid.window_hu,
            **SETTINGS.diffusion.model_dump(exclude={"sampling"}),
        ),
        code=code_fingerprint("diffusion"),
    shell:
        "lungddpm --log {log} train --config results/config.json --cases {input.cases} --output {params.folder}"
        " --threads {threads}"
