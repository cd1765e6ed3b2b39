"""The HTML report in a headless browser: every section, every control, no error and no request."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, T5Config

from gtcompile.costs.explain import alive_backward_nodes, explain
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.finetune.run import finetune
from gtcompile.tools.inspect.command import inspect_run, inspect_shape
from gtcompile.tools.inspect.options import PlanOptions
from gtcompile.tools.inspect.report import report_page, write_report
from gtcompile.tools.runs.settings import Settings
from tests.tools.test_finetune import reporter


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of a tiny Llama on a few records."""
    folder = tmp_path_factory.mktemp("report")
    records = [{"source": f"number {n}", "target": f"it is {n}"} for n in range(10)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tuned(folder, dataset=str(folder / "data.jsonl"), max_length=48)


@pytest.fixture(scope="module")
def real_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of the same on part of SciTLDR."""
    data = os.environ.get("GTCOMPILE_DATA")
    if data is None:
        pytest.skip("set GTCOMPILE_DATA to a folder with scitldr/train.jsonl and scitldr/test.jsonl")
    settings = {"dataset": "scitldr", "data_dir": data, "max_train_samples": 64, "max_eval_samples": 4}
    return tuned(tmp_path_factory.mktemp("scitldr"), max_length=512, **settings)


def tuned(folder: Path, **settings: Any) -> Path:
    """The folder of a run of a tiny Llama."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=3, intermediate_size=32, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    run = Settings(
        model=str(folder / "model"), epochs=2, batch_size=4, max_new_tokens=2, budget=0.6, **settings
    )
    finetune(run, folder / "run", reporter())
    return folder / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that logs what it asks for and complains about."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def visit(browser: Any, path: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.absolute().as_uri())


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def put(browser: Any, selector: str, value: str) -> None:
    browser.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input'))",
        selector,
        value,
    )


def first_column(browser: Any) -> list[str]:
    return list(
        browser.execute_script(
            "return [...document.querySelectorAll('#table tbody td:first-child')].map(e => e.textContent)"
        )
    )


def assert_nothing_was_asked_for_and_nothing_failed(browser: Any) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("run", ["run_folder", pytest.param("real_run_folder", marks=pytest.mark.long)])
def test_finetune_leaves_a_report_that_works_offline(
    run: str, request: pytest.FixtureRequest, browser: Any
) -> None:
    run_folder: Path = request.getfixturevalue(run)
    visit(browser, run_folder / "report.html")
    for section in ("overview", "modules", "parameters", "epochs", "measured", "graph"):
        assert len(text(browser, f"#{section}")) > 60, section
    assert text(browser, "#measures tbody").count("= predicted") == 3  # two epochs and a full step
    assert_memory_is_measured(run_folder, browser)
    inspection = inspect_run(run_folder, PlanOptions())

    put(browser, "#search", "layers.1")
    names = first_column(browser)
    assert names == [p.fqn for p in inspection.costs.parameters if ".layers.1." in p.fqn]
    click(browser, "#table thead th:nth-child(3) button")
    assert (
        browser.execute_script("return document.querySelector('#table th:nth-child(3)').ariaSort")
        == "descending"
    )
    elements = {p.fqn: p.numel for p in inspection.costs.parameters}
    sizes = [elements[name] for name in first_column(browser)]
    assert sizes == sorted(sizes, reverse=True)
    put(browser, "#search", "")
    assert len(first_column(browser)) == len(elements)

    for index, selection in enumerate(json.loads((run_folder / "selections.json").read_text())):
        put(browser, "#epoch", str(index))
        assert text(browser, "#epoch-name") == f"epoch {index + 1}"
        shown = browser.execute_script("return document.querySelectorAll('#table td.trained').length")
        assert shown == len(selection["trained"])
    click(browser, "#heat tbody button")
    assert browser.execute_script("return document.querySelectorAll('#heat tr.sub').length") > 0
    click(browser, "#treemap button")
    assert not browser.execute_script("return document.querySelector('#treemap-up').hidden")
    click(browser, "#theme")
    assert browser.execute_script("return document.documentElement.dataset.theme") in ("dark", "light")
    assert_nothing_was_asked_for_and_nothing_failed(browser)


def assert_memory_is_measured(run_folder: Path, browser: Any) -> None:
    """Two epochs and a full step, each with predicted bytes, measured bytes and a peak above them."""
    selections = json.loads((run_folder / "selections.json").read_text())
    full = json.loads((run_folder / "summary.json").read_text())["comparison"]
    measured = [(s["saved_bytes"], s["peak_bytes"]) for s in selections]
    measured.append((full["full_saved_bytes"], full["full_peak_bytes"]))
    assert all(0 < saved < peak for saved, peak in measured)
    assert all(saved < full["full_saved_bytes"] for saved, _ in measured[:-1])
    heads = "return [...document.querySelectorAll('#measures th')].map(e => e.textContent)"
    column = browser.execute_script(heads).index("measured")
    cells = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    written = [
        cell.split()[:2] for cell in browser.execute_script(cells, f"#measures td:nth-child({column + 1})")
    ]
    shown = [float(value) * {"kB": 1e3, "MB": 1e6}[unit] for value, unit in written]
    assert shown == pytest.approx([saved for saved, _ in measured], rel=1e-3)


