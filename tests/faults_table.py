"""The table that `make faults` ends with: every fault that was tried, the promise, what came of it, what was lost."""

from types import SimpleNamespace

import pytest

MARK = "fault"
_NO_PARAMETERS = SimpleNamespace(params={})
WIDTH = 90


# Tests written for other reasons that try faults too: {test: (promise, faults)}; {…} is a parameter of the test.
EXISTING = {
    "test_jobs_that_raise_exit_die_or_hang_stop_no_other_and_a_second_start_runs_exactly_them": (
        "P5",
        ["a job of a sweep raises", "a job of a sweep exits", "a job of a sweep is killed", "a job of a sweep hangs"],
    ),
    "test_an_exit_with_code_0_before_the_end_is_a_failure_too": ("P5", ["a job exits with code 0 before its end"]),
    "test_an_interrupted_sweep_ends_its_jobs_shows_the_table_and_goes_on_later": ("P5", ["{number.name} to a sweep"]),
    "test_ctrl_c_in_the_middle_of_an_import_exits_with_its_own_code_too": ("P5", ["Ctrl-C in the middle of an import"]),
    "test_a_sweep_that_is_killed_takes_its_jobs_along": ("P6", ["a sweep is killed while a job runs"]),
    "test_a_sweep_is_run_by_one_process_at_a_time": ("P6", ["a second start of a running sweep"]),
    "test_a_run_of_another_config_in_the_sweep_s_folder_refuses_the_sweep_and_stays_as_it_is": (
        "P5",
        ["another run in a job's directory"],
    ),
    "test_a_summary_that_fails_is_logged_and_ends_no_sweep": ("P5", ["the summary of a sweep cannot be drawn"]),
    "test_an_unreachable_server_costs_under_ten_seconds_and_one_line_says_how_to_sync": (
        "P9",
        ["wandb's server: {server}"],
    ),
    "test_no_key_on_a_terminal_goes_offline_in_seconds_without_a_question_and_keeps_the_command_line": (
        "P9",
        ["no wandb key on a terminal"],
    ),
    "test_a_malformed_key_goes_offline": ("P9", ["a malformed wandb key"]),
    "test_a_server_lost_midway_blocks_neither_rows_nor_tables_and_the_end_is_bounded": (
        "P9",
        ["wandb's server is lost midway"],
    ),
    "test_what_wandb_raises_midway_is_said_once_and_swallowed": ("P9", ["wandb raises midway"]),
    "test_the_death_of_wandbs_own_process_ends_neither_this_job_nor_the_next": ("P9", ["wandb's own process dies"]),
    "test_training_goes_on_and_the_record_is_complete_when_wandb_breaks_midway": (
        "P9",
        ["wandb breaks while training"],
    ),
    "test_only_a_torn_last_line_is_forgiven": ("P2", ["the last line of metrics.jsonl is torn"]),
    "test_rows_without_signal_are_dropped_and_counted": (
        "P4",
        ["rows that are identical", "rows identical after truncation", "a prompt that fills max_length"],
    ),
    "test_a_malformed_row_is_refused_with_its_line_or_dropped_and_counted": ("P4", ["a malformed row: {line}"]),
    "test_misnamed_columns_are_refused_with_the_mapping_to_write": ("P4", ["a misspelt column"]),
    "test_prompts_of_the_eval_file_are_dropped_from_train_and_counted": ("P4", ["prompts shared by train and eval"]),
    "test_bom_crlf_blank_lines_and_gzip_are_fine": ("P4", ["byte-order mark, CRLF and blank lines"]),
    "test_date_like_text_stays_text": ("P4", ["date-like text"]),
    "test_a_missing_file_names_the_near_miss": ("P4", ["a data file that is not there"]),
    "test_random_bytes_never_vanish_and_never_crash_the_reader": ("P4", ["random bytes in a data file"]),
    "test_a_damaged_file_is_set_aside_and_computed_again": ("P8", ["a damaged file of the reference store"]),
    "test_values_of_another_model_are_found_out_by_the_sample": ("P8", ["poisoned values in the reference store"]),
    "test_a_reference_that_is_not_finite_is_refused_and_nothing_is_stored": ("P8", ["a reference that is not finite"]),
    "test_a_killed_pass_keeps_the_parts_that_it_finished": ("P8", ["SIGKILL in the middle of the reference pass"]),
    "test_a_wrong_reference_is_refused_and_named": ("P7", ["a wrong reference"]),
    "test_trl_loads_another_reference_than_an_edited_policy_and_the_identity_check_sees_it": (
        "P7",
        ["a policy edited in memory, its reference loaded from its path"],
    ),
    "test_a_policy_of_nans_does_not_pass_the_identity_check": ("P7", ["a start model whose weights are NaN"]),
    "test_a_wrong_reload_is_refused_at_the_start": ("P7", ["a reference that is another one when loaded again"]),
    "test_a_resumed_run_whose_start_is_gone_is_refused": ("P7", ["the start model is gone at a resume"]),
    "test_weights_that_are_not_finite_are_never_saved": ("P3", ["weights that are not finite at the end"]),
    "test_a_directory_of_another_config_is_refused_with_the_difference": (
        "P2",
        ["another config in the same directory"],
    ),
}


PROMISES = [f"P{number}" for number in range(1, 12)]


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MARK}(name, promise): tries a fault against one of the promises P1 to P11")


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the marks
def pytest_collection_modifyitems(items):
    for item in items:
        promise, names = EXISTING.get(getattr(item, "originalname", ""), ("", []))
        for name in names:
            item.add_marker(
                pytest.mark.fault(name.format(**getattr(item, "callspec", _NO_PARAMETERS).params), promise=promise)
            )
        for mark in item.iter_markers(MARK):
            if mark.kwargs["promise"] not in PROMISES:
                raise pytest.UsageError(
                    f"{item.nodeid}: promise must be one of P1 to P11, got {mark.kwargs['promise']}"
                )
            item.user_properties.append((MARK, (mark.args[0], mark.kwargs["promise"])))


def pytest_terminal_summary(terminalreporter, config):
    if MARK not in (config.option.markexpr or ""):
        return
    rows = sorted(_rows(terminalreporter), key=lambda row: (PROMISES.index(row[1]), row[0]))
    width = min(WIDTH, max((len(row[0]) for row in rows), default=0))
    terminalreporter.section("faults")
    for name, promise, outcome, lost in [("fault", "promise", "outcome", "lost work"), *rows]:
        terminalreporter.write_line(f"{name[:width]:{width}}  {promise:8}  {outcome:15}  {lost}")
    kept = sum(row[2] == "as promised" for row in rows)
    distinct = len({row[0] for row in rows})
    terminalreporter.write_line(f"{distinct} distinct faults tried, {kept} of {len(rows)} as promised")


def _rows(terminalreporter):
    outcomes = {
        "passed": "as promised",
        "failed": "NOT AS PROMISED",
        "error": "NOT AS PROMISED",
        "skipped": "not tried",
    }
    for kind, outcome in outcomes.items():
        for report in terminalreporter.stats.get(kind, []):
            if isinstance(report, pytest.TestReport):
                values = dict(report.user_properties)
                lost = [str(value) for key, value in report.user_properties if key == "lost_work"]
                for key, value in report.user_properties:
                    if key == MARK:
                        yield value[0], value[1], outcome, ", ".join(lost) or values.get("reason", "nothing")
