"""The plan of a run against what is known otherwise: Snakemake's own jobs, published costs, and a finished run."""

import json
import re
import shutil

import pytest
import yaml
from test_dry_run import dry_run, jobs
from typer.testing import CliRunner

from lungddpm.cli import app
from lungddpm.core.cases import write_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.operations import plan as planning
from lungddpm.operations.jobs import jobs_of

ALONE = '{"arms": {"generators": ["lung_ddpm"], "controls": ["real", "reference", "paste_constant", "med_ddpm"]}}'
PAPER = ["config.yaml", "config/paper.yaml", ALONE]
"""The published protocol without the rivals that have networks of their own."""
EVERYTHING = {
    "grid": {"size": [64, 64, 64]},
    "generators": {"lung_ddpm": {"training": {"gradient_checkpointing": True}}},
    "arms": {
        "generators": ["lung_ddpm", "lung_ddpm_plus", "maisi"],
        "doses": [0.5, 1.0],
        "filtered": ["lung_ddpm", "maisi"],
        "quality_only": ["pix2pix3d"],
        "controls": ["real", "paste_constant"],
        "synthetic_only": ["lung_ddpm"],
        "external": {"maisi": "maisi"},
    },
    "segmentation": {"n_folds": 3, "folds": [0, 2], "seeds": [0, 1]},
}


def located(repository, files):
    return [file if str(file).startswith("{") else repository / file for file in files]


def plan(repository, *files, cases=None, device="a100"):
    config = planning.load_plan_config(*located(repository, files))
    cohort = planning.count_cohort(config, None, cases)
    return planning.plan_run(config, cohort, planning.known_speed(device))


def stage(stages, name):
    (found,) = [each for each in stages if each.name == name]
    return found


NUMBERS = {
    "arms": {
        "real_cases": [2, "all", 3], "doses": [0.5, 1.0], "synthetic_only": ["lung_ddpm"],
        # Without an arm, for the most real cases only: with weights of its own, without any, and with others'.
        "quality_only": ["rectified_flow", "copy_paste", "lung_ddpm_5"],
    },
    "generators": {"lung_ddpm_5": {"kind": "lung_ddpm", "weights_of": "lung_ddpm", "sampling": {"steps": 5}}},
    "synthesis": {"training_per_replicate": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("overlay", "values"),
    [
        ("config.yaml", EVERYTHING),
        ("config.yaml", EVERYTHING | {"synthesis": {"draw_per_replicate": False}}),
        ("config.yaml", NUMBERS),
        ("config.yaml", NUMBERS | {"synthesis": {}, "arms": NUMBERS["arms"] | {"generators_learn_from": "all"}}),
        ("config/paper.yaml", {"source": {"path": "."}}),
    ],
    ids=["everything", "shared draw", "trainings", "numbers", "paper"],
)
def test_jobs_are_those_of_snakemake(repository, tmp_path, overlay, values):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(values))
    files = ["config.yaml", overlay, mine]
    (tmp_path / "work").mkdir()
    run = dry_run(repository, tmp_path / "work", "--cores", "2", "--configfile", *files)
    assert run.returncode == 0, run.stderr
    expected = jobs(run.stdout + run.stderr)
    assert expected.pop("total") == sum(expected.values())
    del expected["all"], expected["merge_config"]
    assert_named_alike(repository, files, run.stdout + run.stderr)
    planned = {}
    for each in plan(repository, *files, cases=40):
        planned[each.name] = planned.get(each.name, 0) + each.jobs
    if "path" in values.get("source", {}):  # then Snakemake counts scans and samples once they are known
        # 40 scans in 64 shards; 5, 10 and 20 samples of five generators, and 20 of each of three controls, in 32, for
        # five replicates.
        assert (planned.pop("prepare"), planned.pop("synthesize")) == (40, 5 * (5 * (5 + 10 + 20) + 3 * 20))
        expected = {name: count for name, count in expected.items() if not name.startswith(("count_", "list_"))}
    assert planned == expected


