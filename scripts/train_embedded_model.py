"""Train the embedded model from scratch: two hours on one CPU core.

    python scripts/train_embedded_model.py --out /tmp/embedded_model
    python scripts/train_embedded_model.py --out /tmp/embedded_model --device cuda --tokens 200000000

``--init`` goes on from a trained one. The shipped weights are those of the first command and of this one after it, an
hour and a half with more single leaves:

    python scripts/train_embedded_model.py --init /tmp/embedded_model --out /tmp/embedded_model_2 \\
        --tokens 24000000 --lr 0.003 --decay-from 0 --leaves 0.15 --seed 1

A run is reproducible from ``--seed`` as long as ``--hours`` does not cut it short.
"""

import argparse
from pathlib import Path

from embedded.families import NODE_WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; replaced at every check")
    parser.add_argument("--tokens", type=int, default=28_000_000, help="tokens to train on, padding included")
    parser.add_argument("--hours", type=float, default=100.0, help="end after so many hours at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch-tokens", type=int, default=5632, help="padded tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--init", type=Path, help="model folder to continue from")
    parser.add_argument("--leaves", type=float, default=NODE_WEIGHTS["leaf"], help="share of transcripts of one leaf")
    parser.add_argument("--decay-from", type=float, default=0.35, help="share of the run at the peak learning rate")
    args = parser.parse_args()
    try:
        import torch
        from embedded.training import Settings, Trainer
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: run scripts/setup.sh, and use .venv/bin/python")
    torch.set_num_threads(args.threads)
    settings = Settings(
        out=args.out,
        tokens=args.tokens,
        hours=args.hours,
        seed=args.seed,
        device=args.device,
        batch_tokens=args.batch_tokens,
        peak_lr=args.lr,
        layers=args.layers,
        hidden=args.hidden,
        mlp=args.mlp,
        leaves=args.leaves,
        init=args.init,
        decay_from=args.decay_from,
    )
    Trainer(settings).run()


if __name__ == "__main__":
    main()
