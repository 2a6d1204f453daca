configfile: f"{workflow.basedir}/config.yaml"


include: "workflow/Snakefile"


# Here and not in the included file: Snakemake forgets the default target of what it includes.
rule all:
    default_target: True
    input:
        "results/report.html",
        "results/tables/verdict.csv",
        "results/manifest.json",
        "results/SHA256SUMS",