def assert_named_alike(repository, files, dry_run_output):
    """Logs, times and outputs of jobs, by which `lungddpm status` finds them, are those of Snakemake's jobs."""
    of_snakemake = {}
    for rule, text in re.findall(r"^(?:local)?rule (\w+):\n((?: .*\n)+)", dry_run_output, re.MULTILINE):
        fields = dict(re.findall(r"^ +(\w+): (.*)$", text, re.MULTILINE))
        if "benchmark" in fields:  # all but those that only list files
            of_snakemake[fields["log"]] = (rule, fields["benchmark"], set(fields["output"].split(", ")))
    config = planning.load_plan_config(*located(repository, files))
    cohort = planning.count_cohort(config, None, 40)
    found = jobs_of(config, config.workflow.prepare_jobs(cohort.scans), cohort.discovery)
    if not config.source.is_simulated:  # then Snakemake does not know these yet
        found = [job for job in found if job.stage not in ("prepare", "synthesize")]
    assert sorted(f"results/{job.log}" for job in found) == sorted(of_snakemake)
    for job in found:
        rule, times, outputs = of_snakemake[f"results/{job.log}"]
        assert (job.stage, f"results/{job.times}") == (rule, times)
        assert f"results/{job.output}" in outputs


def test_draws_and_trainings_are_paid_for_each_replicate(repository, tmp_path):
    def planned(**synthesis):
        mine = tmp_path / "mine.yaml"
        mine.write_text(yaml.safe_dump({"synthesis": synthesis}))
        return plan(repository, *PAPER, mine)

    shared, drawn, trained = (
        planned(draw_per_replicate=False), planned(), planned(training_per_replicate=True)
    )  # fmt: skip
    hours = [sum(each.gpu_hours for each in stages if each.name == "synthesize") for stages in (shared, drawn, trained)]
    assert hours[1:] == pytest.approx([5 * hours[0]] * 2, rel=0.01)
    trainings = [stage(stages, "train_generator") for stages in (shared, drawn, trained)]
    assert [each.jobs for each in trainings] == [1, 1, 5]
    assert trainings[2].gpu_hours == pytest.approx(5 * trainings[0].gpu_hours)
    # Why a draw per replicate is the default: one costs a small part of a replicate.
    replicate = stage(shared, "train_segmenter").gpu_hours / 5
    assert hours[0] < 0.2 * replicate


