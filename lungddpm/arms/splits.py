"""Roles of patients, cross-validation folds, and the leak guard. Everything here is split by patient, never by case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lungddpm.config.models import Roles
from lungddpm.core.errors import ConfigError, LeakError
from lungddpm.core.files import seed_from, seeded_order
from lungddpm.core.progress import LOG
from lungddpm.core.roles import INTERNAL, ROLES, TEST, join_roles, roles_of
from lungddpm.core.text import plural

if TYPE_CHECKING:
    import pandas as pd

UNUSED = "not needed by roles"


def assign_roles(index: list[dict], roles: Roles, seed: int) -> list[dict]:
    """Give every patient with a usable series a role; patients are drawn in a seeded order, independent of the table's.

    Those of external test sets are tested, and change nothing in what the others do.

    Args:
        index: rows of the index; only those with status `ok` get a role.
        roles: below 1 a share of the usable patients of `source`, from 1 a count, or a list of patients.
        seed: root of the draw.

    Returns:
        Copies with `role` filled. Patients who are not needed keep an empty role, with a note in `reason`.

    Raises:
        ConfigError: unknown patients in a list, too few patients, or a role without patients.
    """
    own = [row for row in index if row["data_set"] == INTERNAL]
    patients = seeded_order((row["patient_id"] for row in own if row["status"] == "ok"), seed, "roles")
    members = _draw_members(roles, patients, {row["patient_id"] for row in own})
    role_of = {patient: join_roles(role for role in ROLES if patient in members[role]) for patient in patients}
    role_of |= {row["patient_id"]: TEST for row in index if row["data_set"] != INTERNAL}
    assigned = [dict(row) for row in index]
    for row in assigned:
        if row["status"] == "ok":
            row["role"] = role_of[row["patient_id"]]
            row["reason"] = "" if row["role"] else UNUSED
    with_nodule = {row["patient_id"] for row in assigned if row["status"] == "ok" and row["n_nodules"] not in ("", 0)}
    uncounted = {row["patient_id"] for row in assigned if row["status"] == "ok" and row["n_nodules"] == ""}
    groups = {f"role {role}": members[role] for role in ROLES}
    for row in assigned:
        if row["status"] == "ok" and row["data_set"] != INTERNAL:
            groups.setdefault(f"external test set {row['data_set']}", set()).add(row["patient_id"])
    for name, of_group in groups.items():
        if of_group & uncounted:
            LOG.info("%s: %s, nodules not counted yet", name, plural(len(of_group), "patient"))
        else:
            without = len(of_group - with_nodule)
            LOG.info("%s: %s, %d without a nodule", name, plural(len(of_group), "patient"), without)
    if shared := sorted(patient for patient, cell in role_of.items() if len(roles_of(cell)) > 1):
        LOG.warning(
            "WARNING: %d patients have several roles (roles.allow_shared_patients), among them %s: "
            "the verdict only shows that the pipeline runs",
            len(shared),
            shared[0],
        )
    return assigned


def _draw_members(roles: Roles, patients: list[str], known: set[str]) -> dict[str, set[str]]:
    """The patients of every role: the listed ones, then the requested number of the others, in order."""
    named = roles.named()
    for role, wanted in named.items():
        _check_named(role, wanted, known, set(patients))
    chosen = {role: [patient for patient in patients if patient in wanted] for role, wanted in named.items()}
    counts = {role: count for role, count in roles.counts(len(patients)).items() if role not in named}
    free = [patient for patient in patients if not any(patient in members for members in chosen.values())]
    for role, count in counts.items():
        chosen[role], free = free[:count], free[count:]
        if len(chosen[role]) < count and roles.allow_shared_patients:
            others = [patient for patient in patients if patient not in chosen[role]]
            chosen[role] += others[: count - len(chosen[role])]
        if len(chosen[role]) < count:
            named_by = f", {sum(map(len, named.values()))} of them named in lists" if named else ""
            raise ConfigError(
                f"roles.{role}",
                f"needs {count} patients, but only {len(chosen[role])} are left "
                f"(the source has {len(patients)} usable patients{named_by})",
                "Lower the numbers under roles, or use a source with more patients.",
            )
    for role in ROLES:
        if not chosen[role]:
            raise ConfigError(
                f"roles.{role}",
                f"no patient is left for it (the source has {len(patients)} usable patients)",
                "Raise its number, lower those of the other roles, or use a source with more patients.",
            )
    return {role: set(chosen[role]) for role in ROLES}


def folds(
    cases: pd.DataFrame,
    nodule_mm3: Mapping[str, float],
    n_folds: int,
    wanted: Iterable[int],
    seed: int,
    allow_shared_patients: bool = False,
) -> list[dict[str, list[str]]]:
    """Cross-validation folds of the discovery cases, grouped by patient and stratified by nodule volume.

    The strata are quantiles of the volume, with at least one case per fold in each. With fewer patients than `n_folds`
    there are as many folds as patients.

    Args:
        cases: the usable discovery cases.
        nodule_mm3: volume of all nodules of a case, by case id.
        n_folds: requested number of folds.
        wanted: the folds that will be trained.
        seed: root of the draw.
        allow_shared_patients: allows training and validation on a single patient; otherwise that is an error.

    Returns:
        For every fold `{"train": [case ids], "val": [case ids]}`, sorted.

    Raises:
        ConfigError: there are too few patients for a wanted fold.
    """
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    patients = set(cases["patient_id"])
    if len(patients) == 1 and allow_shared_patients:
        LOG.warning("WARNING: there is only one discovery patient: validation cases are the training cases")
        names = sorted(cases["case_id"])
        return [{"train": names, "val": names} for _ in range(n_folds)]
    possible = min(n_folds, len(patients)) if len(patients) > 1 else 0
    if (largest := max(wanted)) >= possible:
        raise ConfigError(
            "segmentation.folds",
            f"names fold {largest}, but with {len(patients)} usable discovery patients there are {possible} folds",
            "Use fewer folds (the first is 0), raise arms.real_cases, or give more patients the role discovery.",
        )
    if possible < n_folds:
        LOG.warning("segmentation.n_folds is %d, but there are only %d discovery patients", n_folds, possible)
    by_volume = cases.assign(mm3=cases["case_id"].map(nodule_mm3)).sort_values(["mm3", "case_id"])
    strata = np.arange(len(by_volume)) * (len(by_volume) // possible) // len(by_volume)
    splitter = StratifiedGroupKFold(possible, shuffle=True, random_state=seed_from(seed, "folds") % 2**32)
    names = by_volume["case_id"].to_numpy()
    return [
        {"train": sorted(names[train]), "val": sorted(names[val])}
        for train, val in splitter.split(names, strata, by_volume["patient_id"])
    ]


@dataclass(frozen=True)
class Origin:
    """Everything that the leak guard knows about the patients in a case."""

    case_id: str
    patients: frozenset[str]
    """Patients named in the table and the files of the case: its own, its reference's, its nodules'."""
    marks: frozenset[str]
    """Unique marks, to detect a patient under a second name: series UIDs and hashes of HU."""


def check_leaks(
    training: Iterable[Origin], test: Iterable[Origin], allow_shared_patients: bool, known: Iterable[Origin] = ()
) -> dict:
    """The leak guard: no test patient may be in a training case, not even as its reference.

    Args:
        training: cases of the training set.
        test: the test cases.
        allow_shared_patients: warn only.
        known: all real cases. A case that shares a mark with a test case is that patient under another name; training
            cases with this other name are found as well.

    Returns:
        The entry for `arm.json`: the patients on both sides, and shared ones (none, unless allowed).

    Raises:
        LeakError: naming the patients, unless `allow_shared_patients`.
    """
    training, test = list(training), list(test)
    test_patients = {patient for case in test for patient in case.patients}
    owner = {mark: min(case.patients) for case in test for mark in case.marks}
    also_known_as = defaultdict(set, {patient: {patient} for patient in test_patients})
    for case in known:
        for patient in case.patients:
            also_known_as[patient] |= {owner[mark] for mark in case.marks if mark in owner}
    leaks: dict[str, set[str]] = {}
    for case in training:
        leaked = {owner[mark] for mark in case.marks if mark in owner}
        for patient in leaked.union(*(also_known_as[name] for name in case.patients)):
            leaks.setdefault(patient, set()).add(case.case_id)
    if leaks and not allow_shared_patients:
        shown = "; ".join(f"{patient} in {', '.join(sorted(leaks[patient])[:3])}" for patient in sorted(leaks))
        raise LeakError(
            "leak guard",
            f"the training set contains {plural(len(leaks), 'test patient')} ({shown})",
            "Rebuild cases and samples with disjoint roles; do not edit tables by hand, and remove patients who are "
            "in the data under two names.",
        )
    if leaks:
        LOG.warning(
            "WARNING: this training set contains %s (roles.allow_shared_patients): "
            "the figures of this run say nothing about segmentation",
            plural(len(leaks), "test patient"),
        )
    return {
        "disjoint": not leaks,
        "checked": "ids and hashes in the tables, in case.json and in sample.json; the HU of every CT",
        "n_training_cases": len(training),
        "n_test_cases": len(test),
        "training_patients": sorted({patient for case in training for patient in case.patients}),
        "test_patients": sorted(test_patients),
        "shared_patients": sorted(leaks),
    }


def check_subset(training: Iterable[Origin], outsiders: frozenset[str]) -> None:
    """The leak guard of arms with fewer real cases: nothing in them may come from the other discovery patients.

    Args:
        training: cases of the training set.
        outsiders: discovery patients beyond the arm's real cases.

    Raises:
        LeakError: naming the patients.
    """
    strangers: dict[str, str] = {}
    for case in training:
        for patient in case.patients & outsiders:
            strangers.setdefault(patient, case.case_id)
    if strangers:
        shown = "; ".join(f"{patient} in {strangers[patient]}" for patient in sorted(strangers)[:3])
        raise LeakError(
            "leak guard",
            f"{len(strangers)} patients beyond the real cases of this arm are in its training set ({shown})",
            "Make the samples again with this number of real cases, or set arms.generators_learn_from: all if "
            "generators may learn from more.",
        )


@dataclass(frozen=True)
class Register:
    """The patient behind an identifier of a case table, by kind of identifier: one text may be of several kinds.

    With patients named 1, 2 and 3, almost any text is one of their ids.
    """

    by_case: Mapping[str, set[str]]
    by_patient: Mapping[str, set[str]]
    by_series: Mapping[str, set[str]]
    by_sha256: Mapping[str, set[str]]
    """Of CT and layout, as in the table's column."""

    def patients(self, key: str, text: str) -> set[str]:
        """The patients that a text names, as the value of a key of a provenance file; empty if the key is not for
        ids."""
        if key in _ANY_ID:
            kinds = [self.by_case, self.by_patient, self.by_series]
        else:
            by_ending = {"case_id": self.by_case, "patient_id": self.by_patient, "series_uid": self.by_series}
            by_ending["_sha256"] = self.by_sha256  # of other files: "sha256" is that of the files next to the record
            kinds = [of_kind for ending, of_kind in by_ending.items() if key.endswith(ending)]
        return set().union(*(of_kind.get(text, ()) for of_kind in kinds))


