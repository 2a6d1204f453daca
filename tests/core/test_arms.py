"""The one grammar of arm names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungddpm.config.loading import parse_config
from lungddpm.core.arms import Arm, is_baseline
from lungddpm.core.errors import ConfigError

GENERATORS = st.from_regex(r"[A-Za-z0-9_]+", fullmatch=True).filter(lambda name: name != "real")
DOSES = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
NUMBERS = st.none() | st.integers(1, 10**6)
ARMS = st.one_of(
    st.builds(Arm, real=st.just(True), added=st.none(), dose=st.just(0.0), real_cases=NUMBERS),
    st.builds(Arm, real=st.just(True), added=st.just("real"), dose=st.just(1.0), real_cases=NUMBERS),
    st.builds(Arm, real=st.just(True), added=GENERATORS, dose=DOSES, real_cases=NUMBERS, filtered=st.booleans()),
    st.builds(Arm, real=st.just(False), added=GENERATORS, dose=st.just(1.0), real_cases=NUMBERS),
)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("real", Arm(real=True, added=None, dose=0.0)),
        ("real+real", Arm(real=True, added="real", dose=1.0)),
        ("real+lung_ddpm@0.5", Arm(real=True, added="lung_ddpm", dose=0.5)),
        ("real+lung_ddpm@1.0", Arm(real=True, added="lung_ddpm", dose=1.0)),
        ("real+lung_ddpm.filtered@1.0", Arm(real=True, added="lung_ddpm", dose=1.0, filtered=True)),
        ("real4+lung_ddpm.filtered@0.5", Arm(True, "lung_ddpm", 0.5, real_cases=4, filtered=True)),
        ("synthetic:lung_ddpm", Arm(real=False, added="lung_ddpm", dose=1.0)),
        ("real4", Arm(real=True, added=None, dose=0.0, real_cases=4)),
        ("real16+real", Arm(real=True, added="real", dose=1.0, real_cases=16)),
        ("real4+lung_ddpm@2.0", Arm(real=True, added="lung_ddpm", dose=2.0, real_cases=4)),
        ("synthetic4:lung_ddpm", Arm(real=False, added="lung_ddpm", dose=1.0, real_cases=4)),
    ],
)
def test_names_of_arms(name, arm):
    assert Arm.parse(name) == arm
    assert arm.name == name
    assert arm.generator == ("lung_ddpm" if "lung_ddpm" in name else None)
    assert is_baseline(name) == (arm.added is None)


@given(ARMS)
def test_an_arm_is_compared_with_its_own_real_cases_alone(arm):
    assert arm.baseline.baseline == arm.baseline
    assert is_baseline(arm.baseline.name)
    assert (arm.baseline.real_cases, arm.recipe.real_cases) == (arm.real_cases, None)
    assert Arm.parse(arm.name).recipe == arm.recipe


@given(ARMS)
def test_every_arm_is_read_back_from_its_name(arm):
    assert Arm.parse(arm.name) == arm
    assert Arm.parse(arm.name).name == arm.name


@given(st.text() | ARMS.flatmap(lambda arm: st.text(max_size=2).map(lambda more: arm.name + more)))
def test_a_text_is_refused_or_is_a_name_of_what_it_stands_for(text):
    try:
        arm = Arm.parse(text)
    except ConfigError:
        return
    base, at, dose = arm.name.partition("@")
    # Only the dose may be written in another way.
    assert text.partition("@")[:2] == (base, at)
    assert not at or float(text.partition("@")[2]) == float(dose) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        "", "unreal", "Real", "real ", " real", "real\n", "real+", "real+lung_ddpm", "real+@1", "real+a@",
        "real+a@zero", "real+a@-1", "real+a@0", "real+a@0.0", "real+a@1e-400", "real+a@nan", "real+a@inf",
        "real+a@1e999", "real+a@1_0", "real+a@ 1", "real+a@١", "real+a@1@2", "real+a-b@1", "real+a/b@1",
        "real+real@0.5", "real+real+real", "synthetic:", "synthetic:real", "synthetic:a@1", "synthetic:a b",
        "synthetic:../a", "real0", "real04", "real-4", "real4 ", "real4+real4", "real+real4", "real4+", "synthetic0:a",
        "synthetic4", "real٤",
    ],
)  # fmt: skip
def test_wrong_names_are_refused(wrong):
    with pytest.raises(ConfigError, match="is not the name of an arm"):
        Arm.parse(wrong)


def test_a_dose_may_be_written_in_several_ways():
    assert {Arm.parse(f"real+a@{dose}").name for dose in ("1", "1.0", "01", "1e0", "1.00")} == {"real+a@1.0"}


def test_arms_that_test_none_of_the_generators_are_controls():
    # A generator may be tested alone only.
    alone = ["lung_ddpm", "reference", "copy_paste"]
    arms = {"generators": ["lung_ddpm"], "controls": ["real", "reference"], "synthetic_only": alone}
    config = parse_config({"arms": arms})
    assert {arm.name: arm.is_control(config.arms.controls) for arm in config.arms.all()} == {
        "real": True,
        "real+lung_ddpm@1.0": False,
        "synthetic:lung_ddpm": False,
        "synthetic:reference": True,
        "synthetic:copy_paste": False,
        "real+real": True,
        "real+reference@1.0": True,
    }
