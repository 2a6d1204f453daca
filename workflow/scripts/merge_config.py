"""Write the config that stages read; a disk that cannot take it is the user's to fix."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lungddpm.core.errors import from_os_error
from lungddpm.core.files import write_text
from lungddpm.operations.run import report_fault

if TYPE_CHECKING:  # Snakemake puts it before this file
    from snakemake.script import snakemake

try:
    write_text(Path(snakemake.output[0]), snakemake.params["values"] + "\n")
except OSError as error:
    if (known := from_os_error(error)) is None:
        raise
    report_fault(known)
    sys.exit(f"error: {known}")
