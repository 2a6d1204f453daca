"""Error rates of the verdict where the truth is known, and whether "detectable" differences are detected.

    python benchmarks/decision_error.py --runs 2000

Every run is a benchmark made of normal numbers: case, arm x case, arm x run and residual variance, judged by the
verdict's own code.

    wrong       share of runs with a "better" or "worse" in the family although no arm differs
    refused     share of comparisons that end in "cannot tell"
    Wilcoxon    share of runs with a claim by the signed-rank test over cases, corrected in the same way
    bootstrap   share of comparisons whose nominal 95 % bootstrap interval covers the true difference (0)
    detectable  median of the differences that the runs call detectable
    range       how often a run's range for it holds that median
    power       how often an arm that differs by that median is called "better"

The last scenarios show what the analysis does not cover: random variation that all replicates of an arm share, and arms
whose runs scatter unequally.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from lungddpm.verdict.statistics import Comparison, Scores, compare_arms, holm

MEAN, CASE_SD, RESIDUAL_SD = 0.36, 0.25, 0.1
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scenario:
    """The size of a benchmark and how its training runs scatter."""

    n_arms: int
    """Compared with the baseline, in one family."""
    n_replicates: int
    """Folds; or, with one seed each, simply replicates."""
    n_cases: int = 250
    replicate_sd: float = 0.015
    """Of arm x run."""
    arm_case_sd: float = 0.1
    residual_sd: float = RESIDUAL_SD
    n_primary: int = 0
    """Number of arms that are tested before the others."""
    n_seeds: int = 1
    """Runs in every fold."""
    fold_share: float = 0.0
    """Share of the variance of arm x run that all seeds of a fold have in common."""
    n_lost: int = 0
    """Runs that were not evaluated, drawn at random; the arms keep one at least."""
    one_in_common: bool = False
    """The first arm has lost all replicates but one."""
    shared_share: float = 0.0
    """Share of the variance of arm x run that all runs of an arm have in common: a generator trained once."""
    unequal: float = 1.0
    """Factor on the first arm's run sd."""
    baseline_unequal: float = 1.0
    """Factor on the baseline's."""
    bounded: bool = False
    """Scores are cut to 0 and 1, so that many are exactly 0, as with Dice (a difference is added afterwards)."""

    @property
    def name(self) -> str:
        """Distinguishing features."""
        said = [f"run sd {self.replicate_sd:g}"]
        if (self.arm_case_sd, self.residual_sd) != (0.1, RESIDUAL_SD):
            said.append(f"arm x case {self.arm_case_sd:g}, residual {self.residual_sd:g}")
        if self.n_primary:
            said.append(f"{self.n_primary} primary")
        if self.n_seeds > 1:
            said.append(f"{self.n_seeds} seeds per fold, {self.fold_share:.0%} of the variance in the fold")
        if self.n_lost:
            said.append(f"{self.n_lost} of {(self.n_arms + 1) * self.n_replicates} runs lost")
        if self.one_in_common:
            said.append("one arm has one replicate left (claims of that arm)")
        if self.shared_share:
            said.append(f"{self.shared_share:.0%} of the variance shared by all runs of an arm")
        if self.unequal != 1:
            said.append(f"one arm's runs scatter {self.unequal:g} times as much")
        if self.baseline_unequal != 1:
            said.append(f"the baseline's runs scatter {self.baseline_unequal:g} times as much")
        return ", ".join(said) + (", bounded scores" if self.bounded else "")


DEMO = {"replicate_sd": 0.034, "arm_case_sd": 0.02, "residual_sd": 0.066}
"""Components like those of the demo."""
NULL = {"replicate_sd": 0.054, "arm_case_sd": 0.02, "residual_sd": 0.074}
"""Components of sixteen runs of `benchmarks/null.yaml`."""
FEW_CASES = {"replicate_sd": 0.03, "residual_sd": 0.02}
"""Nearly all variance is between patients: the hardest case for few test cases."""
SCENARIOS = [
    # As many arms and replicates as configs have.
    *(Scenario(arms, replicates) for arms in (1, 2, 3, 8) for replicates in (2, 3, 5)),
    Scenario(1, 4),
    *(Scenario(3, replicates, replicate_sd=sd) for replicates in (3, 5) for sd in (0.0, 0.03)),
    # Few cases.
    *(Scenario(3, replicates, n_cases, **DEMO) for n_cases in (8, 16, 40) for replicates in (2, 5)),
    Scenario(1, 4, 12, **NULL),
    *(Scenario(arms, 5, n_cases, **FEW_CASES) for arms, n_cases in ((1, 6), (3, 7), (10, 9))),
    Scenario(1, 1),
    # A primary arm, or two, tested first.
    *(Scenario(10, 5, 249, n_primary=primary) for primary in (0, 1, 2)),
    # Missing runs.
    Scenario(3, 3, 40, one_in_common=True),
    Scenario(3, 3, 249, one_in_common=True),
    Scenario(5, 3, 40, n_lost=4),
    # Folds with several seeds.
    Scenario(3, 5, n_seeds=2, fold_share=0.6),
    Scenario(3, 2, n_seeds=3, fold_share=0.6),
    Scenario(3, 5, bounded=True),
    # Not covered.
    Scenario(3, 3, 40, shared_share=0.5, **DEMO),
    Scenario(3, 5, 249, shared_share=0.5, **DEMO),
    Scenario(3, 3, unequal=3),
    Scenario(3, 5, unequal=3),
    Scenario(3, 5, baseline_unequal=3),
]


