# Shared by all rooms: the validated config, the names of arms and replicates, and what makes jobs run again.

import csv
import json
import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

if (package := find_spec("lungddpm")) is None:
    raise WorkflowError(
        "lungddpm: is not installed beside this Python. Run 'make demo', or pip install it."
    )
if package.origin is None:
    raise WorkflowError(
        f"{next(iter(package.submodule_search_locations))}: a folder of this name hides the installed package. "
        "Start 'lungddpm run' or 'snakemake', not 'python -m snakemake', and take its parent out of PYTHONPATH."
    )

from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

from lungddpm.config.loading import parse_config, read_values
from lungddpm.core.arms import Arm
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.cohorts import PATTERN, Cohort, count_real_cases
from lungddpm.core.device import visible_gpus
from lungddpm.core.errors import UserError
from lungddpm.core.files import sha256_of
from lungddpm.core.roles import DISCOVERY, roles_of
from lungddpm.operations.jobs import shards_of_scans
from lungddpm.operations.run import offer_own_programs, report_error

try:
    # It reads all generators' modules, as the config does.
    from lungddpm.segmentation.nnunet import weights_file

    # Snakemake has read them already, but of a key that a file has twice it drops the first. As a module, the workflow
    # is given values; the files are those of another workflow.
    if workflow.modifier.is_main_snakefile():
        for path in workflow.configfiles:
            read_values(path)
    SETTINGS = parse_config(config, "config.yaml and its overlays")
    GENERATORS = list(SETTINGS.arms.largest_doses())
    PLUGINS = [name for name in GENERATORS if name not in SETTINGS.arms.external]
    # Generators that are trained, each with its part of the config.
    TRAINED = {each.name: each for each in SETTINGS.trained_generators()}
    PLANNING_ARM = SETTINGS.arms.planning().name
    # Those that draw with weights, each with the generator whose weights these are.
    WEIGHTS_OF = {
        name: owner for name in PLUGINS if (owner := SETTINGS.weights_owner(name))
    }
except UserError as error:
    report_error(error)
    raise WorkflowError(str(error)) from None

offer_own_programs()

SOURCE = SETTINGS.source.declared
# The settings by which it reads scans, if it has any.
READING = [section.model_dump(mode="json") for section in SETTINGS.source.reading()]
# Tables beside the users' scans, such as that of the patients, by data set. Not as input files: Snakemake would take
# braces in the folder's name for wildcards.
TABLES = {
    name: [
        sha256_of(file)
        for section in each.reading()
        for table in getattr(section, "tables", ())
        if (file := each.path / table).is_file()
    ]
    for name, each in SETTINGS.data_sets().items()
}
# What decides the rows of external test sets in the index, by their names.
EXTERNAL_TESTS = {
    name: {
        "source": each.kind,
        "distinct": each.distinct_patients,
        "reading": [section.model_dump(mode="json") for section in each.reading()],
    }
    for name, each in SETTINGS.external_tests.items()
}
# The number of scans of a simulated cohort is known in advance; for other sources, a checkpoint counts them.
SIMULATED_SCANS = (
    SOURCE.size(SETTINGS.source.settings).scans
    if SOURCE.simulate and not EXTERNAL_TESTS
    else None
)
# `workflow.cores` raises if nothing limits the cores, as with a cluster's profile.
CORES = workflow.resource_settings.cores or 4
ARMS = SETTINGS.arms.names()
SEGMENTER = SETTINGS.segmentation.model_dump(
    exclude={"folds", "seeds", "test_time_mirroring"}
)
PREDICTION = SETTINGS.segmentation.model_dump(include={"test_time_mirroring"})
# The merged config; see rule `merge_config`.
MERGED_CONFIG = "results/config.json"
if SIMULATED_SCANS is not None:
    try:
        for number in SETTINGS.arms.numbers():
            count_real_cases(number, SETTINGS.roles.counts(SIMULATED_SCANS)[DISCOVERY])
    except UserError as error:
        report_error(error)
        raise WorkflowError(str(error)) from None
CHECKPOINT = weights_file(Path("results/arms/{arm}"), "{fold}", "{seed}").as_posix()


def is_not_about_a_start(record):
    """Whether a message of Snakemake's is about something else than jobs that start."""
    starts = {LogEvent.JOB_INFO, LogEvent.JOB_STARTED}
    selects = record.getMessage() == "Select jobs to execute..."
    return getattr(record, "event", None) not in starts and not selects


