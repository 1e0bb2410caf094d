"""Settings that cannot work are refused with the flag, the value and what is allowed."""

import pytest

from megatron_global_lbl.settings import ConfigError, Settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scope": "globl"}, "--moe-lbl-scope globl: unknown; allowed: micro, dp, global"),
        ({"scope": "global", "group_size": 0}, "--moe-lbl-group-size 0: not allowed; allowed: an integer >= 1"),
        ({"scope": "global", "group_size": "x"}, "--moe-lbl-group-size x: not allowed"),
        ({"scope": "global", "group_size": 2.5}, "--moe-lbl-group-size 2.5: not allowed"),
        ({"scope": "global", "start_iter": -1}, "--moe-lbl-start-iter -1: not allowed; allowed: an integer >= 0"),
        ({"scope": "global", "micro_coeff": -0.1}, "--moe-lbl-micro-coeff -0.1: not allowed; allowed: a number from 0 to 1"),
        ({"scope": "global", "micro_coeff": "nan"}, "--moe-lbl-micro-coeff nan: not allowed"),
        ({"scope": "global", "group_size": 0}, "--moe-lbl-group-size 0: not allowed; allowed: an integer >= 1"),
        ({"scope": "global", "micro_coeff": "1e2"}, "--moe-lbl-micro-coeff 1e2: not allowed; allowed: a number from 0 to 1"),
        ({"scope": "Global"}, "--moe-lbl-scope Global: unknown; allowed: micro, dp, global; did you mean global?"),
        ({"scope": "gobal"}, "allowed: micro, dp, global; did you mean global?"),
        ({"scope": "global", "metrics": "detail"}, "allowed: brief, detailed, off; did you mean detailed?"),
        ({"scope": "global", "metrics_dir": ""}, "--moe-lbl-metrics-dir is empty"),
        ({"scope": "micro", "micro_coeff": 0.1}, "--moe-lbl-micro-coeff 0.1 has no effect with --moe-lbl-scope micro"),
        ({"scope": "micro", "start_iter": 3}, "--moe-lbl-start-iter 3 has no effect"),
        ({"scope": "micro", "group_size": 2}, "--moe-lbl-group-size 2 has no effect"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError) as error:
        Settings.create(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_and_texts_from_a_command_line():
    settings = Settings.create(scope="global", micro_coeff="1e-3", start_iter="5", group_size="4")
    assert (settings.micro_coeff, settings.start_iter, settings.group_size) == (1e-3, 5, 4)