def simulate(scenario: Scenario, difference: float, generator: np.random.Generator) -> Scores:
    """Scores of one benchmark whose first arm is better than the baseline by `difference`; the others equal it."""
    arms, folds, seeds, cases = 1 + scenario.n_arms, scenario.n_replicates, scenario.n_seeds, scenario.n_cases
    sd = np.full((arms, 1, 1), scenario.replicate_sd)
    sd[0], sd[1] = sd[0] * scenario.baseline_unequal, sd[1] * scenario.unequal
    of_arm, of_fold = scenario.shared_share, (1 - scenario.shared_share) * scenario.fold_share
    effects = (
        generator.normal(0, of_arm**0.5, (arms, 1, 1))
        + generator.normal(0, of_fold**0.5, (arms, folds, 1))
        + generator.normal(0, (1 - of_arm - of_fold) ** 0.5, (arms, folds, seeds))
    )
    values = (
        generator.normal(MEAN, CASE_SD, (1, 1, cases))
        + generator.normal(0, scenario.arm_case_sd, (arms, 1, cases))
        + (sd * effects).reshape(arms, folds * seeds, 1)
        + generator.normal(0, scenario.residual_sd, (arms, folds * seeds, cases))
    )
    if scenario.bounded:
        values = values.clip(0, 1)
    values[1] += difference
    return Scores(values, _evaluated(scenario, generator), tuple(np.repeat(range(folds), seeds)))


def _evaluated(scenario: Scenario, generator: np.random.Generator) -> np.ndarray:
    evaluated = np.ones((1 + scenario.n_arms, scenario.n_replicates * scenario.n_seeds), bool)
    if scenario.one_in_common:
        evaluated[1, 1:] = False
    while (~evaluated).sum() < scenario.n_lost:
        arm, run = generator.integers(evaluated.shape)
        evaluated[arm, run] = evaluated[arm].sum() == 1
    return evaluated


def judge(
    scenario: Scenario, difference: float, generator: np.random.Generator, bootstraps: int = 1
) -> list[Comparison]:
    """The verdict on one benchmark, an entry per arm, without the baseline."""
    scores = simulate(scenario, difference, generator)
    first, rest = "primary", "rest"
    families = ["", *[first] * scenario.n_primary, *[rest] * (scenario.n_arms - scenario.n_primary)]
    gates = {rest: first} if scenario.n_primary else None
    return compare_arms(scores, bootstraps, CONFIDENCE, 0, families, gates)[1:]


@dataclass(frozen=True)
class Rates:
    """Results of many benchmarks; all but `detectable` are shares of them."""

    wrong: float
    refused: float
    wilcoxon: float
    wilcoxon_alone: float
    bootstrap: float
    detectable: float
    within_range: float
    power: float


def measure(scenario: Scenario, runs: int, seed: int, bootstraps: int = 200) -> Rates:
    """Judge `runs` benchmarks without a difference, and as many with the median of what they call detectable."""
    generator = np.random.default_rng(seed)
    null = [judge(scenario, 0, generator, bootstraps) for _ in range(runs)]
    # Where one arm is special, its own claims count; else those of the family.
    judged = [run[:1] if scenario.one_in_common else run for run in null]
    compared = [arm for run in null for arm in run if np.isfinite(arm.p)]
    p_wilcoxon = [np.array([arm.p_wilcoxon for arm in run]) for run in null]
    estimates = [run[0] for run in null if np.isfinite(run[0].detectable_difference)]
    detectable = float(np.median([arm.detectable_difference for arm in estimates])) if estimates else np.nan
    found = [judge(scenario, detectable, generator)[0].verdict == "better" for _ in range(runs if estimates else 0)]
    level = 1 - CONFIDENCE
    return Rates(
        wrong=float(np.mean([any(arm.verdict in ("better", "worse") for arm in run) for run in judged])),
        refused=float(np.mean([arm.verdict == "cannot tell" for run in null for arm in run])),
        wilcoxon=float(np.mean([(holm(p) < level).any() for p in p_wilcoxon])),
        wilcoxon_alone=float(np.mean([arm.p_wilcoxon < level for arm in compared])),
        bootstrap=float(np.mean([arm.bootstrap_low <= 0 <= arm.bootstrap_high for arm in compared])),
        detectable=detectable,
        within_range=float(np.mean([arm.detectable_low <= detectable <= arm.detectable_high for arm in estimates]))
        if estimates
        else np.nan,
        power=float(np.mean(found)) if found else np.nan,
    )


def main() -> None:
    """Print a row per scenario as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| arms | replicates | cases | | wrong | refused | Wilcoxon | bootstrap | detectable | range | power |")
    print("|---:|---:|---:|:---|---:|---:|---:|---:|---:|---:|---:|")
    for scenario in SCENARIOS:
        rates = measure(scenario, options.runs, options.seed)
        row = (
            f"| {scenario.n_arms} | {scenario.n_replicates} | {scenario.n_cases} | {scenario.name} | {rates.wrong:.1%} "
            f"| {rates.refused:.0%} | {rates.wilcoxon:.1%} | {rates.bootstrap:.0%} | {rates.detectable:.3f} "
            f"| {rates.within_range:.0%} | {rates.power:.2f} |"
        )
        # Rates of runs that decide nothing are not known.
        print(row.replace("nan%", "–").replace("nan", "–"), flush=True)


if __name__ == "__main__":
    main()