def test_the_page_gives_the_reasons_that_the_library_gives(run_folder: Path, browser: Any) -> None:
    visit(browser, run_folder / "report.html")
    inspection = inspect_run(run_folder, PlanOptions())
    trained = inspection.selection.trained
    click(browser, "#blocks details:nth-child(3) summary")
    assert browser.execute_script("return document.querySelectorAll('#blocks details[open]').length") == 1
    verdicts = set()
    for node in list(inspection.joint.module.graph.nodes)[:-1:7]:
        put(browser, "#find", node.name)
        click(browser, "#hits button")
        assert text(browser, "#why h3") == node.name
        why, said = explain(inspection.joint, node.name, trained), text(browser, "#why .verdict")
        verdicts.add(" ".join(said.split()[:2]))
        if why.phase == "backward":
            assert said.startswith("Runs for " if why.alive else "Eliminated"), node.name
            count = len(why.needed_by or why.would_need)
            assert str(count) in said
        dead = browser.execute_script(
            "return document.querySelector('[aria-pressed=true]').classList.contains('dead')"
        )
        assert dead == (not why.alive)
        path = browser.execute_script("return document.querySelectorAll('#why ol li').length")
        assert (path > 0) == bool(why.path)
    assert verdicts == {"An input", "Runs in", "Runs for", "Eliminated: it"}
    assert_nothing_was_asked_for_and_nothing_failed(browser)


def test_a_node_is_found_and_explained_by_keyboard_alone(run_folder: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    visit(browser, run_folder / "report.html")
    browser.find_element("css selector", "#find").send_keys("mm_3", Keys.TAB, Keys.NULL)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert text(browser, "#why h3").startswith("mm_3")
    assert browser.switch_to.active_element.get_attribute("aria-pressed") == "true"
    summary = browser.find_element("css selector", "#blocks details:first-child summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#blocks details').open")


def test_tiles_of_encoder_and_decoder_are_told_apart(tmp_path: Path, browser: Any) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config.save_pretrained(tmp_path)
    result = inspect_shape(
        str(tmp_path),
        PlanOptions(budget=0.6, shape=BatchShape(batch_size=2, length=16, target_length=8)),
    )
    write_report(result, tmp_path / "report.html")
    visit(browser, tmp_path / "report.html")
    tiles = browser.execute_script(
        "return [...document.querySelectorAll('#treemap .tile b')].map(e => e.firstChild.textContent)"
    )
    assert {"encoder.block.1", "decoder.block.1"} <= {tile.replace("\u200b", "") for tile in tiles}
    assert_nothing_was_asked_for_and_nothing_failed(browser)


def test_the_page_works_on_a_phone(run_folder: Path, browser: Any) -> None:
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
        )
        visit(browser, run_folder / "report.html")
        widths = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == 390
        click(browser, "#blocks details:nth-child(4) summary")
        left, right = browser.execute_script(
            "return [...document.querySelectorAll('#blocks details[open] .sides > div')]"
            ".map(e => [e.getBoundingClientRect().top, e.getBoundingClientRect().right])"
        )
        assert left[0] == right[0]  # forward and backward side by side
        assert left[1] < right[1] <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_in_the_data_cannot_end_the_script(run_folder: Path) -> None:
    page = report_page(inspect_run(run_folder, PlanOptions()))
    assert page.count("</script>") == 2
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(inspect_run(run_folder, PlanOptions()), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.long
def test_a_model_of_2_7_billion_parameters_is_small_and_quick(tmp_path: Path, browser: Any) -> None:
    OPTConfig(
        hidden_size=2560,
        word_embed_proj_dim=2560,
        num_hidden_layers=32,
        ffn_dim=10240,
        num_attention_heads=32,
    ).save_pretrained(tmp_path)
    result = inspect_shape(str(tmp_path), PlanOptions(budget=0.5))
    write_report(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    ready = []
    for _ in range(3):
        visit(browser, tmp_path / "report.html")
        ready.append(int(browser.execute_script("return document.documentElement.dataset.ready")))
    from selenium.webdriver.support.ui import WebDriverWait

    assert min(ready) < 1000  # milliseconds from the start of the navigation
    trained = result.selection.trained
    shown = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(shown, "#table td.trained") == len(trained)
    assert browser.execute_script(shown, "#treemap .tile") > 30
    put(browser, "#search", "layers.3")
    assert first_column(browser) == [p.fqn for p in result.costs.parameters if ".layers.3." in p.fqn]
    blocks = browser.execute_script(shown, "#blocks details")
    for _ in range(2):  # open and close every block: every node is there
        browser.execute_script("document.querySelectorAll('#blocks summary').forEach(e => e.click())")
    browser.execute_script("document.querySelectorAll('#blocks details').forEach(e => (e.open = true))")
    nodes = sum(node.op != "output" for node in result.joint.module.graph.nodes)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(shown, "#blocks [data-node]") == nodes)
    assert blocks > 32
    assert nodes > 5000
    dead = browser.execute_script(shown, "#blocks [data-node].dead")
    backward = [n for n in result.joint.module.graph.nodes if n.op == "call_function"]
    alive, forward = alive_backward_nodes(result.joint, trained), result.joint.forward_nodes()
    assert dead == sum(n not in alive and n not in forward for n in backward)
    click(browser, "#blocks [data-node].dead")
    assert text(browser, "#why .verdict").startswith("Eliminated: ")
    assert_nothing_was_asked_for_and_nothing_failed(browser)
