"""The section of image files in the configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from lungddpm.config.sections import Section
from lungddpm.sources.images.folders import DATASET

LabelName = Annotated[str, Field(pattern=r"^.+$")]
Meaning = Literal["background", "lung", "nodule", "vessel"]


def _check_pattern(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"needs one group in parentheses, the patient, but has {groups}")
    return pattern


def check_table(name: str | None) -> str | None:
    """Reject a table outside the folder of the data set."""
    # Jobs and results only know the folder of the data set, and no other user folder.
    if name is not None and Path(name).name != name:
        raise ValueError("must be the name of a file in the folder of the data set, without any folder")
    return name


class Images(Section):
    """Reading of a folder of image files. Used when `source.kind` is `images`."""

    labels: dict[LabelName, Meaning] = {}
    """Meaning of the labels, by number or by name in dataset.json, such as `{1: nodule}`; 0 is background. It overrides
    the names in dataset.json. Without either, 1 is lung, 2 nodule, 3 vessel."""
    patient_table: Annotated[str | None, AfterValidator(check_table)] = None
    """A table with the columns `file` and `patient` (or `patient_id`, or BIDS's `participant_id`) in the folder of the
    data set, such as participants.tsv (tabs) or patients.csv, for several scans of one patient. null: each scan counts
    as a separate patient."""
    patient_pattern: Annotated[str | None, AfterValidator(_check_pattern)] = None
    """A regular expression with one group, the patient, that is searched in each image's name (without suffix and
    `_0000`), such as `^(P[0-9]+)_`."""

    @property
    def tables(self) -> tuple[str, ...]:
        """See `lungddpm.sources`."""
        return (DATASET, *([self.patient_table] if self.patient_table else []))

    @field_validator("labels", mode="before")
    @classmethod
    def _text_keys(cls, labels: object) -> object:
        # YAML reads 1 as a number.
        return {str(key): value for key, value in labels.items()} if isinstance(labels, dict) else labels

    @model_validator(mode="after")
    def _numbers(self) -> Images:
        if large := [key for key in self.labels if key.isdecimal() and int(key) > 255]:
            raise ValueError(f"labels: label numbers must be 0 to 255, got {large[0]}")
        return self

    @model_validator(mode="after")
    def _one_way_to_patients(self) -> Images:
        if self.patient_table is not None and self.patient_pattern is not None:
            raise ValueError("patient_table and patient_pattern: set only one of them")
        return self
