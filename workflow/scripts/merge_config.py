"""Write the merged config; a disk that cannot take it is the user's to fix."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lungddpm.core.errors import from_os_error
from lungddpm.core.files import write_json
from lungddpm.operations.run import report_error

if TYPE_CHECKING:  # Snakemake puts it before this file
    from snakemake.script import snakemake

try:
    write_json(Path(snakemake.output[0]), dict(snakemake.params.items()))
except OSError as error:
    if (known := from_os_error(error)) is None:
        raise
    report_error(known)
    sys.exit(f"error: {known}")
