"""The table and the report of poison.py."""

from __future__ import annotations


def print_table(outcomes):
    import numpy as np

    keys = []
    for o in outcomes:
        k = (o.budget, o.attack)
        if k not in keys:
            keys.append(k)
    for b, a in keys:
        os = [o for o in outcomes if (o.budget, o.attack) == (b, a)]
        m = lambda f: np.mean([f(o) for o in os])
        print(
            b,
            a.ljust(10),
            f"acc {m(lambda o: o.changed['held-out accuracy']):+.3f} held {m(lambda o: o.changed['held-out loss']):+.3f} target {m(lambda o: o.changed['target loss']):+.3f} pred {m(lambda o: o.predicted.get('target loss', float('nan'))):+.3f}",
            {k: round(m(lambda o: o.auc[k]), 4) for k in os[0].auc},
            "recovered",
            {k[:8]: round(m(lambda o: o.recovered[k]), 2) for k in os[0].recovered},
        )


def write_report(flags, outcomes):
    pass
