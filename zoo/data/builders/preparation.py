"""Data sets prepared by TFDS: making them, finding them on disk, opening them without the code that made them.

TensorFlow is never imported, so the files are ArrayRecord: the TFRecord files that TFDS writes by default can only be
read with TensorFlow. Nothing here reaches for the network but `prepare` of a data set that TFDS downloads.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format

from zoo.data.builders import BUILDERS, builder_class
from zoo.data.builders.manual import FILES, file_hashes, split_files
from zoo.errors import UserError, near

FORMAT = "array_record"
INFO, FEATURES = "dataset_info.json", "features.json"
DATASET = re.compile(r"(?P<name>[a-z]\w*)(/(?P<config>\w[\w.+-]*))?(:(?P<version>\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
# The packages of TFDS that hold text; a builder in them is known only once its module is imported.
FAMILIES = ("text", "question_answering", "summarization", "translate")


def prepare(dataset: str, data_dir: str | None = None, manual_dir: str | None = None) -> Path:
    """Prepares a data set in ArrayRecord files, where it is not there yet, and returns its folder.

    Args:
      dataset: one of `BUILDERS`, made from the files in `manual_dir`; or a data set of TFDS, such as "glue/sst2",
        which is downloaded.
      data_dir: the folder of all prepared data; None: TFDS's own, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      manual_dir: the folder of the files that you have.

    Raises:
      UserError: no such data set; files that are missing or bad, with file and line; a package that is missing; a
        download that fails; data that were prepared from other files or in another format.
    """
    name = parse(dataset)[0]
    if name in BUILDERS and manual_dir is None:
        raise UserError(f"data set {name!r} is made from files that you have: name their folder in manual_dir")
    files = split_files(Path(manual_dir)) if name in BUILDERS else {}
    try:
        builder = _builder(dataset, data_dir)
        directory = Path(builder.data_dir)
        if not (directory / INFO).exists():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except ImportError as error:
        raise UserError(f"preparing {dataset} needs the package {error.name!r}, which is not installed") from error
    except OSError as error:
        raise UserError(f"preparing {dataset} failed: {error}") from error
    prepared = open_prepared(directory)
    if files:
        check_files(prepared, files, directory)
    return directory


def _builder(dataset: str, data_dir: str | None) -> Any:
    """The builder that can make a data set."""
    name, config, version = parse(dataset)
    cls = builder_class(name) if name in BUILDERS else _tfds_builder(name)
    configs = sorted(cls.builder_configs)
    if config is None and len(configs) > 1:
        some = ", ".join(f"{name}/{c}" for c in configs[:20])
        raise UserError(f"data set {name!r} has {len(configs)} configs; write one of {some}")
    if config is not None and config not in configs:
        raise UserError(
            f"data set {name!r} has no config {config!r}; {near(config, configs) if configs else f'write {name!r}'}"
        )
    try:
        return cls(data_dir=str(root(data_dir)), config=config, version=version, file_format=FORMAT)
    except (AssertionError, ValueError) as error:  # an unknown version; data there in another format
        raise UserError(f"data set {dataset!r}: {error}") from error


def check_files(builder: Any, files: dict[str, Path], directory: Path) -> None:
    """Raises UserError where prepared data were made from other files than these."""
    if (builder.info.metadata or {}).get(FILES) != file_hashes(files):
        folder = next(iter(files.values())).parent
        raise UserError(
            f"{directory} was prepared from other files than those now in {folder}; remove it, or choose another data_dir"
        )


def prepared_directory(dataset: str, data_dir: str | None = None) -> Path | None:
    """The folder of a prepared data set, of the newest version where `dataset` names none; None where there is none.

    Raises:
      UserError: a data set of several configs, none of which is named.
    """
    name, config, version = parse(dataset)
    folder = root(data_dir) / name / (config or "")
    inside = [path.parent for path in folder.glob(f"*/{INFO}") if VERSION.fullmatch(path.parent.name)]
    if version is not None:
        inside = [path for path in inside if path.name == version]
    elif config is None and not inside:
        configs = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{INFO}")})
        if configs:
            raise UserError(f"data set {name!r} has configs; write one of {', '.join(f'{name}/{c}' for c in configs)}")
    return max(inside, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def open_prepared(directory: Path) -> Any:
    """The TFDS builder of a prepared folder, made from what is written there.

    Raises:
      UserError: the folder is damaged, holds no ArrayRecord files, or names a feature that is not TFDS's own: TFDS
        would import the module that such a file names.
    """
    try:
        features = json.loads((directory / FEATURES).read_bytes())
        foreign = [name for name in _classes(features) if not name.startswith("tensorflow_datasets.core.features.")]
        if foreign:
            raise UserError(f"{directory / FEATURES}: the feature {foreign[0]!r} is not one of TFDS; it is not loaded")
        builder = tfds.builder_from_directory(directory)
    except UserError:
        raise
    except (OSError, ValueError, json_format.Error) as error:
        raise UserError(f"{directory}: the prepared data are damaged: {error}") from error
    formats = sorted(form.value for form in builder.info.available_file_formats())
    if FORMAT not in formats:
        raise UserError(
            f"{directory} holds {' and '.join(formats)} files, which are not read here; prepare the data set in another "
            f"data_dir: `python -m zoo prepare` writes {FORMAT}"
        )
    return builder


def parse(dataset: str) -> tuple[str, str | None, str | None]:
    """name, config and version of "name", "name/config", "name:1.0.0" or "name/config:1.0.0".

    Raises:
      UserError: it is none of them.
    """
    found = DATASET.fullmatch(dataset)
    if not found:
        raise UserError(f"{dataset!r} names no data set; expected something like glue/sst2, lcqmc or xnli:1.1.0")
    return found["name"], found["config"], found["version"]


def root(data_dir: str | None) -> Path:
    """The folder of all prepared data."""
    return Path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir).expanduser()


def _tfds_builder(name: str) -> type:
    for family in FAMILIES:
        module = f"tensorflow_datasets.{family}.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
            break
    try:
        return tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"TFDS has no data set {name!r}; of our own there are: {near(name, BUILDERS)}") from None


def _classes(value: Any) -> Iterator[str]:
    """The Python classes that a features.json names, at any depth; old files call the key `type`."""
    if isinstance(value, dict):
        yield from (value[key] for key in ("pythonClassName", "type") if isinstance(value.get(key), str))
        for inner in value.values():
            yield from _classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner)
