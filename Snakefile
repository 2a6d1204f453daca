include: "workflow/Snakefile"


# Snakemake forgets the default target of what it includes.
workflow.default_target = "all"
