# Shared by all rooms: the validated config, the names of arms and replicates, and what makes jobs run again.

import json
from pathlib import Path

from lungddpm.config import parse_config
from lungddpm.errors import UserError, from_os_error
from lungddpm.files import code_fingerprint, write_json
from lungddpm.generators import module_of
from lungddpm.runner import offer_own_programs, report_fault

try:
    SETTINGS = parse_config(config, "config.yaml and its overlays")
except UserError as error:
    report_fault(error)
    raise WorkflowError(str(error)) from None

offer_own_programs()

ARMS = SETTINGS.arms.names()
GENERATORS = list(SETTINGS.arms.largest_doses())
RUN = SETTINGS.diffusion.run
SEGMENTER = SETTINGS.segmentation.model_dump(exclude={"folds", "seeds"})
# nnU-Net's own place and name for the weights of a replicate.
CHECKPOINT = (
    "results/arms/{arm}/nnUNet_results/seed{seed}/Dataset501_LungNodule/"
    "LungDDPMTrainer__nnUNetPlans__lungddpm/fold_{fold}/checkpoint_final.pth"
)


# Stages read the merged config from this file. It is nobody's input: each job's `params.settings` holds the parts that
# decide its result, so that a change of the others leaves it alone.
onstart:
    write_merged_config()


wildcard_constraints:
    arm="|".join(map(re.escape, ARMS)),
    generator=r"[A-Za-z0-9_]+",
    shard=r"\d+",
    fold=r"\d+",
    seed=r"\d+",


def write_merged_config():
    """Write the config that stages read; a disk that cannot take it is the user's to mend."""
    try:
        write_json(Path("results/config.json"), SETTINGS)
    except OSError as error:
        if (fault := from_os_error(error)) is None:
            raise
        report_fault(fault)
        raise WorkflowError(str(fault)) from None


def settings_of(*sections, **values):
    """The parts of the config that a job depends on: it reruns when they change, and only then."""
    chosen = {
        name: getattr(SETTINGS, name).model_dump(mode="json") for name in sections
    }
    return json.dumps({"seed": SETTINGS.seed, **chosen, **values})


def source_option():
    """Where the scans lie: the phantom cohort that the workflow makes, or the user's folder."""
    return (
        "results/source"
        if SETTINGS.source.kind == "phantom"
        else str(SETTINGS.source.path)
    )


def phantom_cohort(_wildcards):
    """The phantom's marker file, where the source is the phantom."""
    return ["results/source/.complete"] if SETTINGS.source.kind == "phantom" else []


def generator_of(arm):
    """The generator whose samples an arm takes; None for `real` and `real+real`."""
    name = arm.removeprefix("real").removeprefix("+").split("@")[0]
    return name if name in GENERATORS else None


def samples_of_arm(wildcards):
    """Tables of the synthetic cases that an arm takes, in order of shards."""
    generator = generator_of(wildcards.arm)
    return samples_of_generator(generator) if generator else []


def samples_of_generator(generator):
    """Tables of all shards of a generator, in order."""
    shards = range(SETTINGS.workflow.synthesis_shards)
    return [f"results/synthetic/{generator}/samples-{shard}.tsv" for shard in shards]


def denoiser_of(wildcards):
    """The trained denoiser, for generators that use one."""
    return (
        [f"results/diffusion/{RUN}/model.safetensors"]
        if module_of(wildcards.generator).NEEDS_DENOISER
        else []
    )


def plans_of(wildcards):
    """Every arm but `real` waits for the plans made on `real`."""
    return [] if wildcards.arm == "real" else ["results/arms/real/plan.json"]


def half_the_cores(_wildcards):
    """Two trainings side by side on a workstation; a cluster's profile sets threads itself."""
    return max(1, (workflow.cores or 4) // 2)
