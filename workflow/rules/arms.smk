# Real and synthetic cases -> training sets, behind the leak guard.


rule compose:
    input:
        cases="results/cases/cases.tsv",
        samples=samples_of_arm,
        filters=filters_of_arm,
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
        filters=filter_options,
        settings=lambda wildcards: settings_of(
            "roles",
            n_folds=SETTINGS.segmentation.n_folds,
            learn_from=SETTINGS.arms.generators_learn_from,
            own_draws=has_own_draws(Arm.parse(wildcards.arm)),
            **filter_settings(wildcards.arm),
        ),
        code=stage_fingerprint("compose"),
    shell:
        "lungddpm --log {log:q} compose {params.samples} --configfile {params.config:q}"
        " --arm {wildcards.arm:q} --cases {input.cases:q} --output {params.folder:q} {params.filters}"


# What one replicate alone trains on: a job of its own, so that one more replicate leaves those of the others alone.
rule compose_draw:
    input:
        cases="results/cases/cases.tsv",
        arm="results/arms/{arm}/arm.json",
        samples=samples_of_draw,
        filters=filter_of_draw,
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
        filters=filter_options,
        settings=lambda wildcards: settings_of(
            "roles",
            learn_from=SETTINGS.arms.generators_learn_from,
            **filter_settings(wildcards.arm),
        ),
        code=stage_fingerprint("compose_draw"),
    shell:
        "lungddpm --log {log:q} compose {params.samples} --configfile {params.config:q} --arm {wildcards.arm:q}"
        " --replicate {wildcards.replicate} --cases {input.cases:q} --output {params.folder:q} {params.filters}"


# Which samples the segmenters of the same real cases alone find: for filtered arms, before these are composed.
rule filter_samples:
    input:
        cases="results/cases/cases.tsv",
        plan=lambda wildcards: f"results/arms/{Arm.parse(wildcards.arm).baseline.name}/plan.json",
        checkpoint=lambda wildcards: CHECKPOINT.format(
            arm=Arm.parse(wildcards.arm).baseline.name,
            fold=wildcards.fold,
            seed=wildcards.seed,
        ),
        samples=samples_to_filter,
    output:
        ensure("results/filter/{arm}/fold{fold}_seed{seed}/filter.json", non_empty=True),
    log:
        "results/logs/filter_samples-{arm}-fold{fold}_seed{seed}.log",
    benchmark:
        "results/benchmarks/filter_samples-{arm}-fold{fold}_seed{seed}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=16000,
        runtime=480,
        gpu=1,
    params:
        config=config_of_jobs,
        baseline=subpath(input.plan, parent=True),
        folder=subpath(output[0], parent=True),
        samples=lambda wildcards, input: named_tables(input.samples),
        # How many are judged; which of them are kept is decided later.
        settings=settings_of(draws=SETTINGS.arms.filter.draws, **PREDICTION),
        code=stage_fingerprint("filter_samples"),
    shell:
        "lungddpm --log {log:q} filter {params.samples} --configfile {params.config:q} --arm {wildcards.arm:q}"
        " --arm-folder {params.baseline:q} --fold {wildcards.fold} --seed {wildcards.seed} --cases {input.cases:q}"
        " --output {params.folder:q} --threads {threads}"
