"""Key figures from the API's own metrics, as the API writes them."""

from __future__ import annotations

from web.console.api_metrics import ApiMetrics, parse

TEXT = """# HELP glm_kv_cache_usage_perc Share.
# TYPE glm_kv_cache_usage_perc gauge
glm_kv_cache_usage_perc 0.25
# TYPE glm_request_time_per_output_token_seconds histogram
glm_request_time_per_output_token_seconds_bucket{le="+Inf",traffic="user"} 4.0
glm_request_time_per_output_token_seconds_count{traffic="user"} 4.0
glm_request_time_per_output_token_seconds_sum{traffic="user"} 0.1
glm_request_time_per_output_token_seconds_count{traffic="probe"} 100.0
glm_request_time_per_output_token_seconds_sum{traffic="probe"} 100.0
# TYPE glm_prompt_tokens counter
glm_prompt_tokens_total{traffic="user"} 200.0
# TYPE glm_prompt_tokens_cached counter
glm_prompt_tokens_cached_total{traffic="user"} 50.0
"""


def test_the_figures_count_users_and_not_the_checker() -> None:
    assert parse(TEXT) == ApiMetrics(kv_used=0.25, tokens_per_s=40.0, reused=0.25)


def test_a_missing_metric_is_none() -> None:
    assert parse("") == ApiMetrics()
    assert parse('{"error": "no metrics here"}') == ApiMetrics()
    assert parse(TEXT.replace("user", "other")) == ApiMetrics(kv_used=0.25)
