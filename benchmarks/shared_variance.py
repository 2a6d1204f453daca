"""Rate of false claims if the replicates of an arm share random variation, and if they do not.

    python benchmarks/shared_variance.py --runs 2000

Benchmarks without a true difference, made of normal numbers and judged by the verdict's own code. The runs of all arms
scatter with the same sd. In arms with synthetic CT, parts of that variance come from the draw of samples and from the
training of the generator: shared by all replicates, or separate for each (`synthesis.draw_per_replicate`,
`synthesis.training_per_replicate`).

The second table has arms of three numbers of real cases, whose runs scatter more with fewer real cases,
which the pooled MS(TR) treats as equal.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from lungddpm.verdict.statistics import Comparison, Scores, compare_arms

MEAN, CASE_SD = 0.36, 0.25
CONFIDENCE = 0.95
N_ARMS = 3
"""Arms with synthetic CT, in one family."""


@dataclass(frozen=True)
class Design:
    """The size of a benchmark and its variance components."""

    n_replicates: int
    n_cases: int
    run_sd: float = 0.034
    arm_case_sd: float = 0.02
    residual_sd: float = 0.066


@dataclass(frozen=True)
class VarianceShares:
    """Sources of the scatter of runs with synthetic CT, as shares of its variance; the rest is the segmenter's."""

    draw: float
    training: float = 0.0
    own_draw: bool = False
    """Each replicate has its own draw."""
    own_training: bool = False
    """Each replicate has its own training of the generator."""


DESIGNS = [Design(3, 40), Design(4, 16), Design(5, 249), Design(5, 249, 0.015, 0.1, 0.1)]
SCENARIOS = {
    "half of the variance in the draw: one draw": VarianceShares(0.5),
    "half of the variance in the draw: a draw per replicate": VarianceShares(0.5, own_draw=True),
    "a quarter each in draw and generator training: one of each": VarianceShares(0.25, 0.25),
    "a quarter each: a draw per replicate": VarianceShares(0.25, 0.25, own_draw=True),
    "a quarter each: draw and training per replicate": VarianceShares(0.25, 0.25, own_draw=True, own_training=True),
}
FACTORS = {"alike": (1, 1, 1), "1.5 and 1.2 times as much": (1.5, 1.2, 1), "3 and 2 times as much": (3, 2, 1)}
"""Of the runs' sd with the fewest, more, and all real cases."""


def simulate(design: Design, shares: VarianceShares, generator: np.random.Generator) -> Scores:
    """Scores of arms that do not differ, the real cases alone first."""
    runs = (1 + N_ARMS, design.n_replicates, 1)
    shared = (1 + N_ARMS, 1, 1)
    from_draw = generator.normal(0, shares.draw**0.5, runs if shares.own_draw else shared)
    from_training = generator.normal(0, shares.training**0.5, runs if shares.own_training else shared)
    own = generator.normal(0, (1 - shares.draw - shares.training) ** 0.5, runs)
    of_run = from_draw + from_training + own
    # Without synthetic CT all variance is the segmenter's.
    of_run[0] = generator.normal(0, 1, runs[1:])
    return _scores(design, design.run_sd * of_run, generator)


def simulate_numbers(design: Design, factors: tuple[float, ...], generator: np.random.Generator) -> Scores:
    """The same arms for several numbers of real cases, whose runs scatter by these factors."""
    n_arms = len(factors) * (1 + N_ARMS)
    sd = design.run_sd * np.repeat(factors, 1 + N_ARMS)[:, None, None]
    of_run = generator.normal(0, 1, (n_arms, design.n_replicates, 1)) * sd
    baselines = tuple(arm - arm % (1 + N_ARMS) for arm in range(n_arms))
    return _scores(design, of_run, generator, baselines)


def _scores(
    design: Design, of_run: np.ndarray, generator: np.random.Generator, baselines: tuple[int, ...] | None = None
) -> Scores:
    arms, replicates, cases = len(of_run), design.n_replicates, design.n_cases
    values = (
        generator.normal(MEAN, CASE_SD, cases)
        + generator.normal(0, design.arm_case_sd, (arms, 1, cases))
        + of_run
        + generator.normal(0, design.residual_sd, (arms, replicates, cases))
    )
    return Scores(values, np.ones((arms, replicates), bool), baselines=baselines)


def is_claimed(comparison: Comparison) -> bool:
    """Whether an arm is called better or worse."""
    return comparison.verdict in ("better", "worse")


def false_claims(design: Design, shares: VarianceShares, runs: int, seed: int) -> float:
    """Share of benchmarks that claim an arm."""
    generator = np.random.default_rng(seed)
    judged = (compare_arms(simulate(design, shares, generator), 1, CONFIDENCE, 0) for _ in range(runs))
    return float(np.mean([any(map(is_claimed, rows)) for rows in judged]))


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    heads = [f"{each.n_replicates} replicates, {each.n_cases} cases, run sd {each.run_sd:g}" for each in DESIGNS]
    print(f"| | {' | '.join(heads)} |\n|:---|{'---:|' * len(DESIGNS)}")
    for name, shares in SCENARIOS.items():
        rates = [false_claims(design, shares, options.runs, options.seed) for design in DESIGNS]
        print(f"| {name} | {' | '.join(f'{rate:.1%}' for rate in rates)} |", flush=True)
    print(f"\n| runs of the fewer real cases scatter | {' | '.join(heads)} |\n|:---|{'---:|' * len(DESIGNS)}")
    for name, factors in FACTORS.items():
        cells = []
        for design in DESIGNS:
            generator = np.random.default_rng(options.seed)
            judged = [
                compare_arms(simulate_numbers(design, factors, generator), 1, CONFIDENCE, 0)
                for _ in range(options.runs)
            ]
            wrong = np.mean([any(map(is_claimed, rows)) for rows in judged])
            fewest = np.mean([any(map(is_claimed, rows[: 1 + N_ARMS])) for rows in judged])
            cells.append(f"{wrong:.1%} ({fewest:.1%})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
