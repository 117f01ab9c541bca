"""BERT (Devlin et al. 2018, arXiv:1810.04805) over the Chinese vocabulary, beside NEZHA with everything else equal.

    python train.py --config=configs/bert.py:pretrain --workdir=runs/bert --config.data.train=corpus.txt
    python train.py --config=configs/bert.py:ner      --workdir=runs/ner  --config.init_from=runs/bert

Tasks pretrain, ner, lcqmc and chnsenti; `size=base` (default), `large`, or `tiny`, which trains on a CPU:
`configs/bert.py:lcqmc,size=tiny`. Published for base (NEZHA's report, table 4; dev/test): People's Daily NER 96.53/98.58,
LCQMC accuracy 89.04/87.61, ChnSentiCorp accuracy 94.91/95.42. Pretraining is masked LM and next-sentence prediction, as in
the paper, which pretrained base on 16 Cloud TPU chips for 4 days. `configs/bert.py:pretrain,lengths=128-512` has its lengths,
512 in the last tenth of the steps; NEZHA's report stays at 128, the default of both.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import chinese
from zoo.config import parse_argument


def get_config(argument: str = "pretrain") -> ConfigDict:
    options = {"size": chinese.SIZES, "lengths": chinese.LENGTHS}
    task, chosen = parse_argument(argument, tasks=("pretrain", *chinese.TASKS), options=options)
    if task == "pretrain":
        return chinese.pretrain("bert", chosen["size"], chosen["lengths"])
    return chinese.fine_tune("bert", chosen["size"], task)
