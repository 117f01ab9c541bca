"""`python -m zoo convert`: a checkpoint of another library to a run folder of ours, or a run of ours to a checkpoint.

    python -m zoo convert bert-base-chinese runs/bert         # then --config.init_from=runs/bert, on any machine
    python -m zoo convert runs/lcqmc exported                 # then transformers loads `exported`

`--config.init_from` and `zoo.load_pretrained` take a checkpoint as it is; converting it first saves reading it again.
"""

from __future__ import annotations

from pathlib import Path

from zoo.command_line import Parser


def main(argv: list[str]) -> int:
    """Converts one directory and says what it holds.

    Raises:
      UserError: SRC is neither, DST is there already, or no architecture has the model.
    """
    parser = Parser(prog="python -m zoo convert", description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint's directory, or a run of train.py")
    parser.add_argument("destination", type=Path, help="a directory that is not there yet")
    parser.add_argument("--model_type", help="the architecture to export as, where several have the same model")
    parser.add_argument(
        "--encoder", action="store_true", help="leave the heads out, also those that this zoo does not have"
    )
    flags = parser.read(argv)

    from zoo.atomic import check_free
    from zoo.interop.export import export
    from zoo.interop.load import is_checkpoint, load_pretrained
    from zoo.interop.run_folder import save_run_folder
    from zoo.models.parameters import count_parameters

    check_free(flags.destination)  # before gigabytes are read for it
    theirs = is_checkpoint(flags.source)
    pretrained = load_pretrained(flags.source, heads=not flags.encoder)
    if theirs:
        save_run_folder(pretrained, flags.destination)
    else:
        export(pretrained, flags.destination, model_type=flags.model_type)
    heads = ", ".join(head.name for head in pretrained.heads) or "none"
    print(f"{flags.destination}: {count_parameters(pretrained.parameter_shapes()):,} parameters, heads: {heads}")
    return 0