# Of each job that starts, Snakemake lists all files: ten lines, some of thousands of characters. Its own log has them
# (.snakemake/log), and so has the terminal if an option asks for them. Errors, with the path of the log, always show.
OUTPUT = workflow.output_settings
if (
    workflow.modifier.is_main_snakefile()
    and workflow.is_main_process
    and not (OUTPUT.dryrun or OUTPUT.printshellcmds or OUTPUT.verbose or OUTPUT.quiet)
):
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler":
            handler.addFilter(is_not_about_a_start)


# The hashes of a run under way would be wrong. (Not called where this workflow is a module of another.)
onstart:
    Path("results/SHA256SUMS").unlink(missing_ok=True)


wildcard_constraints:
    arm="|".join(map(re.escape, ARMS)),
    run=r"[A-Za-z0-9_]+",
    generator=r"[A-Za-z0-9_]+",
    cohort=PATTERN,
    training=PATTERN,
    dose=r"[0-9.e+-]+",
    shard=r"\d+",
    table="index|cases",
    fold=r"\d+",
    seed=r"\d+",
    replicate=SETTINGS.segmentation.replicate_name(r"\d+", r"\d+"),


def config_of_jobs(_wildcards, threads):
    """What a job's stage gets as its config: JSON of all that is not a default.

    As it depends on `threads`, Snakemake does not count it among what makes the job run again: `settings` does that.
    """
    return SETTINGS.without_folders().differences()


def settings_of(*sections, **values):
    """The parts of the config that a job depends on: it reruns when they change, and only then."""
    chosen = {
        name: getattr(SETTINGS, name).model_dump(mode="json") for name in sections
    }
    text = json.dumps({"seed": SETTINGS.seed, **chosen, **values})
    # Snakemake takes a word in braces for a wildcard; in JSON it can only occur in text, which has another spelling.
    return re.sub(r"\{(?=\s*\w)", r"\\u007b", text)


def folder_of_cohort(_wildcards, input):
    """The folder of the simulated cohort that the workflow makes."""
    return str(Path(input.cohort[0]).parent)


def folder_of_user(_wildcards):
    """The folder of the user's scans; of this one a change makes jobs run again."""
    return str(SETTINGS.source.path)


def external_test_options(_wildcards):
    """The folders of the external test sets, as options; a change makes jobs run again as well."""
    return " ".join(
        f"--external-test {shlex.quote(f'{name}={each.path}')}"
        for name, each in SETTINGS.external_tests.items()
    )


def code_of_sources(stage):
    """The fingerprints of the code by which a stage reads each kind of source in use."""
    kinds = dict.fromkeys(each.kind for each in SETTINGS.data_sets().values())
    return " ".join(stage_fingerprint(stage, kind) for kind in kinds)


source_option = folder_of_cohort if SOURCE.simulate else folder_of_user


def simulated_cohort(_wildcards):
    """The marker file of the simulated cohort, where the source has one."""
    return ["results/source/.complete"] if SOURCE.simulate else []


def has_own_draws(arm):
    """Whether each replicate of an arm trains on samples of its own."""
    return SETTINGS.has_own_draws(arm.generator)


def samples_of_arm(wildcards):
    """Tables of the synthetic cases that all replicates of an arm take, or their list."""
    arm = Arm.parse(wildcards.arm)
    if arm.generator is None or has_own_draws(arm):
        return []
    return sample_tables(
        arm.generator, Cohort(arm.real_cases), SETTINGS.arms.drawn_dose(arm)
    )


def samples_of_draw(wildcards):
    """Tables of the synthetic cases that one replicate alone takes, or their list."""
    arm = Arm.parse(wildcards.arm)
    return sample_tables(
        arm.generator,
        Cohort(arm.real_cases, wildcards.replicate),
        SETTINGS.arms.drawn_dose(arm),
    )


def samples_to_filter(wildcards):
    """Tables of the samples that a replicate of a filtered arm's baseline judges, or their list."""
    arm = Arm.parse(wildcards.arm)
    own = has_own_draws(arm)
    name = SETTINGS.segmentation.replicate_name(wildcards.fold, wildcards.seed)
    return sample_tables(
        arm.generator,
        Cohort(arm.real_cases, name if own else None),
        SETTINGS.arms.drawn_dose(arm),
    )


