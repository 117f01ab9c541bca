"""`python -m zoo prepare`: write a data set of TFDS, or one made from your own files, in the form that `tfds` reads."""

from __future__ import annotations

from zoo.command_line import Parser
from zoo.data.builders import BUILDERS


def main(argv: list[str]) -> int:
    """Prepares one data set and prints its folder, its splits and its features.

    Raises:
      UserError: no such data set, files that are missing or bad (with file and line), or data prepared from others.
    """
    parser = Parser(prog="python -m zoo prepare", description=__doc__)
    parser.add_argument(
        "dataset", help=f"a data set of TFDS such as glue/sst2, which is downloaded, or {', '.join(BUILDERS)}"
    )
    parser.add_argument("--manual_dir", help="the folder of the files that you have")
    parser.add_argument("--data_dir", help="the folder of all prepared data; default: TFDS's own")
    flags = parser.read(argv)

    from zoo.data.builders import preparation

    directory = preparation.prepare(flags.dataset, flags.data_dir, flags.manual_dir)
    info = preparation.open_prepared(directory).info
    print(directory)
    for name, split in info.splits.items():
        print(f"  {name:<12} {split.num_examples:,} examples")
    print(f"  features     {', '.join(info.features)}")
    return 0
