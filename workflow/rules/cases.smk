# Scans -> cases: CT in HU and layout on the model grid.


rule phantom:
    output:
        touch("results/source/.complete"),
    log:
        "results/logs/phantom.log",
    benchmark:
        "results/benchmarks/phantom.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=settings_of(cohort=SETTINGS.source.phantom.model_dump(mode="json")),
        code=stage_fingerprint("phantom"),
    shell:
        "lungddpm --log {log} phantom --config results/config.json --output results/source"


rule index:
    input:
        cohort=phantom_cohort,
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
        source=source_option,
        settings=settings_of("roles", source=SETTINGS.source.kind),
        code=stage_fingerprint("index", SETTINGS.source.kind),
    shell:
        "lungddpm --log {log} index --config results/config.json --source {params.source:q} --output {output}"


rule prepare:
    input:
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
        # Some 36 bytes a voxel of the scan: the longest scans need a second attempt.
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=600,
        gpu=int(SETTINGS.layouts.lungs != "classical"),
    params:
        source=source_option,
        shards=lambda wildcards, input: prepare_jobs(input.index),
        settings=settings_of("grid", "layouts"),
        code=stage_fingerprint("prepare", SETTINGS.source.kind),
    shell:
        "lungddpm --log {log} prepare --config results/config.json --index {input.index} --source {params.source:q}"
        " --output results/cases --shard {wildcards.shard} --shards {params.shards} --table {output}"


# How many scans there are tells how many jobs share them, and how many cases, how many samples a dose takes.
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
        "true > {log}"


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
        "cksum {input} > {output} 2> {log}"


rule collect:
    input:
        tables=tables_of_cases if IS_PHANTOM else ["results/cases/.tables"],
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
        tables=lambda wildcards, input: named_tables(input.tables),
        settings=settings_of("roles"),
        code=stage_fingerprint("collect"),
    shell:
        "lungddpm --log {log} collect {params.tables} --config results/config.json --output {output.cases}"


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
        folder=subpath(output[0], parent=True),
        settings=settings_of("layouts"),
        code=stage_fingerprint("qc"),
    shell:
        "lungddpm --log {log} qc --config results/config.json --cases {input.cases} --output {params.folder}"