def test_more_real_cases_than_there_are_cannot_be_planned(repository, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("arms: {real_cases: [5, all]}")
    with pytest.raises(ConfigError, match=r"arms\.real_cases: names 5, but there are 4 usable discovery cases"):
        plan(repository, "config.yaml", mine)


def test_jobs_ask_for_a_gpu_where_one_is_planned(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--workflow-profile", "profiles/slurm")
    assert run.returncode == 0, run.stderr
    asked = re.findall(r"^rule (\w+):$.*?^    resources: (.*?)$", run.stdout + run.stderr, re.MULTILINE | re.DOTALL)
    planned = {each.name for each in plan(repository, "config.yaml") if each.gpu_hours}
    assert {name for name, resources in asked if "gpu=1" in resources} == planned
    # Of `synthesize`, only the jobs of generators that draw with a network do.
    without = {name for name, resources in asked if "gpu=1" not in resources}
    assert without - {"synthesize"} == {name for name, _ in asked} - planned


@pytest.mark.parametrize("lungs", ["classical", "lungmask"])
def test_preparation_holds_a_gpu_where_a_network_finds_the_lungs(repository, lungs):
    layouts = f'{{"layouts": {{"lungs": "{lungs}"}}}}'
    prepared = stage(plan(repository, "config.yaml", layouts), "prepare")
    assert (prepared.gpu_hours > 0, prepared.core_hours > 0) == (lungs == "lungmask", lungs == "classical")
    assert stage(plan(repository, "config.yaml", layouts, device="cpu"), "prepare").gpu_hours == 0


def test_what_is_only_measured_is_drawn_and_judged_for_the_most_real_cases(repository):
    """Against the sums by hand: 4 discovery cases, dose 2, 3 replicates."""
    arms = {"generators": ["copy_paste"], "controls": [], "quality_only": ["paste_constant"], "doses": [2.0]}
    values = {
        "arms": arms | {"real_cases": [2, "all"]},
        "segmentation": {"seeds": [0, 1, 2]},
        "workflow": {"synthesis_shards": 1},
    }
    stages, rates = plan(repository, "config.yaml", json.dumps(values)), planning._RATES
    x, y, z = planning.load_plan_config(repository / "config.yaml").grid.size
    for name, jobs_of_stage, samples in (
        # copy_paste for two numbers, 2 x 2 + 2 x 4 samples per replicate; paste_constant for one, 2 x 4.
        ("synthesize", 3 * (2 + 1), 3 * (4 + 8 + 8)),
        ("quality", 2, 3 * (8 + 8)),
    ):
        found = stage(stages, name)
        seconds = samples * (rates[name].seconds + rates[name].seconds_per_mvoxel * x * y * z / 1e6)
        assert found.jobs == jobs_of_stage
        assert found.core_hours * 3600 == pytest.approx(jobs_of_stage * planning._START_S + seconds)


def test_the_protocol_costs_what_its_networks_are_known_to(repository):
    stages = plan(repository, *PAPER)
    # 16.6 TFLOP forward and backward (5.54 forward), two passes per step, 100,000 steps.
    assert stage(stages, "train_generator").gpu_hours * 3600 == pytest.approx(
        2 * 16.6e12 * 1e5 / (0.15 * 312e12), rel=0.01
    )
    # nnU-Net's own documentation: 9 hours on an A100, 7.7 GB. Ours validates half as often.
    segmenters = stage(stages, "train_segmenter")
    assert segmenters.gpu_hours / segmenters.jobs == pytest.approx(9, rel=0.15)
    assert segmenters.gpu_memory_gib * 1.0737 == pytest.approx(7.7, rel=0.1)


def test_processes_that_share_a_training_take_a_gpu_each(repository, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("workflow: {training_gpus: 4, training_nodes: 2}")
    alone, shared = (stage(plan(repository, *files), "train_generator") for files in (PAPER, [*PAPER, mine]))
    # Each takes the forward passes of one, and has the memory of its GPU and a fourth of its node's.
    assert shared.gpu_hours == pytest.approx(8 * alone.gpu_hours, rel=0.01)
    assert (shared.jobs, shared.memory_gib, shared.gpu_memory_gib) == (1, 4 * alone.memory_gib, alone.gpu_memory_gib)


def test_without_a_gpu_the_hours_are_those_of_cores(repository):
    stages = plan(repository, "config.yaml", device="cpu")
    assert sum(each.gpu_hours for each in stages) == 0
    # The demo takes some ten minutes on two cores.
    assert 0.15 < sum(each.core_hours for each in stages) < 0.7


def test_a_measured_step_is_taken_as_it_is(repository):
    config = planning.load_plan_config(*located(repository, PAPER))
    speed = planning.measured_speed(config, "h200", 0.9)
    cohort = planning.count_cohort(config, None, None)
    training = stage(planning.plan_run(config, cohort, speed), "train_generator")
    assert training.gpu_hours == pytest.approx(100_000 * 0.9 / 3600, rel=1e-3)


def test_a_result_of_bench_is_read(tmp_path):
    row = {"option": "base", "status": "measured", "flop_per_second": 9e9, "training_steps_per_second": None}
    used = {"option": "bf16", "status": "measured", "flop_per_second": 2e12, "training_steps_per_second": 0.5}
    result = {"device": "cuda:0", "device_name": "NVIDIA H200", "threads": 16, "flop_per_pass": 4e12}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**result, "options": [row, used]}))
    speed = planning.benchmarked_speed(path)
    assert (speed.device, speed.flop_per_s, speed.is_gpu) == ("NVIDIA H200", 6e12, True)
    path.write_text(json.dumps({**result, "device": "cpu", "device_name": "cpu", "options": [row]}))
    assert planning.benchmarked_speed(path).flop_per_s == 9e9 / 16
    path.write_text("[]")
    with pytest.raises(InputError, match="is not a "):
        planning.benchmarked_speed(path)


