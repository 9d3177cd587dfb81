"""Fetches weights from the Hugging Face hub, with the preprocessing that the repository states."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from repjax import extras, json_files, schema
from repjax.config import INTERPOLATIONS, MEAN, STD
from repjax.errors import InputError, printable, sentences
from repjax.runs import contents
from repjax.schema import anything, items, number, optional, record, text, whole
from repjax.spec import Preprocessing

PREFIX = "hf:"
_FILES = ("model.safetensors", "pytorch_model.bin")
_BY_FILE = "Download the weights and run `repjax import --from FILE`, which reads no config.json"

_CONFIG = record(
  {"pretrained_cfg": optional(record({}, others=anything)), "label_names": optional(items(text()))},
  others=anything,
)
# A crop_pct of 0 or null means the default of timm.
_PREPROCESSING = record(
  {
    "input_size": items(whole(1, contents.MOST_PIXELS), length=3),
    "interpolation": text(*INTERPOLATIONS),
    "mean": MEAN,
    "std": STD,
    "crop_pct": optional(number(0, 1)),
  },
  required=("input_size", "interpolation", "mean", "std"),
  others=anything,
)


class HubFile(NamedTuple):
  """A weight file of the hub that is in the local cache.

  Attributes:
    path: path of the file in the local cache.
    repository: owner and name of the repository.
    revision: the commit, in full.
    config: content of the repository's config.json; empty if there is none.
    license: name of the licence that the repository states; None if it states none.
  """

  path: Path
  repository: str
  revision: str
  config: dict[str, Any]
  license: str | None


def fetch(reference: str) -> HubFile:
  """Fetches a repository's weight file and config.json, or finds them in the local cache.

  Args:
    reference: "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION". Either may end in ":FILE", for a file
      that is not called model.safetensors or pytorch_model.bin.

  Raises:
    InputError: the repository, revision or file does not exist, or the hub cannot be reached and
      the cache does not hold the file.
  """
  huggingface_hub = extras.need("huggingface_hub", printable(reference))
  from huggingface_hub import errors

  repository, _, file = reference.removeprefix(PREFIX).partition(":")
  repository, _, revision = repository.partition("@")
  unreachable = card = None
  try:
    # This question fails at once without a network, where a download would try for long.
    api = huggingface_hub.HfApi()
    card = api.model_info(repository, revision=revision or None, timeout=20).card_data
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
    raise InputError(
      f"the hub has no public repository {repository} with revision {revision or 'main'}. Gated "
      "and private repositories need `hf auth login` first."
    ) from error
  except errors.HFValidationError as error:
    raise InputError(
      f"{reference} is not hf:OWNER/NAME[@REVISION][:FILE]: {printable(error, 300)}"
    ) from error
  except Exception as error:  # The classes of its HTTP library change from version to version.
    unreachable = printable(error, 300)

  def download(name: str) -> Path | None:
    """Returns the path of a file in the cache, or None if the repository or cache lacks it."""
    try:
      return Path(
        huggingface_hub.hf_hub_download(
          repository,
          name,
          revision=revision or None,
          local_files_only=unreachable is not None,
        )
      )
    except errors.LocalEntryNotFoundError as error:
      if unreachable is not None:
        return None
      raise InputError(
        f"{name} of {repository} could not be fetched: {printable(error, 300)}"
      ) from error
    except errors.EntryNotFoundError:
      return None
    except errors.GatedRepoError as error:
      raise InputError(
        f"{repository} is gated: accept its terms on its page, then log in with `hf auth login`"
      ) from error
    except Exception as error:  # The classes of the HTTP library again.
      raise InputError(
        f"{name} of {repository} could not be fetched: {printable(error, 300)}"
      ) from error

  names = (file,) if file else _FILES
  path = next(filter(None, map(download, names)), None)
  command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
  if path is None and unreachable is not None:
    of = f"{repository} in the revision {revision}" if revision else repository
    raise InputError(
      f"the Hugging Face hub cannot be reached ({unreachable}), and the local cache does not hold "
      f"{' or '.join(names)} of {of}. Connect, or run `{command}` elsewhere and copy the cache to "
      f"{huggingface_hub.constants.HF_HUB_CACHE}, or read a file by `repjax import --from FILE`."
    )
  if path is None:
    raise InputError(
      f"{repository} holds no {' or '.join(names)}; name its weight file: hf:{repository}:FILE"
    )
  config_path = download("config.json")
  if config_path is None and unreachable is not None:
    raise InputError(
      f"the local cache holds {path.name} of {repository} but not its config.json, which says how "
      f"images are prepared, and the hub cannot be reached ({unreachable}). Run "
      f"`{command}` where it can be reached."
    )
  config = json_files.read(config_path, _CONFIG) if config_path else {}
  # The path in the cache is .../snapshots/<commit>/<file>, and a file may be in folders.
  folders = path.parts[: -len(Path(names[0]).parts)]
  stated = license_of(card.to_dict() if card else {}, config)
  return HubFile(path, repository, folders[-1], config, stated)


def license_of(card: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
  """Returns the name of the licence that a repository states, or None.

  Args:
    card: the fields at the beginning of the repository's README; empty without the hub.
    config: content of config.json. timm states the licence there too.
  """
  # Licences that the hub does not list are called "other", and have their names in a second field.
  named = card.get("license_name") if card.get("license") == "other" else card.get("license")
  stated = (config.get("pretrained_cfg") or {}).get("license")
  return next((name for name in (named, stated) if isinstance(name, str) and name), None)


def preprocessing(config: dict[str, Any]) -> Preprocessing | None:
  """Returns the preprocessing in timm's config.json, or None if the file states none.

  The shorter side is resized to floor(size / crop_pct), as timm evaluates.

  Raises:
    InputError: the file asks for a crop or interpolation that `Preprocessing` cannot express.
  """
  stated = config.get("pretrained_cfg") or {}
  if "input_size" not in stated:
    return None
  if stated.get("crop_mode", "center") != "center":
    raise InputError(
      f"config.json asks for crop_mode {schema.shown(stated['crop_mode'])}, but only center is "
      f"read. {_BY_FILE}"
    )
  try:
    schema.check(stated, _PREPROCESSING, "pretrained_cfg")
  except InputError as error:
    raise InputError(sentences(f"config.json's {error}", _BY_FILE)) from error
  channels, height, width = stated["input_size"]
  if channels != 3 or height != width:
    raise InputError(
      f"config.json's pretrained_cfg.input_size is {stated['input_size']}, but only square images "
      f"of 3 channels are read. {_BY_FILE}"
    )
  resize_size = math.floor(width / (stated.get("crop_pct") or 0.875))
  mean, std = (
    (float(red), float(green), float(blue)) for red, green, blue in (stated["mean"], stated["std"])
  )
  try:
    return Preprocessing(width, resize_size, stated["interpolation"], mean, std)
  except InputError as error:  # a share so small that the resized image has no size
    share = f"config.json's pretrained_cfg.crop_pct is {stated['crop_pct']}, and gives no size"
    raise InputError(sentences(f"{share}: {error}", _BY_FILE)) from error
