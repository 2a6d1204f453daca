# Real and synthetic cases -> training sets, behind the leak guard.


rule compose:
    input:
        cases="results/cases/cases.tsv",
        samples=samples_of_arm,
    output:
        ensure("results/arms/{arm}/arm.json", non_empty=True),
    log:
        "results/logs/compose-{arm}.log",
    benchmark:
        "results/benchmarks/compose-{arm}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=config_of_jobs,
        folder=subpath(output[0], parent=True),
        samples=lambda wildcards, input: named_tables(input.samples),
        settings=settings_of("roles", n_folds=SETTINGS.segmentation.n_folds),
        code=stage_fingerprint("compose"),
    shell:
        "lungddpm --log {log:q} compose {params.samples} --config {params.config:q}"
        " --arm {wildcards.arm:q} --cases {input.cases:q} --output {params.folder:q}"
