# SPDX-License-Identifier: Apache-2.0
"""More stories of other files on a host whose initramfs dracut makes."""

import pytest

from tests.test_boot_attacks import (  # noqa: F401 - played here on the machine of `story`
    test_a_thiefs_key_in_the_tpm_opens_no_disk_of_the_host,
    test_a_thiefs_root_of_the_same_uuid_gets_no_key_and_no_disk,
    test_a_thiefs_root_of_the_same_uuid_is_told_where_the_host_knows_its_own,
)
from tests.test_boot_degraded_root import test_a_root_on_two_disks_lives_with_one  # noqa: F401
from tests.test_boot_dracut import story  # noqa: F401
from tests.test_boot_faults import (  # noqa: F401
    test_a_tpm_in_failure_mode_and_nobody_who_knows_the_key,
    test_a_tpm_in_failure_mode_and_the_recovery_key,
    test_a_tpm_that_comes_after_early_boot_is_locked,
    test_a_tpm_that_comes_late_is_waited_for_and_nothing_leaks,
    test_a_tpm_that_fails_when_it_has_released_the_key,
    test_of_two_tpms_the_second_has_the_key_and_both_are_locked,
    test_on_another_board_nothing_opens_by_itself,
    test_one_boot_with_many_faults,
    test_the_agent_aborts_and_the_stock_prompt_takes_the_recovery_key,
    test_without_its_tpm_the_host_asks_for_the_recovery_key,
)
from tests.test_boot_pin import (  # noqa: F401
    test_a_pin_that_is_thought_about_mistyped_never_asked_for_and_forgotten,
)
from tests.test_boot_rebind import test_another_command_line_is_accepted  # noqa: F401

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=4)]