_ANY_ID = {"reference", "donors", "trained_on", "nodules"}
"""Keys for case or patient ids, such as those of a declaration."""


def read_register(cases: pd.DataFrame) -> Register:
    """The identifiers of a case table."""
    cases = cases[cases["patient_id"] != ""]
    of_column = {}
    for column in ("case_id", "patient_id", "series_uid", "sha256"):
        of_column[column] = cases[cases[column] != ""].groupby(column)["patient_id"].agg(set).to_dict()
    return Register(*of_column.values())


def patients_named_in(record: object, register: Register) -> frozenset[str]:
    """The known patients named anywhere in a provenance record: in its ids and hashes, not in paths."""
    return frozenset(patient for key, text in _texts(record) for patient in register.patients(key, text))


def declares_nobody(record: dict) -> bool:
    """Whether according to its provenance record a sample comes from another system, without patients of this run."""
    declared = record.get("declared") or {}
    return bool(declared) and all(value == "none" for value in declared.values())


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, including in lists, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


def _check_named(role: str, wanted: list[str], known: set[str], usable: set[str]) -> None:
    if unknown := sorted(set(wanted) - known):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ConfigError(
            f"roles.{role}",
            f"names {', '.join(unknown[:5])}{more}, not in the source ({len(wanted)} are named)",
            "Spell patients as in the column patient_id of the index, and remove those whose scans are missing.",
        )
    if excluded := sorted(set(wanted) - usable):
        LOG.warning("roles.%s names %s, without a usable series", role, ", ".join(excluded))
