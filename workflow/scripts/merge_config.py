"""Write the config that stages read; a disk that cannot take it is the user's to fix."""

import sys
from pathlib import Path

from snakemake.script import snakemake

from lungddpm.core.errors import from_os_error
from lungddpm.core.files import write_text
from lungddpm.operations.run import report_fault

try:
    write_text(Path(snakemake.output[0]), snakemake.params["values"] + "\n")
except OSError as error:
    if (known := from_os_error(error)) is None:
        raise
    report_fault(known)
    sys.exit(f"error: {known}")
