"""The rows of docs/reliability.md: what is done to a server, what must show, and which tests show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    what: str
    must_show: str
    tests: tuple[str, ...]
    """As pytest takes them, without parameters; negative controls among them."""


def _in(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


ROWS = (
    Row(
        "soak at 60 % of peak, 30 minutes",
        "every answer 200; memory of each worker grows by 2 % at most after warm-up; a leaky handler is noticed",
        _in("torture/test_load", "soak", "a_leak_shows"),
    ),
    Row(
        "three times peak",
        "only 200 and 503, nothing past its deadline, normal again within 5 s",
        _in("torture/test_load", "three_times_peak", "a_hanging_worker_shows"),
    ),
    Row(
        "`kill -9` of a worker every 5 s under load",
        "only rows in that worker fail, without retries; back to full speed in load time + 1 s",
        _in("torture/test_killed_workers", "killed_workers", "lost_requests_show"),
    ),
    Row(
        "`kill -9` of Java; SIGTERM under load",
        "the supervisor starts it again within 10 s, and it serves within a minute; SIGTERM to the supervisor fails no "
        "request",
        _in(
            "test_server_supervise", "stopping_under_load_loses_no_request", "java_alone_loses_requests_and_comes_back",
            "endless_load_is_refused_in_order",
        ),
    ),
    Row(
        "the same behind the edge",
        "a killed server fails no request, a killed worker those that it had",
        _in("test_edge", "a_killed_server_fails_no_request", "a_killed_worker_fails_its_requests_alone"),
    ),
    Row(
        "HTTP fuzz, 10,000 requests",
        "no process ends, others get 200; 99.9 % of them behind the edge",
        _in(
            "torture/test_http_fuzz", "http_fuzz", "a_crash_shows", "http_fuzz_behind_the_edge",
            "harm_behind_the_edge_shows",
        ),
    ),
    Row(
        "slow-loris, 500 connections",
        "others get 200 while all of these stay open, and behind the edge, which cuts them",
        _in(
            "torture/test_http_fuzz", "slow_loris", "a_server_of_one_connection_shows",
            "a_server_that_cuts_slow_connections_shows",
        )
        + _in("test_edge", "slow_clients_hurt_nobody", "one_address_gets_no_more_than_its_share"),
    ),
    Row(
        "bad images, 10,000; bombs; long aspect",
        "a 4xx for that request, at a small cost, and nothing for anybody else",
        _in(
            "test_hostile_images", "bombs_are_refused_from_their_header", "the_cost_of_a_large_image_shows",
            "mutated_images_are_answered_or_refused", "memory_stays_flat_over_damaged_images",
            "a_thousand_batches_with_one_bad_request", "a_thousand_bad_requests_among_seven_thousand_good",
            "two_thousand_mutated_images_over_http",
        ),
    ),
    Row(
        "tokens: none, wrong, expired, exchanged under load",
        "refused; no request of ours fails",
        _in(
            "test_live", "without_the_right_token_nothing_is_answered",
            "expired_tokens_are_renewed_where_the_api_key_allows", "a_foreign_key_file_is_named",
        )
        + _in("test_client_live", "tokens_are_renewed_before_they_expire")
        + _in("test_edge", "a_token_that_another_exchanges_fails_no_request", "tokens_are_renewed_in_time"),
    ),
    Row(
        "register by http, redirect, file, `..`, absolute path",
        "refused, the store unchanged, no code run",
        _in(
            "torture/test_registration", "what_is_not_in_the_store_is_refused", "by_default_nothing_is_registered",
            "what_the_model_api_lets_through", "urls_that_are_allowed_get_in",
        ),
    ),
    Row(
        "archive attacks",
        "refused by name before anything is unpacked or run",
        _in(
            "test_archive_verify", "every_flipped_byte_is_seen", "whatever_is_cut_or_inserted_is_refused",
            "a_changed_member_is_named", "what_a_zip_tool_adds_is_refused_by_name",
            "a_name_that_comes_twice_is_refused",
            "a_member_that_only_torchserve_would_see_is_refused", "forgeries_with_a_perfect_layout_are_refused",
            "rewriting_alone_changes_nothing", "a_pickle_in_the_place_of_the_model_is_refused_and_does_not_run",
        ),
    ),
    Row(
        "full disk: logs, temp, store; read-only store",
        "a clear error, no corrupt file, recovery",
        _in(
            "torture/test_resources", "no_room_for_logs", "no_room_for_temporary_files",
            "a_store_that_cannot_be_written",
        ),
    ),
    Row(
        "no memory",
        "a clear error, nothing left, recovery",
        _in("torture/test_resources", "no_memory_for_a_worker")
        + _in("test_archive_doctor", "too_little_memory_is_told", "a_worker_that_takes_all_memory_is_told"),
    ),
    Row(
        "two servers on one machine",
        "no collision",
        _in("test_server", "two_servers_side_by_side", "a_taken_port_is_named")
        + _in("test_server_supervise", "two_side_by_side"),
    ),
    Row(
        "stale snapshot",
        "the declared state wins",
        _in("torture/test_state", "the_declared_state_wins_over_a_snapshot"),
    ),
    Row(
        "clock jump past the tokens' end, and back",
        "tokens renewed, no request fails",
        _in("torture/test_state", "a_clock_that_jumps"),
    ),
    Row(
        "TorchServe's own Postman collections with newman",
        "as many pass as with the stock handler (management 82, inference and explanation 10)",
        _in("torture/test_postman", "as_many_pass_as_with_the_stock_handler"),
    ),
)  # fmt: skip
