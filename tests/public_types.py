"""What a type checker takes and refuses: `make lint` runs mypy over it; nothing here is called."""

from robust_accel import APGD, DDN, FGSMRS, LAMB, NFGSM, PGD, QSGD, Adversarial, Smoothing, Trades


def taken() -> float:
    pgd = PGD(eps="8/255", step_size="2/255")
    for _ in (
        (PGD(eps=0.5, norm="l2", step_size=None), APGD(eps="8/255"), FGSMRS(eps="8/255")),
        (NFGSM(eps=8 / 255), DDN(eps="128/255", init_norm=0.1)),
        (Adversarial(label_smoothing=0.1), Trades(beta=6), Smoothing(sigma="0.25"), QSGD(bits=8)),
    ):
        pass
    return pgd.eps + pgd.step_length


def refused() -> None:
    PGD(esp="8/255")  # type: ignore[call-arg]
    PGD(eps=[8])  # type: ignore[arg-type]
    PGD(norm="l3")  # type: ignore[arg-type]
    DDN()  # type: ignore[call-arg]
    QSGD(bits=[8])  # type: ignore[arg-type]
    LAMB()  # type: ignore[call-arg]
