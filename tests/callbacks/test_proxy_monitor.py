"""The plot of wanted and landed change: a whole PNG file or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from falqon.callbacks import proxy_monitor
from falqon.callbacks.proxy_monitor import plot_landed

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def layers(kinds: int) -> dict[str, tuple[float, float]]:
    return {
        f"layers.{number}.kind{kind}": (1.0 + kind, 0.5 + number)
        for number in range(2)
        for kind in range(kinds)
    }


@pytest.mark.parametrize(
    "lengths",
    [layers(3), layers(40), {}, {"fc": (0.0, 0.0)}, {"fc": (1.0, -0.1)}],
    ids=["few kinds", "many kinds", "no layer", "no change", "wrong way"],
)
def test_plot_is_a_png_file(tmp_path: Path, lengths: dict[str, tuple[float, float]]) -> None:
    path = tmp_path / "new" / "landed.png"
    plot_landed(lengths, path)
    assert path.read_bytes()[:8] == SIGNATURE
    assert path.read_bytes()[-8:-4] == b"IEND"  # and it is whole
    assert [p.name for p in path.parent.iterdir()] == ["landed.png"]


def test_plot_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "landed.png"
    path.write_bytes(b"older")
    plot_landed(layers(2), str(path))
    assert path.read_bytes()[:8] == SIGNATURE


def test_points_and_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[tuple[float, float]]] = {}

    def scatter(self: Axes, x: list[float], y: list[float], **options: object) -> None:
        drawn[str(options["label"])] = list(zip(x, y, strict=True))

    monkeypatch.setattr(Axes, "scatter", scatter)
    plot_landed(layers(2), tmp_path / "few.png")
    assert drawn == {"kind0": [(1.0, 0.5), (1.0, 1.5)], "kind1": [(2.0, 0.5), (2.0, 1.5)]}
    drawn.clear()
    many = layers(proxy_monitor._MANY + 1)
    plot_landed(many, tmp_path / "many.png")
    assert drawn == {"all layers": list(many.values())}