def filters_of_arm(wildcards):
    """What the segmenters found in the samples that all replicates of a filtered arm take."""
    arm = Arm.parse(wildcards.arm)
    if not arm.filtered or has_own_draws(arm):
        return []
    return [
        f"results/filter/{arm.name}/{name}/filter.json"
        for name in SETTINGS.segmentation.replicates()
    ]


def filter_of_draw(wildcards):
    """The same for what one replicate alone takes: its own segmenter judges, so that replicates stay independent."""
    filtered = Arm.parse(wildcards.arm).filtered
    path = f"results/filter/{wildcards.arm}/{wildcards.replicate}/filter.json"
    return [path] if filtered else []


def filter_options(_wildcards, input):
    """The filters of an arm, as options."""
    return " ".join(f"--filter {shlex.quote(str(path))}" for path in input.filters)


def filter_settings(arm):
    """What decides which of its samples a filtered arm keeps."""
    if not Arm.parse(arm).filtered:
        return {}
    return {"filter": SETTINGS.arms.filter.model_dump(mode="json")}


def draw_of(arm, replicate):
    """The record of what one replicate alone trains on, where there is something."""
    own = has_own_draws(Arm.parse(arm))
    return [f"results/arms/{arm}/draws/{replicate}/draw.json"] if own else []


def samples_to_judge(generator):
    """Tables of a generator's samples for the most real cases, of all draws, or their lists."""
    cohorts = SETTINGS.cohorts(generator, SETTINGS.arms.largest_number())
    return [table for cohort in cohorts for table in sample_tables(generator, cohort)]


def samples_of_replicate(generator, replicate):
    """Tables of a generator's samples for the most real cases, of the draw that a replicate trains on, or their list."""
    own = None if SETTINGS.draws(generator) == [None] else replicate
    return sample_tables(generator, Cohort(SETTINGS.arms.largest_number(), own))


def sample_tables(generator, cohort, dose=None):
    """Tables of a dose of a cohort, by default the generator's largest; where their number is still to be counted,
    their list."""
    dose = dose or SETTINGS.arms.largest_doses()[generator]
    if SIMULATED_SCANS is not None:
        return samples_of(generator, cohort, dose)
    return [f"results/synthetic/{generator}/{cohort.name}/.samples-{dose}"]


def named_tables(tables):
    """Tables of shards as words of a shell command; where the input is a list of them, they are read from it."""
    quoted = map(shlex.quote, tables)
    return " ".join(
        table if SIMULATED_SCANS is not None else f"$(cut -d ' ' -f 3 {table})"
        for table in quoted
    )


def samples_of(generator, cohort, dose):
    """Tables of all shards of a dose of a cohort, in order.

    Doses share their samples, but each has tables of its own, so that one more leaves the others' arms alone.
    """
    known = SIMULATED_SCANS is not None or generator in SETTINGS.arms.external
    cases = None if known else counted("cases")
    return [
        f"results/synthetic/{generator}/{cohort.name}/samples-{dose}-{shard}.tsv"
        for shard in range(synthesize_jobs(generator, cohort, dose, cases))
    ]


def synthesize_jobs(generator, cohort, dose, cases):
    """Jobs that share a dose; a folder is checked as a whole, so that all its errors are reported."""
    if generator in SETTINGS.arms.external:
        return 1
    return SETTINGS.workflow.synthesize_jobs(
        round(float(dose) * (cohort.real_cases or discovery_cases(cases)))
    )


def discovery_cases(cases):
    """The number of training cases in the table; for a simulated cohort, as the source declares it."""
    if SIMULATED_SCANS is None:
        usable = [row for row in rows_of(cases) if row["status"] == "ok"]
        return sum(DISCOVERY in roles_of(row["role"]) for row in usable)
    return SETTINGS.roles.counts(SIMULATED_SCANS)[DISCOVERY]


def tables_of_cases(_wildcards):
    """Tables of all shards of the cases."""
    index = None if SIMULATED_SCANS is not None else counted("index")
    return [f"results/cases/cases-{shard}.tsv" for shard in range(prepare_jobs(index))]


def prepare_jobs(index):
    """Jobs that share the scans of the index, in turns; those of a simulated cohort are known without."""
    if SIMULATED_SCANS is not None:
        return SETTINGS.workflow.prepare_jobs(SIMULATED_SCANS)
    return shards_of_scans(SETTINGS, [row["status"] == "ok" for row in rows_of(index)])


def counted(table):
    """A table of cases, as soon as it is there."""
    marker = checkpoints.count_cases.get(table=table).output[0]
    return str(Path(marker).with_name(f"{table}.tsv"))


