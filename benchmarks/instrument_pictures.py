"""Pictures of the instrument check, of made-up runs: one that passes, and three that do not.

    PYTHONPATH=tests python benchmarks/instrument_pictures.py

Writes `docs/images/instrument-<run>.png`, 1280 pixels wide, and `instrument-<run>-narrow.png`, 420 pixels; needs
Chromium.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import made_up_results
from PIL import Image

from lungddpm.report.page import run_report

ARMS = {"controls": ["real", "reference"]}
GAIN = {"real+lung_ddpm": 0.62, "real+reference": 0.64}
RUNS = {
    "passes": {"n_replicates": 5, "run_sd": 0.03, "shares": GAIN},
    "two-replicates": {"n_replicates": 2, "run_sd": 0.06, "shares": GAIN, "learning": True},
    "60-hu-off": {"n_replicates": 5, "run_sd": 0.03, "shares": {"real+reference": 0.64}, "offset_hu": 60},
    "arm-missing": {"n_replicates": 5, "run_sd": 0.03, "shares": GAIN},
}
SIZES = {"": (1280, 1020), "-narrow": (420, 1640)}
COLOURS = 48


def main() -> None:
    """Make the runs in a temporary folder and photograph the top of their pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", default=[*RUNS])
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    for name in options.runs:
        made: dict[str, Any] = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            verdict = {"relevant_difference": 0.1}
            config, results = made_up_results.write_results(Path(folder), n_test=16, arms=ARMS, verdict=verdict, **made)
            if name == "arm-missing":
                shutil.rmtree(results / "segmentation" / "real+lung_ddpm@1.0")
            run_report(config, results)
            for suffix, (width, height) in SIZES.items():
                picture = options.output / f"instrument-{name}{suffix}.png"
                command = [options.chromium, "--headless", "--no-sandbox", "--hide-scrollbars"]
                command += [f"--window-size={width},{height}", f"--screenshot={picture.resolve()}"]
                subprocess.run([*command, (results / "report.html").resolve().as_uri()], check=True)
                Image.open(picture).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    main()
