#!/bin/sh
# Snakemake runs this once in the new environment, from the folder where snakemake was started: the repository's root.
set -eu
pip install --no-deps .
