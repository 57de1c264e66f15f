"""The table of docs/reliability.md against the file of counted results, and how results are collected."""

import json

import campaign
from campaign_results import FOLDER_VARIABLE, record, recorded


def test_the_page_shows_what_the_campaigns_counted():
    page = campaign.PAGE.read_text(encoding="utf-8")
    shown = page.partition(campaign.BEGIN)[2].partition(campaign.END)[0].strip()
    campaigns = json.loads(campaign.RESULT.read_text(encoding="utf-8"))["campaigns"]
    assert len(shown.splitlines()) == len(campaigns) + 2
    for found in campaigns.values():
        for name, number in found["numbers"].items():
            assert campaign._counted(name, number) in shown


def test_the_file_names_no_place_on_a_machine():
    campaigns = json.loads(campaign.RESULT.read_text(encoding="utf-8"))["campaigns"]
    assert campaigns
    assert "/" not in json.dumps(campaigns)


def test_what_is_recorded_is_kept_by_name_and_only_when_somebody_collects(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    record("nobody-asked", kills=1)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "out"))
    record("kills", kills=3)
    record("kills", kills=5, seconds=0.5)
    [found] = recorded(tmp_path / "out")
    assert found["campaign"] == "kills"
    assert found["numbers"] == {"kills": 5, "seconds": 0.5}


def test_cases_are_counted_from_what_pytest_reports(tmp_path, monkeypatch):
    junit = tmp_path / "tests.xml"
    case = '<testcase classname="tests.faults.test_out_of_memory_forms" name="{}">{}</testcase>'
    name = "test_every_form_is_recognised[{}]"
    cases = [case.format(name.format(n), "") for n in range(3)]
    cases.append(case.format(name.format(3), "<failure/>"))
    cases.append(case.format(name.format(4), "<skipped/>"))
    cases.append(case.format("test_other_errors_are_not_about_memory", ""))
    junit.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "out"))
    campaign._count_cases(junit, only="some_of_them")
    assert not (tmp_path / "out").exists()
    campaign._count_cases(junit, only="")
    [found] = recorded(tmp_path / "out")
    assert found["numbers"] == {"cases": 4, "passed": 3}
