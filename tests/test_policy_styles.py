"""Styles: one per policy of the project, stable, and options change the line but not the colour."""

import re

from kvarena.harness.registry import choices
from kvarena.harness.report.policy_styles import POLICY_STYLES, policy_style, policy_styles


def test_every_policy_of_the_project_has_its_own_colour() -> None:
    styles = [POLICY_STYLES[name] for name in choices("policy")]
    assert len({style.colour for style in styles}) == len(styles)
    assert all(re.fullmatch("#[0-9A-F]{6}", style.colour) for style in styles)
    assert policy_style("full") == ("#000000", "o", "-", "full")


def test_an_unknown_policy_gets_a_stable_style_that_no_known_one_has() -> None:
    # Written out: a style drawn from Python's own hash would differ between two processes.
    assert policy_style("some_new_policy") == ("#CC79A7", "*", "-", "full")
    markers = {style.marker for style in POLICY_STYLES.values()}
    assert all(policy_style(f"new{i}").marker not in markers for i in range(50))


def test_options_and_versions_keep_colour_and_marker_and_change_line_and_fill() -> None:
    plain = policy_style("keydiff")
    labels = ["keydiff(anchor=median)", "keydiff(sinks=4,recent=64)", "keydiff@3fa9"]
    styles = [policy_style(label) for label in labels]
    assert all(style[:2] == plain[:2] for style in styles)
    assert all(style.line != "-" and style.fill != "full" for style in styles)


def test_options_of_one_policy_all_differ_within_a_picture() -> None:
    labels = [f"keydiff(sinks={i})" for i in range(15)]
    styles = policy_styles([*labels, "keydiff", "h2o(sinks=0)"])
    assert len({styles[label] for label in labels}) == 15
    assert styles["keydiff"] == policy_style("keydiff")
    assert styles["h2o(sinks=0)"] == policy_style("h2o(sinks=0)")
    assert policy_styles(reversed(labels)) == policy_styles(labels)


def test_more_options_than_styles_still_get_one() -> None:
    assert len(policy_styles([f"keydiff(sinks={i})" for i in range(40)])) == 40


def test_options_of_an_unknown_policy_keep_its_colour_too() -> None:
    assert policy_style("mine(a=1)")[:2] == policy_style("mine")[:2]
