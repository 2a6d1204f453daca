#!/bin/sh
# Snakemake runs this once in the new environment. It copies the package that Snakemake itself runs with, from a clone or from
# an installation, so that jobs have the same version; no clone, no build and no network are needed.
set -eu
outer=$(command -v lungddpm) || { echo "lungddpm is not on the PATH: start the run by 'lungddpm run'." >&2; exit 1; }
# The first line of a console script names the Python that it runs with.
of_run=$(sed -n '1s/^#! *//p' "$outer")
here=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
scripts=$(python -c 'import sysconfig; print(sysconfig.get_path("scripts"))')

"$of_run" -P - "$here" <<'PYTHON'
import shutil, sys
from importlib import metadata
from pathlib import Path

import lungddpm
from lungddpm.core.shipped import shipped_folder

package = Path(lungddpm.__file__).parent
copy = Path(sys.argv[1]) / "lungddpm"
without = shutil.ignore_patterns("__pycache__")
shutil.copytree(package, copy, ignore=without, dirs_exist_ok=True)
# Beside the package in a clone, inside of it once installed.
for name in ("workflow", "config", "profiles", "envs"):
    shutil.copytree(shipped_folder() / name, copy / "shipped" / name, ignore=without, dirs_exist_ok=True)
shutil.copyfile(shipped_folder() / "config.yaml", copy / "shipped" / "config.yaml")
version = metadata.version("lungddpm")
about = copy.parent / f"lungddpm-{version}.dist-info"
about.mkdir(exist_ok=True)
(about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lungddpm\nVersion: {version}\n")
PYTHON

printf '#!%s\nimport sys\n\nfrom lungddpm.cli import main\n\nsys.exit(main())\n' "$(command -v python)" > "$scripts/lungddpm"
chmod +x "$scripts/lungddpm"
