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
        settings=lambda wildcards: settings_of(
            "roles",
            n_folds=SETTINGS.segmentation.n_folds,
            learn_from=SETTINGS.arms.generators_learn_from,
            own_draws=has_own_draws(Arm.parse(wildcards.arm)),
        ),
        code=stage_fingerprint("compose"),
    shell:
        "lungddpm --log {log:q} compose {params.samples} --config {params.config:q}"
        " --arm {wildcards.arm:q} --cases {input.cases:q} --output {params.folder:q}"


# What one replicate alone trains on: a job of its own, so that one more replicate leaves those of the others alone.
rule compose_draw:
    input:
        cases="results/cases/cases.tsv",
        arm="results/arms/{arm}/arm.json",
        samples=samples_of_draw,
    output:
        ensure("results/arms/{arm}/draws/{replicate}/draw.json", non_empty=True),
    log:
        "results/logs/compose_draw-{arm}-{replicate}.log",
    benchmark:
        "results/benchmarks/compose_draw-{arm}-{replicate}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=config_of_jobs,
        folder=subpath(input.arm, parent=True),
        samples=lambda wildcards, input: named_tables(input.samples),
        settings=settings_of("roles", learn_from=SETTINGS.arms.generators_learn_from),
        code=stage_fingerprint("compose_draw"),
    shell:
        "lungddpm --log {log:q} compose {params.samples} --config {params.config:q} --arm {wildcards.arm:q}"
        " --replicate {wildcards.replicate} --cases {input.cases:q} --output {params.folder:q}"
