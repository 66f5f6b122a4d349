"""Every setting: its type, default, unit and one sentence.

Settings come from pyinfra's host data: inventories, group_data or ``--data name=value``. They are
checked before a host is touched. ``docs/settings.md`` is printed by ``python -m tasks.settings``.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.rules.hub_files import SHAPES, Reference, parse_reference
from tasks.rules.quantisation import quantisation

LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""The commit that a release of this software was tested with."""

PREFIXES = (
    "llama_cpp_",
    "model_",
    "server_",
    "proxy_",
    "driver_",
    "cuda_",
    "container_",
    "rpc_",
    "hf_",
    "report_",
)
"""A name of host data that starts so is meant for us: if it is no setting, it is misspelt."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9A-F]{40}$")]
Port = Annotated[int, Field(ge=1, le=65535)]

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]

_REVISION = r"^[\w./-]+$"
_CACHE_TYPE = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


def _check_kind(model: str) -> None:
    # It stands in the unit's file, where a control character could end the line.
    if model.isprintable() and re.match(r"^(https?://[^\s/]+/\S+|/.+|file:.+)$", model):
        return
    try:
        parse_reference(model)
    except ValueError as problem:
        others = "an http(s) URL, an absolute path on the host, or file:PATH on this machine"
        raise ValueError(f"{problem}; or {others}") from None


def _reference(model: str) -> Reference | None:
    return None if re.match(r"https?://|/|file:", model) else parse_reference(model)


def _check_source(model: str, sha256: str | None, sha256_name: str, revision_name: str) -> None:
    """Whether it is clear which bytes are meant."""
    _check_kind(model)
    if model.startswith("http") and sha256 is None:
        raise ValueError(
            f"{sha256_name}: a model from a URL needs its SHA-256, so that what is served is "
            "what was meant"
        )
    if _reference(model) is not None and sha256 is not None:
        raise ValueError(
            f"{sha256_name}: the Hub tells the SHA-256 of its files; to pin a model of the Hub, "
            f"set {revision_name} to a commit"
        )


class SettingsError(ValueError):
    """What is wrong with the settings of one host: one line for each fault."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class Adapter(BaseModel):
    """A LoRA adapter for a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1)
    sha256: Sha256 | None = None
    revision: str = Field("main", pattern=_REVISION)
    scale: float = Field(1.0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _may_be_just_its_source(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _from_somewhere(self) -> Adapter:
        _check_source(self.model, self.sha256, "sha256", "revision")
        return self


class Settings(BaseModel):
    """What is wanted of one host."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # llama.cpp
    llama_cpp_version: str = Field(
        LLAMA_CPP_COMMIT,
        min_length=1,
        description="Commit (40 hex digits), tag, branch, or `latest` (the newest `bN` tag). "
        "Always resolved to a commit before anything is built.",
    )
    llama_cpp_repo: str = Field(
        "https://github.com/ggml-org/llama.cpp.git",
        min_length=1,
        description="Git URL, or a path on the host, that the source is fetched from.",
    )
    llama_cpp_targets: tuple[str, ...] = Field(
        ("llama-server", "llama-bench"),
        description="Programs to build. `llama-server` is always among them.",
    )
    llama_cpp_backend: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="What llama.cpp is compiled for. `auto`: CUDA where there is an NVIDIA card, "
        "else the CPU. With `cpu` no driver and no toolkit is installed.",
    )
    llama_cpp_native: bool = Field(
        True,
        description="Compile for exactly this host's CPU. Off: for any CPU of its architecture, "
        "as far as llama.cpp's own defaults go.",
    )
    llama_cpp_cmake_args: dict[str, str] = Field(
        {},
        description="More CMake options, name to value. They win over ours. An option that the "
        "source does not declare is an error.",
    )
    llama_cpp_jobs: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Compilers at a time. Unset: as many as cores and memory bear (2 GiB for each "
        "C++ compiler, 3 GiB for each nvcc).",
    )
    llama_cpp_ccache_size: str = Field(
        "5G",
        pattern=r"^[0-9]+(\.[0-9]+)?[kMGT]i?$",
        description="Upper limit of the compiler cache on the host, as ccache writes sizes.",
    )
    llama_cpp_build_timeout_seconds: Annotated[int, Field(ge=60)] = Field(
        4 * 3600, description="A build that takes longer is stopped. Seconds."
    )

    # Model
    model: str | None = Field(
        None,
        min_length=1,
        description="The GGUF model to serve: `user/repo:QUANT`, `user/repo` (the best that fits) "
        "or `user/repo/file.gguf` on the Hugging Face Hub; an http(s) URL; an absolute path on the "
        "host; or `file:PATH` on this machine, to be copied to the host.",
    )
    model_sha256: Sha256 | None = Field(
        None,
        description="SHA-256 of that file, 64 hex digits. Needed for a URL; checked for a path "
        "if given. The Hub tells its own.",
    )
    model_revision: str = Field(
        "main",
        pattern=_REVISION,
        description="Branch, tag or commit of the Hub's repository. Always resolved to a commit.",
    )
    model_mmproj: str = Field(
        "auto",
        min_length=1,
        description="The projector with which a model sees images: `auto` (the repository's, if it "
        "has one), `none`, or a file of the repository.",
    )
    model_lora: tuple[Adapter, ...] = Field(
        (),
        description="LoRA adapters (GGUF) for the model: each a source as `model` is, or "
        '`{"model": ..., "scale": 0.5, "sha256": ..., "revision": ...}`.',
    )
    model_draft: str | None = Field(
        None,
        min_length=1,
        description="A small model with the same vocabulary that drafts what the model then checks "
        "(speculative decoding): a source as `model` is.",
    )
    model_draft_sha256: Sha256 | None = Field(
        None, description="SHA-256 of that file, as `model_sha256`."
    )
    model_draft_revision: str = Field(
        "main", pattern=_REVISION, description="Its revision, as `model_revision`."
    )
    model_keep: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        1,
        description="Models that were served before and stay on the host, the last ones first. "
        "What else was downloaded is removed once the wanted model serves.",
    )
    model_download_timeout_seconds: Annotated[int, Field(ge=60)] = Field(
        24 * 3600,
        description="A download that takes longer is stopped, and resumed by the next "
        "run. Seconds.",
    )

    model_quantize: str | None = Field(
        None,
        description="Make this quantisation of the model on the host (`Q4_K_M`, `Q8_0`, ...): from "
        "a repository or a folder of the host with safetensors, or from a GGUF in F16, BF16 or "
        "F32. Unset: the model is served as it is.",
    )
    model_imatrix: str | None = Field(
        None,
        description="Importance matrix for `model_quantize`: `user/repo/file` on the Hub, an "
        "http(s) URL, an absolute path on the host, or `file:PATH` on this machine.",
    )
    model_imatrix_sha256: Sha256 | None = Field(
        None, description="SHA-256 of that file, 64 hex digits. Needed for a URL."
    )
    model_quantize_timeout_seconds: Annotated[int, Field(ge=60)] = Field(
        24 * 3600, description="Converting and quantising that takes longer is stopped. Seconds."
    )
    model_convert_index_url: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Package index that the Python packages of the conversion come from, which "
        "are pinned by hash. Unset: that of the host's pip.",
    )
    model_convert_torch_base_url: str = Field(
        "https://download.pytorch.org/whl/cpu",
        pattern=r"^https?://\S+$",
        description="Where builds of PyTorch for the CPU are, or a mirror of them. Used where the "
        "distribution's own is too old.",
    )
    model_convert_torch_url: str | None = Field(
        None,
        pattern=r"^https?://\S+\.whl$",
        description="A build of PyTorch of your own choice, for the host's python3. Unset: the "
        "distribution's, else one that is known by hash.",
    )
    model_convert_torch_sha256: Sha256 | None = Field(
        None, description="SHA-256 of that file, 64 hex digits."
    )

    # Hugging Face Hub
    hf_endpoint: str = Field(
        "https://huggingface.co",
        pattern=r"^https?://[^\s/?#]+[^\s?#]*$",
        description="Address of the Hub, or of a mirror that speaks its API.",
    )
    hf_token: SecretStr | None = Field(
        None,
        description="Token for gated and private repositories. Seen by the Hub only, and on the "
        "host only while it downloads.",
    )

    # Server
    server_host: str = Field(
        "127.0.0.1",
        pattern=r"^[0-9A-Za-z.:_-]+$",
        description="Address that llama-server listens on. Beyond loopback an API key is required.",
    )
    server_port: Port = Field(8080, description="TCP port that llama-server listens on.")
    server_alias: str | None = Field(
        None,
        pattern=r"^[\w./:@+ -]+$",
        description="Model name that the API reports. Unset: the model's file name.",
    )
    server_cors_origins: str | None = Field(
        "localhost",
        pattern=r"^[\w.:/*,-]+$",
        description="Origins whose web pages may ask the server, separated by commas; `*` for "
        "any. Unset: llama.cpp's choice, which is any.",
    )
    server_ctx_size: Annotated[int, Field(ge=256)] = Field(
        4096,
        description="Context of each slot. Tokens. llama-server is given this times "
        "`server_parallel`.",
    )
    server_parallel: Annotated[int, Field(ge=1, le=256)] = Field(
        4, description="Slots: requests served at the same time."
    )
    server_batch_size: Annotated[int, Field(ge=1)] = Field(
        2048, description="Logical batch size. Tokens."
    )
    server_ubatch_size: Annotated[int, Field(ge=1)] = Field(
        512, description="Physical batch size, at most `server_batch_size`. Tokens."
    )
    server_n_predict: Annotated[int, Field(ge=-1)] = Field(
        2048,
        description="Most tokens that a request is answered with unless it asks for fewer "
        "or more; -1 for no limit. Tokens.",
    )
    server_temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = Field(
        None,
        description="Sampling of requests that don't say it themselves, as are the settings down "
        "to `server_seed`: how freely tokens are chosen; 0 for always the likeliest one. Unset: "
        "what the model recommends, else llama.cpp's choice.",
    )
    server_top_k: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Choose among so many of the likeliest tokens; 0 for all of them."
    )
    server_top_p: Probability | None = Field(
        None, description="Choose among the likeliest tokens that have this probability together."
    )
    server_min_p: Probability | None = Field(
        None, description="Leave out tokens that are less likely than this times the likeliest."
    )
    server_repeat_last_n: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The penalties look at so many tokens before. Tokens."
    )
    server_repeat_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = Field(
        None, description="Penalty for tokens that were there before; 1 for none."
    )
    server_presence_penalty: Penalty | None = Field(
        None, description="Penalty for each token that was there before, -2 to 2; 0 for none."
    )
    server_frequency_penalty: Penalty | None = Field(
        None, description="Penalty for each time that a token was there, -2 to 2; 0 for none."
    )
    server_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="The same request is answered the same. Unset: another one each time."
    )
    server_jinja: bool | None = Field(
        None, description="Read chat templates as Jinja. Unset: llama.cpp's choice, which is yes."
    )
    server_chat_template: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Name of one of llama.cpp's own chat templates (`chatml`). Unset: the model's.",
    )
    server_chat_template_file: str | None = Field(
        None,
        min_length=1,
        description="Path on this machine of a chat template in Jinja, which is copied to the "
        "host. Unset: the model's.",
    )
    server_chat_template_kwargs: dict[str, Any] = Field(
        {}, description="What the chat template is given, name to value."
    )
    server_reasoning: Literal["on", "off", "auto"] | None = Field(
        None, description="Let the model think first. Unset: as its chat template has it."
    )
    server_reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy"] | None = Field(
        None,
        description="What becomes of thoughts: `none` leaves them in the answer, `deepseek` puts "
        "them into `reasoning_content`, `deepseek-legacy` does both. Unset: llama.cpp's choice.",
    )
    server_reasoning_effort: str | None = Field(
        None,
        pattern=r"^[a-z]+$",
        description="How much the model thinks, in the words of its chat template (`low`, "
        "`medium`, `high`).",
    )
    server_reasoning_budget: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Most tokens that are thought; -1 for no limit. Tokens."
    )
    server_threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads for generation. Unset: llama.cpp's choice."
    )
    server_threads_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads for prompts. Unset: as `server_threads`."
    )
    server_threads_http: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Threads that answer HTTP. Unset: llama.cpp's choice."
    )
    server_gpu_layers: Annotated[int, Field(ge=0)] | Literal["all", "auto"] = Field(
        "all", description="Layers on the GPU where there is one."
    )
    server_gpus: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="GPUs that llama-server has to see before it starts. Unset: every NVIDIA card "
        "of the host, or as many as `CUDA_VISIBLE_DEVICES` names in `server_environment`.",
    )
    server_gpu_devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="NVIDIA cards that llama-server may use, by their numbers in the order of the "
        "bus, which is `nvidia-smi`'s: `[0]`. Unset: all of them.",
    )
    server_environment: dict[str, str] = Field(
        {},
        description="More environment for llama-server, name to value (such as "
        "`CUDA_VISIBLE_DEVICES`). It can be read by every user of the host: no secrets.",
    )
    server_flash_attn: Literal["on", "off", "auto"] = Field("auto", description="Flash attention.")
    server_load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"] = Field(
        "auto", description="How weights are read into memory: llama.cpp's `--load-mode`."
    )
    server_cache_type_k: _CACHE_TYPE | None = Field(
        None, description="Type of the K cache. Unset: f16."
    )
    server_cache_type_v: _CACHE_TYPE | None = Field(
        None, description="Type of the V cache. Unset: f16."
    )
    server_log_verbosity: Annotated[int, Field(ge=0, le=5)] = Field(
        4,
        description="How much llama-server writes to the journal: 3 is llama.cpp's default; 4 says "
        "at the start which layers are on which device, which the proof reads, and some 30 lines "
        "for each request.",
    )
    server_metrics: bool = Field(True, description="Prometheus metrics at `/metrics`.")
    server_require_api_key: bool | None = Field(
        None,
        description="Ask clients for the API key in `/etc/llamastead/api-key` (generated there if "
        "the file is missing). Unset: exactly when the address is not loopback.",
    )
    server_purpose: Literal["generate", "embed", "rerank"] = Field(
        "generate",
        description="What the model is for: text, embeddings (`/v1/embeddings`), or the order of "
        "documents by relevance (`/v1/rerank`). The proof asks for it.",
    )
    server_extra_args: tuple[str, ...] = Field(
        (), description="More arguments for llama-server, after ours, one list item each."
    )
    server_start_timeout_seconds: Annotated[int, Field(ge=5)] = Field(
        900, description="A start that is not healthy by then has failed. Seconds."
    )
    server_stop_timeout_seconds: Annotated[int, Field(ge=1)] = Field(
        30, description="A stop takes no longer, whatever clients do. Seconds."
    )

    # Further servers
    server_instances: dict[str, dict[str, Any]] = Field(
        {},
        description="Further llama-servers: name to the `model`, `model_*` and `server_*` settings "
        "in which each differs from the host's own. See [instances](instances.md).",
    )

    server_router: bool = Field(
        False,
        description="One llama-server, in router mode at `server_port`, for the host's model and "
        "all `server_instances`: requests name the model. Off: a server for each.",
    )

    # NVIDIA's driver
    driver_source: Literal["auto", "nvidia", "distro", "none"] = Field(
        "auto",
        description="Where the driver is installed from: NVIDIA's repository, the distribution's "
        "archive, or not at all. `auto`: a driver that suffices stays, else the source that "
        "suits the distribution and Secure Boot.",
    )
    driver_version: str | None = Field(
        None,
        pattern=r"^[0-9]{3}(\.[0-9]+){0,2}$",
        description="Driver branch (`580`) or exactly one version (`580.126.20`). Unset: the one "
        "that suits card, distribution and toolkit.",
    )
    driver_modules: Literal["open", "proprietary"] | None = Field(
        None, description="Kind of kernel modules. Unset: the open ones where the card has them."
    )
    driver_flavour: Literal["compute", "desktop"] = Field(
        "compute",
        description="What is installed of the driver: what CUDA needs, or what a desktop needs "
        "as well.",
    )
    driver_remove_conflicts: bool = Field(
        False,
        description="Remove what stands in the driver's way: drivers of another branch or source, "
        "`.run` installations, other sources of NVIDIA's packages. Off: it is reported.",
    )

    # CUDA toolkit
    cuda_version: str | None = Field(
        None,
        pattern=r"^[0-9]{2}\.[0-9]{1,2}(\.[0-9]+)?$",
        description="CUDA toolkit, minor (`12.9`) or patch release (`12.9.2`). Unset: one on the "
        "host that fits, else the best that fits card, driver, compiler and C library.",
    )
    cuda_install_method: Literal["network", "local"] = Field(
        "network",
        description="`network`: NVIDIA's apt repository. `local`: its installer .deb for one "
        "release, which carries a whole repository.",
    )
    cuda_packages: Literal["minimal", "full"] = Field(
        "minimal",
        description="The packages that compiling llama.cpp takes, or the whole toolkit.",
    )
    cuda_repo_url: str = Field(
        "https://developer.download.nvidia.com/compute/cuda/repos",
        pattern=r"^(https?|file)://\S+$",
        description="Base address of NVIDIA's apt repositories, or of a mirror of them. The "
        "distribution's folder (`ubuntu2404/x86_64/`) follows it.",
    )
    cuda_key_fingerprint: Fingerprint | None = Field(
        None,
        description="For a mirror that signs anew: the whole fingerprint of its key, 40 hex "
        "digits in capitals. The key lies there under the name of NVIDIA's. Unset: NVIDIA's.",
    )
    cuda_local_installer_url: str | None = Field(
        None,
        pattern=r"^https?://\S+\.deb$",
        description="Address of the installer .deb. Unset: NVIDIA's for the chosen release.",
    )
    cuda_local_installer_sha256: Sha256 | None = Field(
        None,
        description="SHA-256 of the installer .deb, 64 hex digits. Needed where none is known "
        "for the release.",
    )
    cuda_keep_installer: bool = Field(
        False,
        description="Keep the local installer's repository on the host after the installation "
        "(3 to 5 GB).",
    )

    # Container toolkit
    container_toolkit: Literal["auto", "on", "off"] = Field(
        "auto",
        description="NVIDIA's container toolkit. `auto`: where there are an NVIDIA card and Docker "
        "or Podman, but not inside WSL, where Docker Desktop brings its own.",
    )
    container_toolkit_version: str | None = Field(
        None,
        pattern=r"^[0-9]+\.[0-9]+\.[0-9]+(-[0-9]+)?$",
        description="Version of its packages (`1.19.1`). Unset: the newest that was tested.",
    )
    container_toolkit_repo_url: str = Field(
        "https://nvidia.github.io/libnvidia-container",
        pattern=r"^(https?|file)://\S+$",
        description="Base address of its apt repository and of the key beside it, or of a mirror.",
    )
    container_toolkit_key_fingerprint: Fingerprint | None = Field(
        None, description="For a mirror that signs anew, as `cuda_key_fingerprint`."
    )

    # Proxies
    proxy_http: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Proxy for http:// addresses."
    )
    proxy_https: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Proxy for https:// addresses."
    )
    proxy_no_proxy: str | None = Field(
        None, description="Hosts reached without a proxy, separated by commas."
    )
    proxy_apt: str | None = Field(
        None,
        pattern=r"^(https?://\S+|DIRECT)$",
        description="Proxy or package cache for apt. Unset: `proxy_http` and `proxy_https`.",
    )

    # Report
    report_format: Literal["text", "json"] = Field(
        "text",
        description="How check.py prints the plan: a table for people, or on standard output one "
        "line of JSON for each host.",
    )

    @field_validator("llama_cpp_targets", mode="after")
    @classmethod
    def _server_is_a_target(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        bad = [target for target in targets if not re.fullmatch(r"[a-z0-9-]+", target)]
        if bad:
            raise ValueError(f"{bad[0]!r} is no name of a llama.cpp program")
        return tuple(dict.fromkeys(("llama-server", *targets)))

    @field_validator("llama_cpp_version", "llama_cpp_repo", mode="after")
    @classmethod
    def _no_option(cls, value: str) -> str:
        # These reach git's command line.
        if value.startswith("-") or re.search(r"\s", value):
            raise ValueError("must not start with '-' or contain white space")
        return value

    @field_validator("cuda_repo_url", "container_toolkit_repo_url", mode="after")
    @classmethod
    def _no_password(cls, url: str) -> str:
        if "@" in urlsplit(url).netloc:
            raise ValueError(
                "must not hold a user or password: everybody on the host could read "
                "them in apt's sources. Let the mirror know the host by its address, or reach it "
                "through proxy_apt, which may hold them"
            )
        return url

    @field_validator("llama_cpp_cmake_args", mode="after")
    @classmethod
    def _cmake_names(cls, args: dict[str, str]) -> dict[str, str]:
        for name, value in args.items():
            if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a CMake option (write it without -D)")
            if not value.isprintable():
                raise ValueError(f"{name}: the value has a character that cannot be printed")
        return args

    @field_validator("server_environment", mode="after")
    @classmethod
    def _variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not value.isprintable():
                raise ValueError(f"{name!r} is no environment variable of one line")
        return environment

    @field_validator("model", "model_draft", mode="after")
    @classmethod
    def _one_of_the_kinds(cls, model: str | None) -> str | None:
        if model is not None:
            _check_kind(model)
        return model

    @field_validator("model_quantize", mode="after")
    @classmethod
    def _is_made(cls, name: str | None) -> str | None:
        return quantisation(name).name if name is not None else None

    @field_validator("model_imatrix", mode="after")
    @classmethod
    def _one_of_the_kinds_too(cls, imatrix: str | None) -> str | None:
        if imatrix is None or (
            imatrix.isprintable()
            and re.fullmatch(
                r"https?://[^\s/]+/\S+|/.+|file:.+|[\w.-]+/[\w.-]+(?:/(?!\.\.?(?:/|$))[^/\s]+)+",
                imatrix,
            )
        ):
            return imatrix
        raise ValueError(
            "must be user/repo/file, an http(s) URL, an absolute path on the host, or file:PATH on "
            "this machine"
        )

    @field_validator("hf_token", mode="after")
    @classmethod
    def _goes_into_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        # It reaches curl's configuration, where a quote or a line's end would mean something.
        if token is not None and not re.fullmatch(r"[!#-\[\]-~]+", token.get_secret_value()):
            raise ValueError("must be one word of plain characters, without quotes")
        return token

    @field_validator("server_chat_template_kwargs", mode="after")
    @classmethod
    def _is_json(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("must be plain values: text, numbers, lists, dictionaries") from None
        return values

    @field_validator("server_extra_args", mode="after")
    @classmethod
    def _one_line_each(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for arg in args:
            if not arg.isprintable():
                raise ValueError(f"{arg!r} has a character that cannot be printed")
        return args

    @field_validator("server_instances", mode="after")
    @classmethod
    def _names_of_units(cls, instances: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in instances:
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
                raise ValueError(
                    f"{name!r} is no name of an instance: a to z, 0 to 9 and dashes, at most 32"
                )
        return instances

    @model_validator(mode="after")
    def _contradictions(self) -> Settings:
        if self.model is not None:
            _check_source(self.model, self.model_sha256, "model_sha256", "model_revision")
        if self.model_draft is not None:
            names = ("model_draft_sha256", "model_draft_revision")
            _check_source(self.model_draft, self.model_draft_sha256, *names)
        if self.model_reference is None and self.model_mmproj not in {"auto", "none"}:
            raise ValueError(f"model_mmproj: only for a model on the Hub ({SHAPES})")
        self._check_making()
        if self.cuda_install_method == "local" and self.cuda_local_installer_url is not None:
            if self.cuda_version is None:
                raise ValueError(
                    "cuda_version: cuda_local_installer_url names one release; say which "
                    "(such as 12.9.2)"
                )
            if self.cuda_local_installer_sha256 is None:
                raise ValueError(
                    "cuda_local_installer_sha256: an installer from an address of your own needs "
                    "its SHA-256"
                )
        if self.server_chat_template is not None and self.server_chat_template_file is not None:
            raise ValueError(
                "server_chat_template: server_chat_template_file is set as well; one of the two"
            )
        devices = self.server_gpu_devices
        if devices is not None and "CUDA_VISIBLE_DEVICES" in self.server_environment:
            raise ValueError(
                "server_gpu_devices: CUDA_VISIBLE_DEVICES in server_environment says it already"
            )
        if devices is not None and (self.server_gpus or 0) > len(devices):
            raise ValueError(
                f"server_gpus: {self.server_gpus} are to be seen, but server_gpu_devices names "
                f"{len(devices)}"
            )
        if self.server_ubatch_size > self.server_batch_size:
            raise ValueError(
                f"server_ubatch_size: {self.server_ubatch_size} is more than server_batch_size "
                f"({self.server_batch_size})"
            )
        if self.server_require_api_key is False and not self.is_loopback:
            raise ValueError(
                f"server_require_api_key: off, but server_host is {self.server_host}: beyond "
                "loopback an API key is required"
            )
        return self

    def _check_making(self) -> None:
        imatrix, torch = self.model_imatrix, self.model_convert_torch_url
        if self.model_quantize is None and imatrix is not None:
            raise ValueError("model_imatrix: only for model_quantize, which is not set")
        if self.model_quantize is not None and self.model_mmproj not in {"auto", "none"}:
            raise ValueError("model_mmproj: a model that is quantised here has no projector")
        is_url = self.model is not None and self.model.startswith("http")
        if self.model_quantize is not None and self.model_sha256 is not None and not is_url:
            raise ValueError("model_sha256: with model_quantize only for a URL")
        if imatrix and imatrix.startswith("http") and self.model_imatrix_sha256 is None:
            raise ValueError("model_imatrix_sha256: a file from a URL needs its SHA-256")
        if (torch is None) != (self.model_convert_torch_sha256 is None):
            raise ValueError(
                "model_convert_torch_url: it and model_convert_torch_sha256 need each other"
            )

    @property
    def model_reference(self) -> Reference | None:
        """The model on the Hub that is asked for."""
        return None if self.model is None else _reference(self.model)

    @property
    def model_upload(self) -> str | None:
        """Path on this machine of a model that is to be copied to the host."""
        is_here = self.model is not None and self.model.startswith("file:")
        return self.model.removeprefix("file:") if self.model and is_here else None

    @property
    def is_loopback(self) -> bool:
        """Whether only this host itself can reach the server."""
        if self.server_host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.server_host).is_loopback
        except ValueError:
            return False  # a name, whatever it begins with

    @property
    def api_key_required(self) -> bool:
        """Whether clients must show the API key."""
        if self.server_require_api_key is None:
            return not self.is_loopback
        return self.server_require_api_key

    @property
    def proxy_environment(self) -> dict[str, str]:
        """Environment that makes curl, git and friends use the proxies."""
        pairs = {
            "http_proxy": self.proxy_http,
            "https_proxy": self.proxy_https,
            "no_proxy": self.proxy_no_proxy,
        }
        return {name: value for name, value in pairs.items() if value}

    @property
    def apt_environment(self) -> dict[str, str]:
        """Environment that makes apt use its proxy; apt honours the same names as curl."""
        if self.proxy_apt is None:
            return self.proxy_environment
        if self.proxy_apt == "DIRECT":
            return {"no_proxy": "*"}
        return {"http_proxy": self.proxy_apt, "https_proxy": self.proxy_apt}


def load(data: Mapping[str, Any]) -> Settings:
    """Settings from pyinfra's host data, of which other names are left alone.

    Raises SettingsError with one line for each fault: a misspelt name with the nearest right one,
    a value of the wrong type or out of range, a contradiction.
    """
    known = Settings.model_fields
    values = {name: _listed(value) for name, value in data.items() if name in known}
    faults = [_misspelt(name) for name in sorted(data) if _is_misspelt(name)]
    try:
        settings = Settings(**values)
    except ValidationError as error:
        faults += [_fault(detail) for detail in error.errors(include_url=False)]
        raise SettingsError(faults) from None
    if not faults:
        faults += _faults_of_instances(settings)
    if faults:
        raise SettingsError(faults)
    return settings


OF_THE_HOST = frozenset(
    {
        "model_convert_index_url",
        "model_convert_torch_base_url",
        "model_convert_torch_sha256",
        "model_convert_torch_url",
        "model_download_timeout_seconds",
        "model_keep",
        "model_quantize_timeout_seconds",
        "server_instances",
        "server_router",
    }
)
"""Settings that stand once for all llama-servers, although their names begin as one's own do."""


OF_THE_PROCESS = frozenset(
    {
        *("server_host", "server_port", "server_cors_origins", "server_threads_http"),
        *("server_require_api_key", "server_log_verbosity", "server_metrics"),
        *("server_environment", "server_gpus", "server_gpu_devices"),
        *("server_start_timeout_seconds", "server_stop_timeout_seconds"),
    }
)
"""Settings that several models share where one llama-server serves them all."""


def own_settings() -> list[str]:
    """Settings that an instance may have of its own."""
    ours = ("model", "server_")
    return [n for n in Settings.model_fields if n.startswith(ours) and n not in OF_THE_HOST]


def instances(settings: Settings) -> dict[str, Settings]:
    """Settings of each llama-server by its name, the host's own first, which has none."""
    further = {name: Settings(**_of_instance(settings, name)) for name in settings.server_instances}
    return {"": settings, **further}


MAIN_PART = ""
DRAFT_PART = "model_draft"
LORA_PART = "model_lora"


def parts(settings: Settings) -> dict[str, Settings]:
    """Everything that one llama-server loads, each as if it were the model, by its setting."""

    def as_model(model: str, sha256: str | None, revision: str) -> Settings:
        own = {"model": model, "model_sha256": sha256, "model_revision": revision}
        # What else is said of the model, or of its cache, is not said of what comes with it.
        others = {
            name: field.default
            for name, field in Settings.model_fields.items()
            if name.startswith(("model_", "server_cache_type_")) and name not in OF_THE_HOST
        }
        return settings.model_copy(update={**others, **own, "model_mmproj": "none"})

    found = {MAIN_PART: settings}
    if settings.model_draft is not None:
        draft = settings.model_draft
        found[DRAFT_PART] = as_model(
            draft, settings.model_draft_sha256, settings.model_draft_revision
        )
    for number, each in enumerate(settings.model_lora):
        found[f"{LORA_PART}.{number}"] = as_model(each.model, each.sha256, each.revision)
    return found


def _of_instance(settings: Settings, name: str) -> dict[str, Any]:
    """The host's settings with what an instance has of its own.

    What belongs to the host's model says nothing about another one.
    """
    own = settings.server_instances[name]
    given = settings.model_fields_set - {"server_instances"}
    if "model" in own:
        of_models = ("model_", "server_alias", "server_chat_template", "server_reasoning")
        given = {n for n in given if not n.startswith(of_models) or n in OF_THE_HOST}
    return {
        **{n: getattr(settings, n) for n in given},
        **{n: _listed(value) for n, value in own.items()},
    }


def _faults_of_instances(settings: Settings) -> list[str]:
    faults = []
    allowed = own_settings()
    ports = {settings.server_port: "the host's own llama-server"}
    for name, own in settings.server_instances.items():
        where = f"server_instances.{name}"
        strange = sorted(set(own) - set(allowed))
        faults += [f"{where}.{_misspelt(each, allowed)}" for each in strange]
        if strange:
            continue
        try:
            made = Settings(**_of_instance(settings, name))
        except ValidationError as error:
            faults += [f"{where}.{_fault(each)}" for each in error.errors(include_url=False)]
            continue
        if settings.server_router:
            faults += [
                f"{where}.{each}: with server_router one llama-server serves all models; set it "
                "for the host"
                for each in sorted(OF_THE_PROCESS & set(own))
            ]
            continue
        port = made.server_port
        if port in ports:
            faults.append(f"{where}.server_port: {port} is the port of {ports[port]}")
        ports[port] = where
    return faults


def _listed(value: Any) -> Any:
    """Inventories write lists; the frozen model wants tuples."""
    return tuple(value) if isinstance(value, list) else value


def _is_misspelt(name: str) -> bool:
    if name in Settings.model_fields:
        return False
    if name.startswith(PREFIXES):
        return True
    # A slip in the prefix itself (`sever_port`). pyinfra's own data never looks like a setting.
    return bool(difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.87))


def _misspelt(name: str, known: Iterable[str] = tuple(Settings.model_fields)) -> str:
    if name in Settings.model_fields:
        return f"{name}: stands once for the whole host"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else "docs/settings.md lists all of them"
    return f"{name}: there is no such setting; {hint}"


def _fault(detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    if name in {"server_instances", "model_lora"}:
        name = ".".join(map(str, detail["loc"]))
    given = detail["input"]
    message = message[:1].lower() + message[1:]
    if name.startswith(("proxy_", "hf_")) or "://" in str(given):
        return f"{name}: {message}"  # may hold a secret
    if detail["type"] == "string_type" and isinstance(given, (int, float)):
        message = (
            f"{given!r} was read as a number; on the command line quote it: "
            f"--data '{name}=\"{given}\"'"
        )
        return f"{name}: {message}"
    return f"{name}: {message} (given: {given!r})"


_TYPE_NAMES = {
    "str": "text",
    "SecretStr": "text",
    "int": "number",
    "float": "decimal number",
    "Adapter": "text or dictionary",
    "bool": "yes or no",
}


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of " + _type_name(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return "dictionary"
    if get_args(annotation):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return " \\| ".join(_type_name(kind) for kind in kinds)
    name = str(annotation.__name__)
    return _TYPE_NAMES.get(name, name)


def _default_text(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "`True`" if value else "`False`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


def markdown() -> str:
    """The page docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "This page is generated from `tasks/settings.py` by `./run python -m tasks.settings`.",
        "",
        "Put them into an inventory, into `group_data/`, or on the command line",
        "(`--data server_port=9000`; quote text that looks like a number: `--data 'x=\"12.10\"'`).",
        "",
        "| setting | kind | default | what it does |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        lines.append(
            f"| `{name}` | {_type_name(field.rebuild_annotation())} | "
            f"{_default_text(field.default)} | {field.description} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
