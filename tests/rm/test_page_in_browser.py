"""The pages of `audit` and `snr` in a browser: no error on the console, nothing wider than the window, both themes."""

import re
import shutil
import subprocess

import pytest

from rm import snr_report
from rm.panel import Scale, panel
from rm.report import render
from tests.rm.test_panel import flipping, records
from tests.rm.test_report import HOSTILE, OTHERS, result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
# each frame tells its holder how wide it came out, and the colour of the page
REPORT = """<script>
const root = document.documentElement, page = getComputedStyle(document.body);
parent.postMessage(`${root.clientWidth} ${root.scrollWidth} ${page.backgroundColor} ${page.color}`, "*");
</script>"""
HOLDER = """<!doctype html><script>
addEventListener("message", (told) => { document.body.append(`told ${told.data} end `); });
</script><body>"""


def shown(folder, dark):
    """What Chromium says of ``folder``/holder.html: the final text of the page, and its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    options += [
        "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    command = [BROWSER, *options, "--dump-dom", (folder / "holder.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def check_in_browser(page, folder, dark):
    """Assert that the HTML ``page`` fits windows of both widths, follows the theme, and logs nothing."""
    (folder / "page.html").write_text(page.replace("</body>", f"{REPORT}</body>"), encoding="utf-8")
    frames = [f'<iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>' for width in WIDTHS]
    (folder / "holder.html").write_text(HOLDER + "".join(frames), encoding="utf-8")
    text, console = shown(folder, dark)
    assert console == []
    told = re.findall(r"told (\d+) (\d+) rgb\((\d+).*?\) rgb\((\d+).*?\) end", text)
    assert sorted(int(width) for width, *_ in told) == sorted(WIDTHS)
    for width, needed, page_red, ink_red in told:
        assert int(needed) <= int(width)
        assert (int(page_red) < 64 and int(ink_red) > 192) == dark


def audit_page():
    return render(result(HOSTILE + "x" * 300, others=OTHERS))


def snr_page():
    """With every part that a panel can have; names are hostile, and longer than a narrow window."""
    long = HOSTILE + "x" * 300
    runs = [flipping(f"{long} {seed}", 0.1 * seed, seed) for seed in (1, 2, 3)]
    ladder = [(run, Scale(100 * 4**place, 1e6)) for place, run in enumerate(runs)]
    given = records(lambda text: f"{text} {long}")
    return snr_report.render(panel(given, runs, small=runs, ladder=ladder, bootstrap=20, min_prompts=5))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", [audit_page, snr_page])
def test_page_fits_its_window_and_says_nothing_on_the_console(tmp_path, page, dark):
    check_in_browser(page(), tmp_path, dark)
