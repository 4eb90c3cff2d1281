"""The page holds what the run's files say, escaped, and nothing from elsewhere; a real browser lays it out."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rocket_fast.__main__ import main
from rocket_fast.config import TrainConfig, to_plain
from rocket_fast.report import POINTS, write_report
from rocket_fast.trainer import train

pytest.importorskip("matplotlib", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page(HTMLParser):
    """Rows of tables by section, texts by section, and every attribute that could point somewhere."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.section = "top"
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attrs if v and k in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag == "section":
            self.section = given["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self._open and "tr" in self._open and ("td" in self._open or "th" in self._open):
            self.rows[self.section][-1][-1] += data


def record(step: int, **more: object) -> dict:
    parts = {"data_s": 0.001, "forward_s": 0.01, "backward_s": 0.02, "optimizer_s": 0.006, "other_s": 0.003}
    scales = {"logit_scale": 14.3, "logit_scale_raw": 2.66, "h_logit_scale": 10.0, "h_logit_scale_raw": 2.3}
    speed = {"images_per_s": 1234.0, "data_wait": 0.025, "mfu": 0.41, "step_s": 0.04, **parts}
    common = {"step": step, "epoch": step / 6, "time": 1.7e9 + step, "loss": 4.0 - 0.01 * step, "clip_acc": 12.5}
    skipped = {"skipped": 1003, "skipped_reasons": {"corrupt image": 1000, "no <caption> & more": 3}}
    return common | {"clip_acc_image_global": 12.5, "clip_loss": 3.0, "lr": 1e-3} | scales | speed | skipped | more


@pytest.fixture
def run(tiny_config: TrainConfig) -> Path:
    """A run's folder made by hand: what every number on the page should be is written here."""
    config = replace(tiny_config, name="<b>a & b")
    folder = tiny_config.out / "by-hand"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    (folder / "run.jsonl").write_text(
        json.dumps(
            {
                "rocket_fast": "0.1",
                "git_commit": "abc123",
                "command": ["train", "--x", "<script>1</script>", "--out", "a" * 300],
            }
        )
        + "\n"
    )
    lines = [record(step) for step in range(2, 13, 2)] + [{"step": 12, "zero_shot_top1": 33.3, "set": "test"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "lo')
    return folder


def write_eval(folder: Path) -> None:
    top = {str(round(0.1 * place, 1)): 20.0 + place for place in range(11)}
    accuracy = {
        "top1": top,
        "top5": {weight: 2 * value for weight, value in top.items()},
        "classes": 1718,
        "pictures": 5000,
    }
    result = {"name": "test", "accuracy": accuracy, "chance": 0.0582, "image_to_text_r1": 18.26}
    result |= {"pixel_neighbour": 10.84, "pixel_gallery": "other pictures of the set"}
    (folder / "eval.json").write_text(json.dumps({"checkpoint": "last", "step": 12, "sets": [result]}))
    (folder / "captions-test.png").write_bytes(b"a picture")


def test_every_number_is_where_it_should_be(run: Path):
    write_eval(run)
    text = write_report(run).read_text()
    page = Page(text)
    assert page.rows["evaluation-last"] == [
        ["set", "classes", "pictures", "chance", "pixel 1-NN", "top-1", "top-5", "z alone", "h alone", "R@1"],
        ["test", "1,718", "5,000", "0.06", "10.8*", "25.0", "50.0", "30.0", "20.0", "18.3"],
    ]
    assert page.rows["time"][1:] == [
        ["data", "1.0", "2.5"],
        ["forward", "10.0", "25.0"],
        ["backward", "20.0", "50.0"],
        ["optimizer", "6.0", "15.0"],
        ["other", "3.0", "7.5"],
        ["whole step", "40.0", "100.0"],
    ]
    assert page.rows["skipped"][1:] == [["corrupt image", "1,000"], ["no <caption> & more", "3"], ["all", "1,003"]]
    assert ["optim.lr", "0.003"] in page.rows["configuration"]
    assert ["eval.sets.0.name", "test"] in page.rows["configuration"]
    assert ["command", "train --x <script>1</script> --out " + "a" * 300] in page.rows["provenance"]
    for shown in (
        "<b>a & b",
        "finished: step 12 of 12, epoch 2.00",
        "25.0%",
        "3.880",
        "1,234",
        "2.5%",
        "41.0%",
        "0.5 s",
    ):
        assert shown in page.text["top"], shown
    for chart in ("Loss", "Accuracy in the batch, percent", "Temperature as learned: its logarithm", "Learning rate"):
        assert chart in page.text["training"]
    for chart in ("Images per second", "MFU, percent", "A step's time, milliseconds"):
        assert chart in page.text["speed"]
    assert "contrastive" in page.text["training"]  # a legend: text stays text
    assert f"data:image/png;base64,{base64.b64encode(b'a picture').decode()}" in page.links


def test_nothing_comes_from_elsewhere_and_nothing_is_code(run: Path):
    write_eval(run)
    text = write_report(run, run / "page.html").read_text()
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not (run / "report.html").exists()


def test_a_run_that_has_just_begun_or_is_half_done_has_a_page(run: Path):
    page = Page(write_report(run).read_text())
    assert not any(section.startswith("evaluation") for section in page.rows)
    assert "33.3%" in page.text["top"]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    old = {name: value for name, value in record(2).items() if not name.endswith(("_s", "_raw", "_reasons", "mfu"))}
    (run / "metrics.jsonl").write_text(json.dumps(old | {"images_per_s": 5.0}) + "\n")
    page = Page(write_report(run).read_text())
    assert "not finished: step 2 of 12" in page.text["top"]
    assert "1,003 samples; the log does not hold the reasons." in page.text["skipped"]
    assert "time" not in page.rows
    (run / "metrics.jsonl").write_text(lines[0])
    assert "A step's time" in Page(write_report(run).read_text()).text["speed"]
    for name in ("metrics.jsonl", "run.jsonl"):
        (run / name).unlink()
    page = Page(write_report(run).read_text())
    assert "no step logged yet" in page.text["top"]
    assert "Nothing recorded" in page.text["provenance"]


def test_a_long_run_stays_small(run: Path):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record(20 * step)) + "\n" for step in range(1, 20 * POINTS)))
    assert write_report(run).stat().st_size < 1.5e6


