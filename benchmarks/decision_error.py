"""How often the verdict is wrong where the truth is known, and whether "detectable" keeps its promise.

    python benchmarks/decision_error.py --runs 2000

Every run is a benchmark made of normal numbers: case, arm x case, arm x replicate and residual variance, judged by the
verdict's own code.

    wrong           share of runs with a "better" or "worse" although no arm differs
    Wilcoxon, Holm  the same for the signed-rank test over cases, corrected in the same way
    Wilcoxon, one   its share of single comparisons with p < 0.05
    detectable      median of the differences that the runs call detectable
    power           how often an arm that has this difference is called "better"
"""

import argparse
from dataclasses import dataclass

import numpy as np

from lungddpm.verdict.statistics import Comparison, Scores, compare_arms, holm

MEAN, CASE_SD, ARM_CASE_SD, RESIDUAL_SD = 0.36, 0.25, 0.1, 0.1
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scenario:
    """The size of a benchmark and how its training runs scatter."""

    n_arms: int
    """Compared with the baseline."""
    n_replicates: int
    n_cases: int = 250
    replicate_sd: float = 0.015
    """Of arm x replicate."""
    baseline_replicate_sd: float | None = None
    """The baseline's, where it differs."""
    bounded: bool = False
    """Scores are cut to 0 and 1, so that many are exactly 0, as with Dice (a difference is added afterwards)."""


SCENARIOS = [
    *(Scenario(arms, replicates) for replicates in (3, 5) for arms in (1, 2, 4, 8)),
    *(Scenario(4, replicates, replicate_sd=sd) for replicates in (3, 5) for sd in (0.0, 0.005, 0.03)),
    Scenario(1, 3, replicate_sd=0.03),
    Scenario(4, 3, replicate_sd=0.01, baseline_replicate_sd=0.02),
    Scenario(4, 5, replicate_sd=0.01, baseline_replicate_sd=0.02),
    Scenario(4, 3, bounded=True),
    Scenario(4, 5, bounded=True),
    Scenario(4, 1),
    Scenario(2, 2, n_cases=250),
    Scenario(2, 2, n_cases=8),
    Scenario(4, 5, n_cases=30),
]


def simulate(scenario: Scenario, difference: float, generator: np.random.Generator) -> Scores:
    """Scores of one benchmark whose first arm is better than the baseline by `difference`; the others equal it."""
    arms, replicates, cases = 1 + scenario.n_arms, scenario.n_replicates, scenario.n_cases
    replicate_sd = np.full((arms, 1, 1), scenario.replicate_sd)
    if scenario.baseline_replicate_sd is not None:
        replicate_sd[0] = scenario.baseline_replicate_sd
    values = (
        generator.normal(MEAN, CASE_SD, (1, 1, cases))
        + generator.normal(0, ARM_CASE_SD, (arms, 1, cases))
        + generator.normal(0, 1, (arms, replicates, 1)) * replicate_sd
        + generator.normal(0, RESIDUAL_SD, (arms, replicates, cases))
    )
    if scenario.bounded:
        values = values.clip(0, 1)
    values[1] += difference
    return Scores(values, np.ones((arms, replicates), bool))


def judge(scenario: Scenario, difference: float, generator: np.random.Generator) -> list[Comparison]:
    """The verdict on one benchmark, an arm an entry, without the baseline."""
    return compare_arms(simulate(scenario, difference, generator), bootstraps=1, confidence=CONFIDENCE, seed=0)[1:]


@dataclass(frozen=True)
class Rates:
    """What came out of many benchmarks; all but `detectable` are shares of them."""

    wrong: float
    wilcoxon: float
    wilcoxon_alone: float
    detectable: float
    power: float


def measure(scenario: Scenario, runs: int, seed: int) -> Rates:
    """Judge `runs` benchmarks without a difference, and as many with the median of what they call detectable."""
    generator = np.random.default_rng(seed)
    null = [judge(scenario, 0, generator) for _ in range(runs)]
    p_wilcoxon = np.array([[arm.p_wilcoxon for arm in run] for run in null])
    detectable = float(np.median([run[0].detectable_difference for run in null]))
    found = [judge(scenario, detectable, generator)[0].verdict == "better" for _ in range(runs)]
    level = 1 - CONFIDENCE
    return Rates(
        wrong=float(np.mean([any(arm.verdict != "no difference shown" for arm in run) for run in null])),
        wilcoxon=float(np.mean([(holm(p) < level).any() for p in p_wilcoxon])),
        wilcoxon_alone=float((p_wilcoxon < level).mean()),
        detectable=detectable,
        power=float(np.mean(found)),
    )


def main() -> None:
    """Print a row a scenario as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| arms | replicates | cases | replicate sd | wrong | Wilcoxon, Holm | Wilcoxon, one | detectable | power |")
    print("|-----:|-----------:|------:|:-------------|------:|---------------:|--------------:|-----------:|------:|")
    for scenario in SCENARIOS:
        rates = measure(scenario, options.runs, options.seed)
        scatter = f"{scenario.replicate_sd:g}" + (", bounded scores" if scenario.bounded else "")
        if scenario.baseline_replicate_sd is not None:
            scatter += f", baseline {scenario.baseline_replicate_sd:g}"
        print(
            f"| {scenario.n_arms} | {scenario.n_replicates} | {scenario.n_cases} | {scatter} | {rates.wrong:.1%} "
            f"| {rates.wilcoxon:.1%} | {rates.wilcoxon_alone:.1%} | {rates.detectable:.3f} | {rates.power:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
