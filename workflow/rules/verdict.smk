# Predictions -> measures -> tables, figures, report.


rule evaluate:
    input:
        cases="results/cases/cases.tsv",
        predictions="results/segmentation/{arm}/{replicate}/predictions",
    output:
        metrics=ensure(
            "results/segmentation/{arm}/{replicate}/metrics.csv",
            non_empty=True,
        ),
        lesions=ensure(
            "results/segmentation/{arm}/{replicate}/lesions.csv",
            non_empty=True,
        ),
        candidates=ensure(
            "results/segmentation/{arm}/{replicate}/candidates.csv",
            non_empty=True,
        ),
        evaluation=ensure(
            "results/segmentation/{arm}/{replicate}/evaluation.json",
            non_empty=True,
        ),
    log:
        "results/logs/evaluate-{arm}-{replicate}.log",
    benchmark:
        "results/benchmarks/evaluate-{arm}-{replicate}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=config_of_jobs,
        folder=subpath(output.metrics, parent=True),
        code=stage_fingerprint("evaluate"),
    shell:
        "lungddpm --log {log:q} evaluate --configfile {params.config:q} --cases {input.cases:q}"
        " --predictions {input.predictions:q} --output {params.folder:q}"


rule quality:
    input:
        cases="results/cases/cases.tsv",
        samples=lambda wildcards: samples_to_judge(wildcards.generator),
        weights=weights_of_features,
    output:
        samples=ensure("results/quality/{generator}.csv", non_empty=True),
        sets=ensure("results/quality/{generator}-sets.csv", non_empty=True),
    log:
        "results/logs/quality-{generator}.log",
    benchmark:
        "results/benchmarks/quality-{generator}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=8000,
        runtime=480,
    params:
        config=config_of_jobs,
        samples=lambda wildcards, input: named_tables(input.samples),
        weights=lambda wildcards, input: (
            f"--weights {shlex.quote(str(input.weights))}" if input.weights else ""
        ),
        settings=settings_of("image_quality", window=SETTINGS.grid.window_hu),
        code=stage_fingerprint("quality"),
    shell:
        "lungddpm --log {log:q} quality {params.samples} --configfile {params.config:q} --generator {wildcards.generator}"
        " --cases {input.cases:q} {params.weights} --output {output.samples:q} --threads {threads}"


# One process for all generators: nnU-Net's start takes as long as several cases.
rule label_fidelity:
    input:
        cases="results/cases/cases.tsv",
        plan=f"results/arms/{PLANNING_ARM}/plan.json",
        checkpoint=CHECKPOINT.replace("{arm}", PLANNING_ARM),
        samples=lambda wildcards: [
            table
            for name in GENERATORS
            for table in samples_of_replicate(
                name,
                SETTINGS.segmentation.replicate_name(wildcards.fold, wildcards.seed),
            )
        ],
    output:
        lesions=ensure(
            "results/label_fidelity/fold{fold}_seed{seed}/lesions.csv", non_empty=True
        ),
        metrics=ensure(
            "results/label_fidelity/fold{fold}_seed{seed}/metrics.csv", non_empty=True
        ),
    log:
        "results/logs/label_fidelity-fold{fold}_seed{seed}.log",
    benchmark:
        "results/benchmarks/label_fidelity-fold{fold}_seed{seed}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=16000,
        runtime=480,
        gpu=1,
    params:
        config=config_of_jobs,
        arm=subpath(input.plan, parent=True),
        folder=subpath(output.metrics, parent=True),
        samples=lambda wildcards, input: named_tables(input.samples),
        settings=settings_of("label_fidelity", **PREDICTION),
        code=stage_fingerprint("label_fidelity"),
    shell:
        "lungddpm --log {log:q} label-fidelity {params.samples} --configfile {params.config:q} --arm-folder {params.arm:q}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --cases {input.cases:q} --output {params.folder:q}"
        " --threads {threads}"


rule write_report:
    input:
        cases="results/cases/cases.tsv",
        metrics=collect(
            "results/segmentation/{arm}/{replicate}/{name}",
            arm=ARMS,
            replicate=SETTINGS.segmentation.replicates(),
            name=["metrics.csv", "lesions.csv", "candidates.csv", "evaluation.json"],
        ),
        quality=collect(
            "results/quality/{generator}{table}.csv",
            generator=GENERATORS,
            table=["", "-sets"],
        ),
        fidelity=collect(
            "results/label_fidelity/{replicate}/{name}",
            replicate=SETTINGS.segmentation.replicates() if GENERATORS else [],
            name=["lesions.csv", "metrics.csv"],
        ),
        layouts="results/qc/index.html",
    output:
        page=report(
            "results/report.html",
            caption="../report/report.rst",
            category="Verdict",
            labels={"what": "report page"},
        ),
        verdict=report(
            "results/tables/verdict.csv",
            caption="../report/verdict.rst",
            category="Verdict",
            labels={"what": "arms compared with real"},
        ),
        forest=report(
            "results/figures/forest.png",
            caption="../report/forest.rst",
            category="Verdict",
            labels={"what": "differences from real"},
        ),
        dice=report(
            "results/figures/dice_by_arm.png",
            caption="../report/dice_by_arm.rst",
            category="Verdict",
            labels={"what": "Dice by arm"},
        ),
        manifest="results/manifest.json",
    log:
        "results/logs/write_report.log",
    benchmark:
        "results/benchmarks/write_report.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=config_of_jobs,
        folder=subpath(output.page, parent=True),
        settings=settings_of("verdict", arms=ARMS),
        code=stage_fingerprint("report"),
    shell:
        "lungddpm --log {log:q} report --configfile {params.config:q} --results {params.folder:q}"


# Last: whatever a run does, it ends with this.
rule checksums:
    input:
        config=MERGED_CONFIG,
        page="results/report.html",
    output:
        ensure("results/SHA256SUMS", non_empty=True),
    log:
        "results/logs/checksums.log",
    benchmark:
        "results/benchmarks/checksums.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        folder=subpath(output[0], parent=True),
        code=stage_fingerprint("checksums"),
    shell:
        "lungddpm --log {log:q} checksums --results {params.folder:q}"