def test_no_run_is_an_error_that_names_it(tmp_path: Path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert f"run: got '{tmp_path / 'nowhere'}', expected a run's folder" in error
    assert error.count("\n") == 1


def test_a_trained_run_has_a_page_with_its_figures(tiny_config: TrainConfig, capsys):
    result = train(tiny_config)
    assert main(["report", str(tiny_config.folder)]) == 0
    assert f"wrote {tiny_config.folder / 'report.html'}" in capsys.readouterr().out
    page = Page((tiny_config.folder / "report.html").read_text())
    (test,) = result.evaluation.sets
    assert page.rows["evaluation-last"][1][5] == f"{test.accuracy.top1[0.5]:.1f}"
    assert sum(link.startswith("data:image/png") for link in page.links) == 1
    assert "None." in page.text["skipped"]


@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_sideways_scrolling(run: Path, tmp_path: Path, width: int, shoot: Callable):
    from PIL import Image

    write_eval(run)
    buffer = tmp_path / "captions.png"
    Image.new("RGB", (940, 400), "white").save(buffer)
    shutil.copy(buffer, run / "captions-test.png")
    text = write_report(run).read_text()
    measure = (
        "<script>addEventListener('load', () => {"
        "document.querySelectorAll('details').forEach(e => e.open = true); document.title = JSON.stringify({"
        "page: document.documentElement.scrollWidth, window: innerWidth,"
        "charts: [...document.querySelectorAll('.charts svg')].map(e => e.getBoundingClientRect().height),"
        "image: document.querySelector('.pictures img').naturalWidth,"
        "paper: getComputedStyle(document.body).backgroundColor}) })</script>"
    )
    (tmp_path / "measured.html").write_text(text.replace("</main>", "</main>" + measure))
    dom = shoot(width, "--dump-dom", (tmp_path / "measured.html").as_uri())
    title = dom[dom.index("<title>") + 7 : dom.index("</title>")]
    found = json.loads(title.replace("&quot;", '"'))
    assert found["page"] == found["window"] == width
    assert len(found["charts"]) == 10
    assert min(found["charts"]) > 100
    assert found["image"] == 940
    picture = tmp_path / "page.png"
    shoot(width, f"--screenshot={picture}", (run / "report.html").as_uri())
    with Image.open(picture) as shot:
        assert shot.size[0] == width
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 100  # text and curves, not an empty page


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[..., str]:
    """Run chromium without a display in a window of a width; what it prints."""

    def run_browser(width: int, *arguments: str) -> str:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return run_browser
