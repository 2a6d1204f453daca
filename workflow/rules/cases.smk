# Scans -> cases: CT in HU and layout on the model grid.


# For the record, and to start a stage by hand. No job uses it as input: each job has the keys it depends on in
# `params.settings`. (As an `ancient` input it would hide them: where a job is to run, Snakemake does not look for
# reasons of the jobs behind it, as these run anyway, and then finds that for `ancient` they need not.)
rule merge_config:
    output:
        MERGED_CONFIG,
    log:
        "results/logs/merge_config.log",
    # First of all, as `lungddpm status` reads it while the run is under way.
    priority: 1
    localrule: True
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    params:
        **SETTINGS.without_folders().model_dump(mode="json"),
    script:
        "../scripts/merge_config.py"


if SOURCE.simulate:

    rule simulate:
        output:
            touch("results/source/.complete"),
        log:
            "results/logs/simulate.log",
        benchmark:
            "results/benchmarks/simulate.tsv"
        conda:
            "../../envs/lungddpm.yaml"
        threads: all_cores
        resources:
            mem_mb=lambda wildcards, threads: 2000 * threads,
            runtime=60,
        params:
            config=config_of_jobs,
            folder=subpath(output[0], parent=True),
            settings=settings_of(
                cohort=SETTINGS.source.settings.model_dump(mode="json")
            ),
            code=stage_fingerprint("simulate", SOURCE.name),
        shell:
            "lungddpm --log {log:q} simulate --configfile {params.config:q} --output {params.folder:q} --threads {threads}"


rule index:
    input:
        cohort=simulated_cohort,
    output:
        ensure("results/cases/index.tsv", non_empty=True),
    log:
        "results/logs/index.log",
    benchmark:
        "results/benchmarks/index.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        config=config_of_jobs,
        source=source_option,
        external=external_test_options,
        settings=settings_of(
            "roles",
            source=SOURCE.name,
            reading=READING,
            external=EXTERNAL_TESTS,
            tables=TABLES,
        ),
        code=code_of_sources("index"),
    shell:
        "lungddpm --log {log:q} index --configfile {params.config:q} --source {params.source:q} {params.external}"
        " --output {output:q}"


rule prepare:
    input:
        cohort=simulated_cohort,
        index="results/cases/index.tsv",
    output:
        ensure("results/cases/cases-{shard}.tsv", non_empty=True),
    log:
        "results/logs/prepare-{shard}.log",
    benchmark:
        "results/benchmarks/prepare-{shard}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        # Some 36 bytes per voxel of the scan: the longest scans need a second attempt.
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=600,
        gpu=int(SETTINGS.layouts.lungs != "classical"),
    params:
        config=config_of_jobs,
        source=source_option,
        external=external_test_options,
        folder=subpath(output[0], parent=True),
        shards=lambda wildcards, input: prepare_jobs(input.index),
        settings=settings_of(
            "grid",
            "layouts",
            reading=READING,
            external=EXTERNAL_TESTS,
            tables=TABLES,
        ),
        code=code_of_sources("prepare"),
    shell:
        "lungddpm --log {log:q} prepare --configfile {params.config:q} --index {input.index:q} --source {params.source:q}"
        " {params.external} --output {params.folder:q} --shard {wildcards.shard} --shards {params.shards} --table {output:q}"


# The number of scans determines the number of jobs, and the number of cases the number of samples per dose.
# Snakemake forgets rules given to --until that depend on a checkpoint: no other rule than the lists of tables does.
checkpoint count_cases:
    input:
        "results/cases/{table}.tsv",
    output:
        touch("results/cases/.counted-{table}"),
    log:
        "results/logs/count_cases-{table}.log",
    localrule: True
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    shell:
        "true > {log:q}"


# With checksums, so that it changes with the tables.
rule list_case_tables:
    input:
        tables_of_cases,
    output:
        "results/cases/.tables",
    log:
        "results/logs/list_case_tables.log",
    localrule: True
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    shell:
        "cksum {input:q} > {output:q} 2> {log:q}"


rule collect:
    input:
        tables=(
            tables_of_cases
            if SIMULATED_SCANS is not None
            else ["results/cases/.tables"]
        ),
    output:
        cases=ensure("results/cases/cases.tsv", non_empty=True),
        nodules=ensure("results/cases/nodules.tsv", non_empty=True),
    log:
        "results/logs/collect.log",
    benchmark:
        "results/benchmarks/collect.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        config=config_of_jobs,
        tables=lambda wildcards, input: named_tables(input.tables),
        settings=settings_of("roles", external=list(EXTERNAL_TESTS)),
        code=stage_fingerprint("collect"),
    shell:
        "lungddpm --log {log:q} collect {params.tables} --configfile {params.config:q} --output {output.cases:q}"


rule qc:
    input:
        cases="results/cases/cases.tsv",
    output:
        ensure("results/qc/index.html", non_empty=True),
    log:
        "results/logs/qc.log",
    benchmark:
        "results/benchmarks/qc.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=config_of_jobs,
        folder=subpath(output[0], parent=True),
        settings=settings_of("layouts"),
        code=stage_fingerprint("qc"),
    shell:
        "lungddpm --log {log:q} qc --configfile {params.config:q} --cases {input.cases:q} --output {params.folder:q}"
