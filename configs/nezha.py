"""NEZHA (Wei et al. 2019, arXiv:1909.00204): Chinese BERT with functional relative positions.

    python train.py --config=configs/nezha.py:pretrain --workdir=runs/nezha --config.data.train=corpus.txt
    python train.py --config=configs/nezha.py:ner      --workdir=runs/ner   --config.init_from=runs/nezha

Tasks pretrain, ner, lcqmc and chnsenti; `size=base` (default), `large`, or `tiny`, which trains on a CPU:
`configs/nezha.py:lcqmc,size=tiny`. Published for base (table 4; dev/test): People's Daily NER 97.22/98.58, LCQMC accuracy
89.98/87.41, ChnSentiCorp accuracy 94.74/95.17; the NER figures are token-level. Pretraining is masked LM and next-sentence
prediction, as in the report, which pretrained on 80 V100 GPUs and 10.5 G tokens, 128 long; `lengths=128-512` ends on 512, as BERT did.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import chinese
from zoo.config import parse_argument


def get_config(argument: str = "pretrain") -> ConfigDict:
    options = {"size": chinese.SIZES, "lengths": chinese.LENGTHS}
    task, chosen = parse_argument(argument, tasks=("pretrain", *chinese.TASKS), options=options)
    if task == "pretrain":
        return chinese.pretrain("nezha", chosen["size"], chosen["lengths"])
    return chinese.fine_tune("nezha", chosen["size"], task)
