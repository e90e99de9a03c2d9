"""applied.report: pages that load nothing, escaped text, pictures with alt text, plain metrics."""

import json
import math
import warnings
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from applied import pictures, report
from applied.recipe import Interval

NASTY = "<script>alert('x')</script> & \"quotes\" http://example.com/a.js"
NAN = math.nan


class Seen(HTMLParser):
    """Tags with their attributes, and the text of each tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


X = np.random.default_rng(0).normal(4, 0.1, 24)
Y = X + np.random.default_rng(1).normal(0, 0.02, 24)
KINDS = ["random"] * 12 + ["tilted"] * 8 + ["filters"] * 3 + ["chosen"]
LABELS = [""] * 20 + ["low perplexity", "選ぶ", "$\\bad$", "chosen"]
TAILS = np.random.default_rng(2).standard_cauchy(5000) * 1e-6
FIGURES = {
    "calibration": lambda: pictures.calibration(X, Y, KINDS, LABELS),
    "off the line": lambda: pictures.calibration(X - 2, X),
    "one subset": lambda: pictures.calibration([3.0], [3.1], ["chosen"], ["chosen"]),
    "flat": lambda: pictures.calibration([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "twelve kinds": lambda: pictures.calibration(X, Y, [f"_kind {i % 12}" for i in range(24)]),
    "arms": lambda: pictures.arms(["random", "chosen"], [4.2, 4.0], [4.1, NAN], [4.3, NAN]),
    "one arm": lambda: pictures.arms(["$only$"], [4.2]),
    "composition": lambda: pictures.composition({"pool": {"code": 0.5}, "chosen": {"prose": 1.0}}),
    "domains to fold": lambda: pictures.composition({"a": {f"_{i}$": 1 / 99 for i in range(99)}}),
    "one domain": lambda: pictures.composition({"chosen": {"code": 1.0}}),
    "many domains": lambda: pictures.composition({"a": {f"_{i}$": 1 / 30 for i in range(30)}}),
    "other script": lambda: pictures.composition({"選ぶ": {"散文": 1.0}}),
    "histogram": lambda: pictures.histogram(X, X < 4),
    "heavy tails": lambda: pictures.histogram(TAILS, np.zeros(5000)),
    "one score": lambda: pictures.histogram([0.0], [True]),
}


@cache
def page():
    document = report.Document(7, NASTY, NASTY, -0.5, 1234, NASTY + "x" * 30_000)
    sections = {
        NASTY: [report.paragraph(NASTY), report.facts({NASTY: NASTY, "anchor": 0.2, "gap": NAN})],
        "Table": [report.table([[NASTY, 1.0]], [NASTY, "loss"], caption=NASTY)],
        "Pictures": [report.picture(make(), NASTY) for make in FIGURES.values()],
        "Documents": [report.documents([document])],
    }
    return report.Page(NASTY, NASTY, sections)


def test_the_page_loads_nothing_and_escapes_everything(tmp_path):
    page().save(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    seen = Seen(html)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "a"}
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in seen.all("img"))
    assert not any(
        name == "href" or name.startswith("on") for _, attrs in seen.tags for name in attrs
    )
    assert not any(word in html.lower() for word in ("url(", "@import", "<script"))
    for tag in ("title", "h1", "h2", "p", "dt", "dd", "th", "td", "caption", "figcaption"):
        assert NASTY in seen.text[tag], tag
    assert "".join(seen.text["pre"]).startswith(NASTY)
    policy = [attrs for attrs in seen.all("meta") if "http-equiv" in attrs]
    assert policy[0]["content"].startswith("default-src 'none'")


def test_every_figure_has_alt_text_that_says_what_it_shows():
    seen = Seen(page().html())
    alts = [attrs["alt"] for attrs in seen.all("img")]
    assert len(alts) == len(FIGURES)
    assert all(len(alt) > 30 for alt in alts)
    arms = pictures.arms(["random", "chosen"], [4.2, 4.0], [4.1, NAN], [4.3, NAN])
    assert arms.get_label().endswith("chosen 4; random 4.2 [4.1, 4.3].")
    arms.set_label("")
    with pytest.raises(ValueError, match="alt text"):
        report.picture(arms)
    assert 'alt="mine"' in report.picture(arms, alt="mine")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_clipped(name):
    figure = FIGURES[name]()
    pictures.png(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        box = figure.get_tightbbox()
    assert min(box.x0, box.y0) > -0.02  # inches
    assert (box.max < figure.get_size_inches() + 0.02).all()


def test_of_many_domains_the_largest_are_named():
    hosts = {f"host{i}": (1 + (i % 100 == 7)) / 2020 for i in range(2000)}
    chosen = {"host3": 0.75, "host4": 0.25}
    figure = pictures.composition({"pool": hosts, "chosen": chosen})
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    large = [i for i in range(2000) if i % 100 == 7 or i in (3, 4)]
    assert set(names) > {f"host{i}" for i in large}
    assert (len(names), names[-1]) == (25, "others (1,976)")
    widths = [[bar.get_width() for bar in held] for held in figure.axes[0].containers]
    np.testing.assert_allclose(np.sum(widths, axis=0), [1.0, 1.0])  # nothing is lost
    np.testing.assert_allclose(widths[-1], [1976 / 2020, 0.0])
    assert len(figure.get_label()) < 1000
    few = {f"host{i}": 1 / 25 for i in range(25)}
    (legend,) = pictures.composition({"pool": few}).legends
    assert [text.get_text() for text in legend.get_texts()] == list(few)  # no single other


def test_pictures_are_the_same_bytes_each_time():
    first, again = (pictures.png(FIGURES["calibration"]()) for _ in range(2))
    assert first == again
    assert first.startswith(b"\x89PNG")


def test_long_documents_fold_away_and_end_somewhere():
    html = report.documents([report.Document("id", "s", "d", 0.1, 5, "a" * 700 + "b" * 30_000)])
    seen = Seen(html)
    first, rest = seen.text["pre"]
    assert first == "a" * report.SHOWN
    assert rest.startswith("a" * 100 + "b")
    assert "[10,700 more characters]" in rest
    assert not Seen(report.documents([report.Document(1, "s", "d", 0, 5, "")])).all("details")


def test_tables_align_numbers_and_mark_the_best():
    rows = [
        ["random", Interval(4.2, 4.1, 4.3), 1000, None],
        ["chosen", Interval(4.0, NAN, NAN), 1000, "—"],
        ["none", NAN, 0, 1.0],
    ]
    html = report.table(rows, ["arm", "loss", "tokens", "note"], best={"loss": "low"})
    cells = Seen(html).all("td")
    assert [cell.get("class") for cell in cells[:4]] == [None, "num", "num", None]
    assert [cell.get("class") for cell in cells[4:8]] == [None, "num best", "num", None]
    assert [cell.get("class") for cell in Seen(html).all("th")] == [None, "num", "num", None]
    assert "4.200 <small>[4.100, 4.300]</small>" in html
    assert ">4.000</td>" in html
    assert "nan" not in html
    assert "1,000" in html
    tie = report.table([[0, 0.5], [0, -0.5]], ["a", "b"], best={"a": "low", "b": "high"})
    assert tie.count("best") == 3
    assert report.table([], ["a"], best={"a": "low"}).count("<td") == 0


def test_tables_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="expected 2 cells"):
        report.table([[1]], ["a", "b"])
    with pytest.raises(ValueError, match="expected best"):
        report.table([[1]], ["a"], best={"b": "low"})
    with pytest.raises(ValueError, match="expected best"):
        report.table([[1]], ["a"], best={"a": "lowest"})


def test_the_rank_correlation_is_scipys_and_stands_in_the_title():
    rng = np.random.default_rng(1)
    x = rng.normal(size=30).round(1)  # with ties
    y = x + rng.normal(size=30)
    found, truth = pictures.rank_correlation(x, y), stats.spearmanr(x, y).statistic
    assert found.mean == pytest.approx(truth, abs=1e-12)
    assert found.low < truth < found.high
    title = pictures.calibration(x, y).axes[0].get_title(loc="left")
    assert title.startswith(f"Spearman {truth:.2f} [{found.low:.2f}, {found.high:.2f}], slope ")


def test_the_interval_is_the_bootstrap_of_scipy():
    rng = np.random.default_rng(2)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    wanted = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
        n_resamples=500,
    ).confidence_interval
    found = pictures.rank_correlation(x, y)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.03)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_order_of_few_points_has_no_interval(sign):
    """Every resample has it, too: an interval without width would claim to know it exactly."""
    x = np.arange(6.0)
    assert str(pictures.rank_correlation(x, sign * np.exp(x))) == f"{sign}"
    assert "[" not in pictures.calibration(x, sign * np.exp(x)).axes[0].get_title(loc="left")


@pytest.mark.parametrize(("noise", "pairs"), [(0.75, 6), (0.75, 12), (0.3, 12)])
def test_the_interval_holds_the_true_rank_correlation(noise, pairs):
    """In 19 of 20 samples; .9 is three standard errors below that for 200 of them."""
    rng = np.random.default_rng(0)
    rho = 1 / np.hypot(1, noise)
    truth = 6 / np.pi * np.arcsin(rho / 2)  # of a bivariate normal
    held = []
    for _ in range(200):
        x = rng.normal(size=pairs)
        found = pictures.rank_correlation(x, x + noise * rng.normal(size=pairs), draws=300)
        held.append(math.isnan(found.low) or found.low <= truth <= found.high)
    assert np.mean(held) > 0.9


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])])
def test_an_undefined_rank_correlation_is_nan_and_said(x, y):
    assert math.isnan(pictures.rank_correlation(x, y).mean)
    if x:
        assert "Spearman undefined" in pictures.calibration(x, y).get_label()


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="expected pairs"):
        pictures.rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least one"):
        pictures.calibration([], [])


def test_arms_are_sorted_with_the_lowest_on_top():
    ax = pictures.arms(["a", "chosen", "random"], [3.0, 1.0, 2.0]).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "random", "chosen"]


def test_metrics_are_plain_and_sorted(tmp_path):
    metrics = {
        "z": np.float32(1.5),
        "a": [NAN, math.inf, np.float64(NAN), np.int64(3)],
        "m": {"array": np.array([[1.0, NAN]]), "flag": np.bool_(True), 2: None},
        "interval": Interval(1.0, NAN, 2.0),
        "path": tmp_path,
        "text": "ρ",
    }
    report.write_metrics(tmp_path / "metrics.json", metrics)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert list(found) == sorted(found)
    assert text.endswith("}\n")
    assert "ρ" in text
    assert found["a"] == [None, None, None, 3]
    assert found["z"] == 1.5
    assert found["m"] == {"array": [[1.0, None]], "flag": True, "2": None}
    assert found["interval"] == {"mean": 1.0, "low": None, "high": 2.0}
    with pytest.raises(TypeError):
        report.write_metrics(tmp_path / "bad.json", {"x": object()})
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    "name", ["{}", "crawl-2024-10-en-shard-{:05d}-of-00040", "{}" * 3 + "/very/long" * 20]
)
def test_the_legend_of_domains_is_on_the_picture(name):
    """Names of shards went over both sides of four columns; of two in the middle all could be read."""
    names = [name.format(k, k, k) for k in range(12)]
    figure = pictures.composition({"pool": dict.fromkeys(names, 1 / 12)})
    (legend,) = figure.legends
    FigureCanvasAgg(figure).draw()
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert len({text.get_text() for text in legend.get_texts()}) == 12