def test_roles_and_sizes_come_from_a_table_of_the_same_source(repository, tmp_path):
    config = planning.load_plan_config(*located(repository, PAPER))
    row = dict.fromkeys(["case_id", "patient_id", "series_uid", "reason", "path", "sha256"], "")
    row |= {"source": "lidc", "data_set": "internal", "status": "ok", "size_x": 512, "size_y": 512, "n_nodules": 1}
    row |= {f"spacing_{axis}_mm": 1.0 for axis in "xyz"}
    roles = ["discovery"] * 3 + ["reference"] * 2 + ["test", ""]
    rows = [{**row, "role": role, "size_z": 100 + 10 * number} for number, role in enumerate(roles)]
    rows += [{**row, "role": "test", "status": "excluded", "size_z": 0}]
    write_cases(tmp_path / "index.tsv", rows)
    cohort = planning.count_cohort(config, tmp_path / "index.tsv", None)
    assert (cohort.scans, cohort.discovery, cohort.reference, cohort.test) == (7, 3, 2, 1)
    assert cohort.voxels == 512 * 512 * 130
    external = {"data_set": "task06", "source": "images", "role": "test", "size_z": 130}
    write_cases(tmp_path / "index.tsv", [*rows, {**row, **external}, {**row, **external}])
    # The table is not of this config: the sizes are those that sources declare.
    assert planning.count_cohort(config, tmp_path / "index.tsv", None).scans == 1018
    task06 = '{"external_tests": {"task06": {"kind": "images"}}}'
    config_of_both = planning.load_plan_config(*located(repository, PAPER), task06)
    cohort = planning.count_cohort(config_of_both, tmp_path / "index.tsv", None)
    assert (cohort.scans, cohort.discovery, cohort.test, cohort.external) == (9, 3, 1, 2)
    cohort = planning.count_cohort(config_of_both, None, 100)
    assert (cohort.scans, cohort.external) == (100, 0)
    assert cohort.origin == "--cases; external_tests.task06 not counted: no index lists its scans"
    write_cases(tmp_path / "index.tsv", [{**each, "source": "phantom"} for each in rows])
    assert planning.count_cohort(config, tmp_path / "index.tsv", None).scans == 1018
    assert planning.count_cohort(config, tmp_path / "index.tsv", 100).discovery == 50


def test_what_cannot_be_known_is_asked_for(repository, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("source: {kind: images}")
    with pytest.raises(ConfigError, match="--cases: is required"):
        plan(repository, "config.yaml", mine)
    with pytest.raises(ConfigError, match="'abacus' is not known"):
        planning.known_speed("abacus")


def test_the_command_prints_the_table_and_writes_nothing(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(repository / "config/paper.yaml", tmp_path)
    run = CliRunner().invoke(app, ["plan", "--configfile", "paper.yaml", "--device", "h100"])
    assert run.exit_code == 0, run.exception
    heads, *rows = run.stdout.splitlines()
    assert heads.split("  ")[0] == "stage"
    assert any(row.startswith("total") for row in rows)
    assert "1018 scans (LIDC-IDRI as published" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paper.yaml"]


@pytest.mark.workflow
def test_disk_is_enough_for_a_finished_run_and_at_most_twice_that(repository, tiny_benchmark):
    stages = plan(repository, "config.yaml", tiny_benchmark.overlay, device="cpu")
    planned = sum(each.disk_gib for each in stages) * 2**30
    used = sum(path.lstat().st_size for path in tiny_benchmark.results.rglob("*") if path.is_file())
    assert used < planned < 2 * used
