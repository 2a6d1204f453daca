"""Split files: what they give each role, and what is refused in them."""

import pytest
import yaml

from lungddpm.config.loading import load_config, parse_config
from lungddpm.core.errors import ConfigError


@pytest.fixture
def split(tmp_path, monkeypatch):
    """A function that writes a split file into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "split.txt", encoding: str = "utf-8") -> str:
        (tmp_path / name).write_bytes(text.encode(encoding))
        return name

    return write


def test_a_list_of_patients_is_what_the_config_would_have_named(split):
    name = split("# validation patients\nLIDC-IDRI-0003\n\n  LIDC-IDRI-0001 \r\n0010\n")
    patients = ["LIDC-IDRI-0003", "LIDC-IDRI-0001", "0010"]
    assert parse_config({"roles": {"test": name}}) == parse_config({"roles": {"test": patients}})


@pytest.mark.parametrize(
    ("name", "encoding", "mark", "head"),
    [
        ("a.csv", "utf-8", ",", "patient_id,role"),
        ("a.CSV", "utf-8-sig", ";", "patient ; role"),
        ("a.tsv", "utf-8", "\t", "x\trole\tpatient"),
    ],
)
def test_each_role_takes_its_own_rows_of_a_table(split, name, encoding, mark, head):
    columns = [column.strip() for column in head.split(mark)]
    given = [("P1", "discovery"), ("P2", "test"), ("P3", "discovery"), ("P4", "reference")]
    cells = [{"patient_id": patient, "patient": patient, "role": role, "x": "0"} for patient, role in given]
    lines = [head, *(mark.join(row[column] for column in columns) for row in cells)]
    split("\n".join(lines), name, encoding)
    roles = parse_config({"roles": dict.fromkeys(("discovery", "reference", "test"), name)}).roles
    assert (roles.discovery, roles.reference, roles.test) == (["P1", "P3"], ["P4"], ["P2"])


def test_what_a_job_is_given_needs_no_file(split, tmp_path):
    config = load_config(yaml.safe_dump({"roles": {"test": split("P1\nP2\n")}}, default_flow_style=True))
    (tmp_path / "split.txt").unlink()
    assert load_config(config.without_folders().differences()).roles.test == ["P1", "P2"]


def test_numbers_as_text_are_numbers():
    roles = parse_config({"roles": {"discovery": "0.5", "reference": "2", "test": "1e-1"}}).roles
    assert (roles.discovery, roles.reference, roles.test) == (0.5, 2, 0.1)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("P1\nP2\nP1\n", "a.txt", "a.txt: has P1 twice, in lines 1 and 3"),
        ("# nobody\n\n", "a.txt", r"a.txt: has no patient for roles\.test"),
        ("patient_id,role\nP1,discovery\n", "a.csv", r"a.csv: has no patient for roles\.test"),
        ("patient_id,role\nP1,test\nP2,test\nP1,test\n", "a.csv", "has P1 twice, in lines 2 and 4"),
        ("patient_id,role\nP1,test\nP1,discovery\n", "a.csv", "has P1 as test and as discovery, in lines 2 and 3"),
        ("patient_id,role\nP1,validation\n", "a.csv", "has the role 'validation' in line 2. Roles are discovery"),
        ("patient_id,role\nP1\n", "a.csv", "has the role '' in line 2"),
        ("patient_id,role\n,test\n", "a.csv", "has no patient in line 2"),
        ("name,role\nP1,test\n", "a.csv", r"has no column patient_id \(it has name, role\)"),
        ("patient_id\nP1\n", "a.csv", r"has no column role \(it has patient_id\)"),
        ("", "a.csv", r"has no column patient_id \(it has none\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_line(split, text, name, says):
    split(text, name)
    with pytest.raises(ConfigError, match=says):
        parse_config({"roles": {"test": name}})


def test_a_file_that_is_not_there_or_not_text(split):
    with pytest.raises(ConfigError, match=r"lists/none\.txt: does not exist\. Give a number, a list"):
        parse_config({"roles": {"test": "lists/none.txt"}})
    with pytest.raises(ConfigError, match="Save it as UTF-8"):
        parse_config({"roles": {"test": split("Zo\xeb\n", encoding="latin-1")}})


def test_files_of_two_roles_that_share_a_patient_are_refused(split):
    roles = {"test": split("P1\nP2\n", "test.txt"), "discovery": split("P2\nP3\n", "train.txt")}
    with pytest.raises(ConfigError, match=r"patient P2 is in roles\.discovery and in roles\.test"):
        parse_config({"roles": roles})


def test_a_list_in_the_config_names_nobody_twice():
    with pytest.raises(ConfigError, match=r"roles\.test names patient a twice"):
        parse_config({"roles": {"test": ["a", "b", "a"]}})