def rows_of(table):
    """The rows of a case table. Where it is still to be made, Snakemake asks again."""
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def weights_of(generator, cohort):
    """The trained weights that a cohort is drawn with, for generators that draw with some."""
    if generator not in WEIGHTS_OF:
        return []
    owner = SETTINGS.for_generator(WEIGHTS_OF[generator], Cohort.parse(cohort))
    return [f"results/{owner.model_folder}/model.safetensors"]


def files_of_external(generator):
    """All files of an external folder, so that what changes in it is taken in again; the stage says what is missing."""
    if generator not in SETTINGS.arms.external:
        return []
    folder = SETTINGS.arms.external[generator]
    files = [*folder.glob("samples.json"), *folder.glob("*/*.nii.gz")]
    # `local`: the prefix of a module is not theirs.
    return [local(str(path)) for path in sorted(files)]


def weights_of_features(_wildcards):
    """The user's file of the feature network, so that a changed file is judged with, and a missing one known at once."""
    weights = SETTINGS.image_quality.weights
    return [local(str(weights))] if isinstance(weights, Path) else []


def external_option(wildcards):
    """The folder of an external generator, as an option."""
    folder = SETTINGS.arms.external.get(wildcards.generator)
    return f"--external {shlex.quote(str(folder))}" if folder else ""


def synthesis_settings(generator, cohort):
    """What decides the samples of a generator's cohort, besides its inputs."""
    layouts = SETTINGS.synthesis.decides_layouts()
    if generator not in PLUGINS:
        return {"synthesis": layouts}
    config = SETTINGS.for_generator(generator, Cohort.parse(cohort))
    window = SETTINGS.grid.window_hu if generator in WEIGHTS_OF else None
    generator = config.decides_samples()
    return {
        "synthesis": layouts,
        "run": config.run,
        "generator": generator,
        "window": window,
    }


def code_of_synthesis(generator):
    """The fingerprint of the code that makes a generator's samples, or takes them from a folder."""
    if generator in SETTINGS.arms.external:
        return stage_fingerprint("import_external")
    return stage_fingerprint("synthesize", SETTINGS.kind_of(generator))


def plans_of(wildcards):
    """Every other arm waits for the plans, which are made on the real cases: all of them, or the largest number."""
    # One plan for all, also where arms have fewer real cases: with other networks or another scale of intensities, a
    # difference between numbers of real cases would be one between networks as well.
    if wildcards.arm == PLANNING_ARM:
        return []
    return [f"results/arms/{PLANNING_ARM}/plan.json"]


def folder_of_plans(_wildcards, input, output):
    """The folder of the arm that makes the plans."""
    return str(Path((input.plans or output)[0]).parent)


def several_nodes(value):
    """A resource that only a training on several nodes has."""
    return value if SETTINGS.workflow.training_nodes > 1 else None


def training_launcher(_wildcards, threads):
    """What starts the processes that share a training; nothing, where it is only one."""
    nodes, gpus = SETTINGS.workflow.training_nodes, SETTINGS.workflow.training_gpus
    if nodes == gpus == 1:
        return ""
    if nodes == 1:
        return f"torchrun --standalone --nproc-per-node {gpus} --no-python --"
    # This shell runs on the job's first node. Two trainings there, each a job, do not share a port.
    meeting = '"$(hostname):$((20000 + SLURM_JOB_ID % 10000))"'
    return (
        f"srun --nodes {nodes} --ntasks {nodes} --cpus-per-task {threads} --kill-on-bad-exit=1"
        f" torchrun --nnodes {nodes} --nproc-per-node {gpus}"
        f' --rdzv-backend c10d --rdzv-endpoint {meeting} --rdzv-id "$SLURM_JOB_ID" --no-python --'
    )


def all_cores(_wildcards):
    """For jobs that run alone on the machine; a cluster's profile sets threads itself."""
    return CORES


def shared_cores(_wildcards):
    """A job on each GPU of a workstation, at least two side by side; a cluster's profile sets threads itself."""
    return max(1, CORES // max(2, number_of_gpus()))


def cores_of_training(wildcards):
    """The same, for each of the GPUs that share a training."""
    return min(CORES, shared_cores(wildcards) * SETTINGS.workflow.training_gpus)


@cache
def number_of_gpus():
    """The GPUs that the profile has jobs share."""
    return len(visible_gpus())
