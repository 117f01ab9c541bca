"""The families of checkpoints, by what config.json calls them."""

from __future__ import annotations

from zoo.errors import UserError, near
from zoo.interop.architecture import Architecture
from zoo.interop.architectures.albert import ALBERT
from zoo.interop.architectures.bert import BERT, NEZHA
from zoo.interop.architectures.convbert import CONVBERT
from zoo.interop.architectures.deberta import DEBERTA, DEBERTA_V2
from zoo.interop.architectures.distilbert import DISTILBERT
from zoo.interop.architectures.electra import ELECTRA
from zoo.interop.architectures.eurobert import EUROBERT
from zoo.interop.architectures.fnet import FNET
from zoo.interop.architectures.modernbert import MODERNBERT
from zoo.interop.architectures.mosaicbert import MOSAICBERT
from zoo.interop.architectures.neobert import NEOBERT
from zoo.interop.architectures.nomic_bert import NOMIC_BERT
from zoo.interop.architectures.roberta import ROBERTA, XLM_ROBERTA
from zoo.interop.architectures.roformer import ROFORMER

FAMILIES = (
    BERT,
    NEZHA,
    ROBERTA,
    XLM_ROBERTA,
    ELECTRA,
    DISTILBERT,
    ALBERT,
    ROFORMER,
    DEBERTA,
    DEBERTA_V2,
    MODERNBERT,
    EUROBERT,
    NOMIC_BERT,
    NEOBERT,
    MOSAICBERT,
    FNET,
    CONVBERT,
)
ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in FAMILIES}


def architecture(model_type: str, where: str) -> Architecture:
    """The family called `model_type`.

    Raises:
      UserError: there is none of that name.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type {model_type!r} is no architecture of this zoo; {near(model_type, ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
