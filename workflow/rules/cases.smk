# Scans -> cases: CT in HU and layout on the model grid.


rule config_file:
    # Stages read the merged config from here: as `ancient` input, since `params.settings` makes them run again.
    output:
        CONFIG_FILE,
    log:
        "results/logs/config_file.log",
    benchmark:
        "results/benchmarks/config_file.tsv"
    localrule: True
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=5,
    params:
        settings=SETTINGS.model_dump_json(indent=2),
    shell:
        "printf '%s\\n' {params.settings:q} > {output} 2> {log}"


rule phantom:
    input:
        config=ancient(CONFIG_FILE),
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
        code=code_of("sources"),
    shell:
        "lungddpm --log {log} phantom --config {input.config} --output results/source"


rule index:
    input:
        config=ancient(CONFIG_FILE),
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
        source=source_option(),
        settings=settings_of("roles", source=SETTINGS.source.kind),
        code=code_of("sources"),
    shell:
        "lungddpm --log {log} index --config {input.config} --source {params.source:q} --output {output}"


rule prepare:
    input:
        config=ancient(CONFIG_FILE),
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
        mem_mb=4000,
        runtime=600,
    params:
        source=source_option(),
        shards=SETTINGS.workflow.case_shards,
        settings=settings_of("grid", "layouts"),
        code=code_of("sources", "layouts"),
    shell:
        "lungddpm --log {log} prepare --config {input.config} --index {input.index} --source {params.source:q}"
        " --output results/cases --shard {wildcards.shard} --shards {params.shards} --table {output}"


rule collect:
    input:
        config=ancient(CONFIG_FILE),
        tables=collect(
            "results/cases/cases-{shard}.tsv",
            shard=range(SETTINGS.workflow.case_shards),
        ),
    output:
        ensure("results/cases/cases.tsv", non_empty=True),
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
        settings=settings_of("roles"),
        code=code_of(),
    shell:
        "lungddpm --log {log} collect {input.tables} --config {input.config} --output {output}"
