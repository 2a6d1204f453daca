# References + layouts -> synthetic cases, several shards per generator.


rule synthesize:
    input:
        cases="results/cases/cases.tsv",
        weights=lambda wildcards: weights_of(wildcards.generator, wildcards.cohort),
        external=lambda wildcards: files_of_external(wildcards.generator),
    output:
        ensure(
            "results/synthetic/{generator}/{cohort}/samples-{dose}-{shard}.tsv",
            non_empty=True,
        ),
    log:
        "results/logs/synthesize-{generator}-{cohort}-{dose}-{shard}.log",
    benchmark:
        "results/benchmarks/synthesize-{generator}-{cohort}-{dose}-{shard}.tsv"
    conda:
        "../../envs/lungddpm.yaml"
    threads: shared_cores
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=lambda wildcards: len(weights_of(wildcards.generator, wildcards.cohort)),
    params:
        config=config_of_jobs,
        folder=subpath(output[0], parent=True),
        weights=lambda wildcards, input: (
            f"--weights {shlex.quote(str(input.weights))}" if input.weights else ""
        ),
        shards=lambda wildcards, input: synthesize_jobs(
            wildcards.generator,
            Cohort.parse(wildcards.cohort),
            wildcards.dose,
            input.cases,
        ),
        external=external_option,
        settings=lambda wildcards: settings_of(
            learn_from=SETTINGS.arms.generators_learn_from,
            **synthesis_settings(wildcards.generator, wildcards.cohort),
        ),
        code=lambda wildcards: code_of_synthesis(wildcards.generator),
    shell:
        "lungddpm --log {log:q} synthesize --configfile {params.config:q} --generator {wildcards.generator}"
        " --cohort {wildcards.cohort} --dose {wildcards.dose} --cases {input.cases:q} {params.weights} {params.external}"
        " --output {params.folder:q} --shard {wildcards.shard} --shards {params.shards} --table {output:q} --threads {threads}"


# See `list_case_tables`.
rule list_sample_tables:
    input:
        tables=lambda wildcards: samples_of(
            wildcards.generator, Cohort.parse(wildcards.cohort), wildcards.dose
        ),
        # The training is part of the run before samples can be counted.
        weights=lambda wildcards: weights_of(wildcards.generator, wildcards.cohort),
    output:
        "results/synthetic/{generator}/{cohort}/.samples-{dose}",
    log:
        "results/logs/list_sample_tables-{generator}-{cohort}-{dose}.log",
    localrule: True
    conda:
        "../../envs/lungddpm.yaml"
    threads: 1
    shell:
        "cksum {input.tables:q} > {output:q} 2> {log:q}"
