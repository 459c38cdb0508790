"""One look for every figure of the course: for light and dark pages, for grey and for colour-blind eyes."""

__all__ = ["COLOURS", "use"]

#: Okabe & Ito 2008 without yellow. The first four are at least ten steps of lightness (CIE L*) apart, so they
#: survive grey; curves drawn in the other three are dashed.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")

_INK, _LINE, _PAPER = "#222222", "#d9d9d9", "#fdfdfb"


def use() -> None:
    """Switch matplotlib to the course's style.

    Figures bring their own light paper, so they stay readable on a dark page.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=["-"] * 4 + ["--"] * 3),
            "axes.axisbelow": True,
            "axes.edgecolor": _INK,
            "axes.facecolor": _PAPER,
            "axes.grid": True,
            "axes.labelcolor": _INK,
            "axes.labelsize": 11,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": _PAPER,
            "figure.figsize": (7.0, 4.0),
            "font.size": 10.5,
            "grid.color": _LINE,
            "grid.linewidth": 0.6,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "lines.markersize": 5.0,
            "savefig.bbox": "tight",
            "savefig.facecolor": _PAPER,
            "savefig.pad_inches": 0.15,
            "text.color": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
        }
    )
