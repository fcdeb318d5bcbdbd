"""The pages of one RL run and of several as a browser shows them."""

import pytest

from policy import comparison, run_page
from policy.run_folder import read_run
from tests.policy.runs import write_run
from tests.rm.test_page_in_browser import BROWSER, check_in_browser
from tests.rm.test_report import HOSTILE


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_their_window_and_say_nothing_on_the_console(tmp_path, dark):
    text = HOSTILE + "x" * 300
    runs = [read_run(write_run(tmp_path / f"{seed}{'y' * 90}", text=text, seed=seed)) for seed in (0, 1, 2)]
    for name, page in (("one", run_page.render(runs[0])), ("several", comparison.render(comparison.compare(runs)))):
        (tmp_path / name).mkdir()
        check_in_browser(page, tmp_path / name, dark)
