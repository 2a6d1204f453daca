# Training sets -> nnU-Net -> predictions of the test cases. All arms use the same plans, made on the real cases.


rule plan:
    input:
        arm="results/arms/{arm}/arm.json",
        plans=plans_of,
    output:
        ensure("results/arms/{arm}/plan.json", non_empty=True),
    log:
        "results/logs/plan-{arm}.log",
    benchmark:
        "results/benchmarks/plan-{arm}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        config=config_of_jobs,
        folder=subpath(output[0], parent=True),
        plans_from=folder_of_plans,
        settings=settings_of(
            network=SEGMENTER["network"], batch_size=SEGMENTER["batch_size"]
        ),
        code=stage_fingerprint("plan"),
    shell:
        "lungddpm --log {log:q} segment plan --configfile {params.config:q} --arm-folder {params.folder:q}"
        " --plans-from {params.plans_from:q} --threads {threads}"


rule train_segmenter:
    input:
        plan="results/arms/{arm}/plan.json",
        draw=lambda wildcards: draw_of(
            wildcards.arm,
            SETTINGS.segmentation.replicate_name(wildcards.fold, wildcards.seed),
        ),
    output:
        ensure(CHECKPOINT, non_empty=True),
    log:
        "results/logs/train_segmenter-{arm}-fold{fold}_seed{seed}.log",
    benchmark:
        "results/benchmarks/train_segmenter-{arm}-fold{fold}_seed{seed}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=1,
    params:
        config=config_of_jobs,
        folder=subpath(input.plan, parent=True),
        settings=settings_of(**SEGMENTER),
        code=stage_fingerprint("train_segmenter"),
    shell:
        "lungddpm --log {log:q} segment train --configfile {params.config:q} --arm-folder {params.folder:q}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --threads {threads}"


rule predict:
    input:
        cases="results/cases/cases.tsv",
        plan="results/arms/{arm}/plan.json",
        checkpoint=CHECKPOINT,
    output:
        directory("results/segmentation/{arm}/fold{fold}_seed{seed}/predictions"),
    log:
        "results/logs/predict-{arm}-fold{fold}_seed{seed}.log",
    benchmark:
        "results/benchmarks/predict-{arm}-fold{fold}_seed{seed}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=16000,
        runtime=480,
        gpu=1,
    params:
        config=config_of_jobs,
        folder=subpath(input.plan, parent=True),
        settings=settings_of(**PREDICTION),
        code=stage_fingerprint("predict"),
    shell:
        "lungddpm --log {log:q} segment predict --configfile {params.config:q} --arm-folder {params.folder:q}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --cases {input.cases:q} --output {output:q}"
        " --threads {threads}"
