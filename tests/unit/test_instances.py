"""Several llama-servers on one host: their settings, units, memory, and what goes again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from configparser import ConfigParser
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.probe import (
    RECORDS,
    SERVER_UNIT,
    UNIT_MARK,
    UNITS,
    Listener,
    ManagedFile,
    Probe,
    Service,
)
from tasks.rules import memory, server
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.gguf import Bytes, read_header
from tasks.rules.model import Found
from tasks.rules.plan import Plan, as_json, make_plan, rows
from tasks.settings import Settings, SettingsError, instances, own_settings
from tests.gguf_models import Dimensions, write

from .hosts import (
    BARE,
    GIB,
    RTX_4090,
    SHA256,
    SOURCE,
    URL,
    WITH_COMPILER,
    WITH_DRIVER,
    card,
    settings,
    with_release,
)

EMBED = {
    "model": "https://models.example/embed.gguf",
    "model_sha256": "e" * 64,
    "server_port": 8081,
    "server_purpose": "embed",
}
RERANK = {
    "model": "https://models.example/rerank.gguf",
    "model_sha256": "f" * 64,
    "server_port": 8082,
    "server_purpose": "rerank",
}
UNIT = "llama-server@embed.service"


def wanted(embed: dict[str, Any] | None = None, **data: Any) -> Settings:
    return settings(server_instances={"embed": {**EMBED, **(embed or {})}}, **data)


def faults(**data: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        settings(**data)
    return caught.value.faults


# Settings


def test_an_instance_is_the_host_but_for_what_it_says() -> None:
    made = instances(wanted(server_parallel=2, server_alias="chat", model_revision="v1"))
    assert list(made) == ["", "embed"]
    own = made["embed"]
    assert (own.server_port, own.server_parallel) == (8081, 2)
    # What belongs to the host's model says nothing about another one.
    assert (own.model_sha256, own.server_alias, own.model_revision) == ("e" * 64, None, "main")


def test_an_instance_may_serve_the_hosts_model_once_more() -> None:
    own = instances(settings(server_instances={"more": {"server_port": 9000}}))["more"]
    assert (own.model, own.model_sha256) == (URL, SHA256)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"server_port": 0}, "server_instances.embed.server_port: input should be greater"),
        ({"server_prot": 1}, "server_instances.embed.server_prot: there is no such setting; did y"),
        ({"port": 1}, "server_instances.embed.port: there is no such setting"),
        ({"hf_token": "x"}, "server_instances.embed.hf_token: stands once for the whole host"),
        ({"model_keep": 3}, "server_instances.embed.model_keep: stands once for the whole host"),
        ({"server_port": 8080}, "server_instances.embed.server_port: 8080 is the port of the host"),
        ({"model_sha256": None}, "server_instances.embed.model_sha256: a model from a URL"),
        ({"model": "x"}, "server_instances.embed.model: "),
        ({"server_gpu_devices": []}, "server_instances.embed.server_gpu_devices: "),
        ({"server_gpu_devices": [0], "server_gpus": 2}, "server_instances.embed.server_gpus: 2 "),
        ({"server_purpose": "chat"}, "server_instances.embed.server_purpose: "),
    ],
)  # fmt: skip
def test_a_fault_names_the_instance_and_the_setting(own: dict[str, Any], said: str) -> None:
    (fault,) = faults(server_instances={"embed": {**EMBED, **own}})
    assert fault.startswith(said)


@pytest.mark.parametrize("name", ["", "a b", "Embed", "-x", "a/b", "x" * 33, "ü", "a@b", "%i"])
def test_a_name_that_no_unit_may_have(name: str) -> None:
    (fault,) = faults(server_instances={name: EMBED})
    assert "is no name of an instance" in fault


def test_two_instances_may_not_share_a_port() -> None:
    (fault,) = faults(server_instances={"a": EMBED, "b": EMBED})
    assert "server_instances.b.server_port: 8081 is the port of server_instances.a" in fault


@pytest.mark.parametrize("value", [5, ["embed"], {"embed": 5}])
def test_what_is_no_dictionary_is_one_line(value: object) -> None:
    (fault,) = faults(server_instances=value)
    assert fault.startswith("server_instances")


names = st.sampled_from([*own_settings(), "server_prot", "hf_token", "model_keep", "x"])
odd = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())


@given(st.dictionaries(st.text(max_size=5), st.dictionaries(names, odd, max_size=3), max_size=3))
def test_whatever_is_said_it_is_settings_or_faults(told: dict[str, Any]) -> None:
    try:
        made = settings(server_instances=told)
    except SettingsError as problem:
        said = problem.faults
    else:
        said = ()
        ports = [own.server_port for own in instances(made).values()]
        assert len(set(ports)) == len(ports) == len(told) + 1
    assert all(fault.startswith("server_instances") for fault in said)


# The plan


def plan(made: Settings, probe: Probe = BARE, found: dict[str, Found] | None = None) -> Plan:
    return make_plan(made, probe, SOURCE, found=found)


def test_each_has_a_unit_of_its_own() -> None:
    main, embed = plan(wanted()).servers
    assert (main.name, embed.name) == (SERVER_UNIT, UNIT)
    assert embed.unit.path == f"{UNITS}/{UNIT}"
    assert "--port 8081" in embed.unit.content
    assert "--embedding" in embed.arguments
    assert "CacheDirectory=llama-server@embed\n" in embed.unit.content
    assert f"systemctl edit {UNIT}" in embed.unit.content
    assert main.digest != embed.digest
    assert main.helpers == embed.helpers


def test_what_changes_one_leaves_the_other_alone() -> None:
    before, after = plan(wanted()), plan(wanted({"server_parallel": 1}))
    assert before.servers[0] == after.servers[0]
    assert before.servers[1].digest != after.servers[1].digest


def test_all_models_are_fetched_and_shared_files_once() -> None:
    made = plan(settings(server_instances={"embed": EMBED, "more": {"server_port": 9000}}))
    assert made.needs_download
    assert len(made.models) == 3
    assert made.models[0].path == made.models[2].path
    table = rows(made)
    assert [decision.split()[1] for what, decision in table if what == "server"] == [
        "llama-server", "llama-server@embed", "llama-server@more",
    ]  # fmt: skip
    told = json.loads(json.dumps(as_json(made)))
    assert [each["name"] for each in told["instances"]] == ["", "embed", "more"]


def test_no_model_that_an_instance_uses_is_cleaned_up() -> None:
    served = plan(wanted())
    models = {each.record_path: each.record for each in served.models if each.record}
    probe = replace(
        BARE,
        records={path: (5, record.as_json()) for path, record in models.items()},
        blobs={SHA256: 5, "e" * 64: 7},
        links={file.path: file.target for each in served.models for file in each.files},
    )
    assert all(path.startswith(RECORDS) for path in models)
    assert not plan(wanted(model_keep=0), probe).removal
    assert plan(settings(model_keep=0), probe).removal.blobs == ("e" * 64,)
    assert not plan(settings(model_keep=1), probe).removal


def test_every_finding_says_whose_it_is() -> None:
    taken = replace(BARE, listeners={8081: Listener(7, "nginx")})
    (found,) = plan(wanted(), taken).errors
    assert found.cause.startswith("server_instances.embed: server_port: 8081 is already taken")


# What is on the host and not wanted any more


def service(mark: str | None = UNIT_MARK, **changes: Any) -> Service:
    made = Service("active", "running", "enabled", 42, False, None, None, mark=mark)
    return replace(made, **changes)


def test_a_unit_of_ours_that_is_no_longer_asked_for_goes_and_no_other() -> None:
    old, foreign = "llama-server@old.service", "llama-server@mine.service"
    probe = replace(
        BARE,
        services={
            SERVER_UNIT: service(),
            UNIT: service(),
            old: service(),
            foreign: service("# by hand"),
            "llama-server@masked.service": service(None),
        },
    )
    made = plan(wanted(), probe)
    assert made.leftovers == (old,)
    assert ("servers", f"remove {old}") in rows(made)
    assert plan(settings(), probe).leftovers == (UNIT, old)


def test_a_unit_of_somebody_elses_in_our_place_is_an_error() -> None:
    probe = replace(BARE, services={UNIT: service("[Unit]")})
    (found,) = plan(wanted(), probe).errors
    assert found.code == "unit-not-ours"
    assert UNIT in found.fix


def test_a_port_that_goes_from_one_of_ours_to_another() -> None:
    held = {8081: Listener(None, None, SERVER_UNIT)}
    probe = replace(BARE, listeners=held, services={SERVER_UNIT: service()})
    (found,) = plan(wanted(), probe).errors
    assert found.code == "port-of-another"
    assert f"systemctl stop {SERVER_UNIT}" in found.fix
    # One that is removed has let go of it by then.
    old = "llama-server@old.service"
    probe = replace(BARE, listeners={8081: Listener(None, None, old)}, services={old: service()})
    assert plan(wanted(), probe).errors == ()


# Cards


TWO = replace(WITH_DRIVER, gpus=(card(), card(RTX_4090, address="0000:02:00.0")))


def unit(made: Plan, number: int) -> str:
    return made.servers[number].unit.content


def test_each_sees_the_cards_that_it_is_given_and_waits_for_all() -> None:
    made = plan(wanted({"server_gpu_devices": [1]}, server_gpu_devices=[0]), TWO)
    assert made.errors == ()
    assert "Environment=CUDA_VISIBLE_DEVICES=0\n" in unit(made, 0)
    assert "Environment=CUDA_VISIBLE_DEVICES=1\n" in unit(made, 1)
    for number in (0, 1):
        # Or the numbers would be those of the fastest first.
        assert "Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID\n" in unit(made, number)
        assert f"{server.GPU_GATE} /opt/llama.cpp/current/bin/llama-server 1\n" in unit(
            made, number
        )
    assert "CUDA_CACHE_PATH=/var/cache/llama-server@embed/cuda\n" in unit(made, 1)
    ready = {
        file.content
        for each in made.servers
        for file in each.helpers
        if file.path == server.GPU_UNIT_FILE
    }
    assert len(ready) == 1, "one file, which all of them agree on"
    assert f"{server.GPU_READY} 2 " in ready.pop()


def test_a_card_that_is_not_there_is_an_error() -> None:
    (found,) = plan(wanted({"server_gpu_devices": [2]}), TWO).errors
    assert found.code == "no-such-gpu"
    assert "0 (GeForce RTX 5090" in found.fix
    assert plan(wanted({"server_gpu_devices": [2]}), BARE).errors == ()


# Memory


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """13 GiB of weights."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    dims = Dimensions(
        "llama", layers=64, width=4096, feed_forward=11008, heads=32, heads_kv=32, head_size=128
    )
    write(path, dims, data=False)
    return shape_of(read_header(Bytes(path.read_bytes())))


def known(made: Settings, shapes: Iterable[Shape]) -> dict[str, Found]:
    return {name: Found(shape=shape) for name, shape in zip(instances(made), shapes, strict=True)}


SMALL = {"server_ctx_size": 512, "server_parallel": 1}


def test_what_fits_alone_may_not_fit_together(shape: Shape) -> None:
    probe = replace(BARE, memory_bytes=24 * GIB)
    for each in (settings(**SMALL), settings(**{**SMALL, **EMBED})):
        assert plan(each, probe, {"": Found(shape=shape)}).errors == ()
    both = wanted(**SMALL)
    (found,) = plan(both, probe, known(both, [shape, shape])).errors
    assert found.code == "model-too-large"
    assert found.cause.startswith("server_instances.embed: model: embed.gguf needs")
    assert "for other servers" in found.cause
    # One that cannot fit at all does not crowd out the others.
    huge = wanted({"server_ctx_size": 512, "server_parallel": 1}, server_ctx_size=10**9)
    (found,) = plan(huge, probe, known(huge, [shape, shape])).errors
    assert found.cause.startswith("model: model.gguf needs")
    roomy = replace(BARE, memory_bytes=48 * GIB)
    assert plan(both, roomy, known(both, [shape, shape])).errors == ()


def test_on_a_card_of_its_own_it_fits(shape: Shape) -> None:
    card_each = wanted({"server_gpu_devices": [1]}, server_gpu_devices=[0], **SMALL)
    assert plan(card_each, TWO, known(card_each, [shape, shape])).errors == ()
    shared = wanted({"server_gpu_devices": [1]}, server_gpu_devices=[1], **SMALL)
    (found,) = plan(shared, TWO, known(shared, [shape, shape])).errors
    assert "RTX 4090" in found.cause


@given(st.lists(st.sampled_from([None, (0,), (1,), (0, 1), (1, 0)]), min_size=1, max_size=4))
def test_nothing_is_given_out_twice(
    shape: Shape, given_cards: list[tuple[int, ...] | None]
) -> None:
    there: list[memory.Neighbour] = []
    for devices in given_cards:
        own = settings(**SMALL, server_gpu_devices=list(devices) if devices else None)
        found = memory.judge(own, TWO, shape, there)
        assert found is not None
        there.append((own, found))
    host = [found.shares[-1].memory.total for _, found in there]
    assert [found.shares[-1].place.taken for _, found in there] == [
        sum(host[:number]) for number in range(len(host))
    ]
    last, before = there[-1], there[:-1]
    for share, number in zip(last[1].shares, last[0].server_gpu_devices or (0, 1), strict=False):
        theirs = sum(
            other.memory.total + other.margin
            for own, found in before
            for other, its in zip(found.shares, own.server_gpu_devices or (0, 1), strict=False)
            if its == number and other.memory.total
        )
        assert share.place.taken == theirs


def test_what_serves_already_keeps_its_room(shape: Shape) -> None:
    """The one that is new has to find room beside it, whichever comes first in the settings."""
    both = wanted(**SMALL)
    probe = replace(with_release(WITH_COMPILER, both), memory_bytes=24 * GIB)
    embed = plan(both, probe).servers[1]
    there = service(
        digest=embed.digest,
        executable=f"/opt/llama.cpp/releases/{probe.current}/bin/llama-server",
    )
    files = {file.path: _there(file) for file in embed.files}
    serving = replace(
        probe, services={UNIT: there}, files=files, users=frozenset({"llama", "llamastead"})
    )
    made = plan(both, serving, known(both, [shape, shape]))
    assert made.servers[1].converged
    (found,) = made.errors
    assert found.cause.startswith("model: model.gguf needs")


def _there(file: server.FilePlan) -> ManagedFile:
    return ManagedFile(file.sha256, file.mode, "root", "root")


# One router for all


def routed(embed: dict[str, Any] | None = None, **data: Any) -> Settings:
    own = {name: value for name, value in EMBED.items() if name != "server_port"}
    return settings(
        server_router=True, server_instances={"embed": {**own, **(embed or {})}}, **data
    )


def preset(made: Plan) -> dict[str, dict[str, str]]:
    (one,) = made.servers
    (file,) = [file for file in one.own if file.path == server.PRESET]
    parser = ConfigParser(interpolation=None, strict=True, default_section="*")
    parser.read_string("[:]\n" + file.content)
    return {name: dict(parser[name]) for name in parser.sections() if name != ":"}


def test_a_router_serves_all_models_from_one_unit() -> None:
    made = plan(routed({"server_parallel": 2}, server_alias="chat", server_temperature=0.5))
    assert made.errors == ()
    (one,) = made.servers
    assert one.name == SERVER_UNIT
    words = " ".join(one.arguments)
    assert f"--models-preset {server.PRESET} --models-max 2" in words
    assert "--port 8080" in words
    assert not [word for word in one.arguments if word in {"--model", "--alias", "--temp"}]
    sections = preset(made)
    assert list(sections) == ["chat", "embed"]
    assert sections["chat"]["model"] == made.models[0].path
    assert sections["embed"]["model"] == made.models[1].path
    assert (sections["chat"]["temp"], sections["chat"]["parallel"]) == ("0.5", "4")
    assert (sections["embed"]["embedding"], sections["embed"]["parallel"]) == ("true", "2")
    assert all(section["load-on-startup"] == "true" for section in sections.values())
    assert not {"host", "port", "metrics"} & set(sections["chat"])
    assert [(each.model, each.purpose) for each in one.serves] == [
        ("chat", "generate"), ("embed", "embed"),
    ]  # fmt: skip
    assert "wait-healthy http://127.0.0.1:8080 2\n" in one.unit.content
    assert [decision for what, decision in rows(made) if what == "server"] == [
        "start llama-server at 127.0.0.1:8080, 4 x 4096 tokens, routing to chat, embed"
    ]


def test_extra_arguments_stand_in_the_preset_file_as_options() -> None:
    extra = ["--pooling", "mean", "--no-warmup", "--seed=-1", "-ub", "64", "--rope-scale", "-2"]
    section = preset(plan(routed({"server_extra_args": extra})))["embed"]
    told = {key: section[key] for key in ("pooling", "no-warmup", "seed", "ub", "rope-scale")}
    assert told == {
        "pooling": "mean", "no-warmup": "true", "seed": "-1", "ub": "64", "rope-scale": "-2",
    }  # fmt: skip


def test_what_changes_a_model_restarts_the_router() -> None:
    digests = {
        plan(made).servers[0].digest
        for made in (routed(), routed({"server_parallel": 1}), routed({"model_sha256": "a" * 64}))
    }
    assert len(digests) == 3


def test_units_of_instances_go_when_a_router_takes_over() -> None:
    probe = replace(BARE, services={SERVER_UNIT: service(), UNIT: service()})
    assert plan(routed(), probe).leftovers == (UNIT,)


@pytest.mark.parametrize(
    "own", [{"server_port": 8081}, {"server_host": "::1"}, {"server_gpu_devices": [0]}]
)
def test_what_the_router_has_once_no_model_has_of_its_own(own: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="with server_router one llama-server serves all"):
        routed(own)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"server_alias": "a:b"}, "the model's name 'a:b'"),
        ({"server_alias": "embed"}, "the model's name 'embed' twice"),
        (
            {"model": "/srv/a;b.gguf", "model_sha256": None, "server_alias": "ab"},
            "model '/srv/a;b.gguf'",
        ),
        ({"server_extra_args": ["--grammar", "x # y"]}, "grammar 'x # y'"),
        ({"server_extra_args": ["--grammar", ""]}, "grammar ''"),
    ],
)
def test_what_a_preset_file_cannot_hold_is_an_error(data: dict[str, Any], what: str) -> None:
    found = [each for each in plan(routed(**data)).errors if each.code == "router-preset"]
    assert what in found[0].cause


def test_a_llama_cpp_that_knows_no_router_is_an_error() -> None:
    old = with_release(WITH_COMPILER, routed())
    (found,) = plan(routed(), old).errors
    assert "--models-preset" in found.cause


@given(st.lists(st.sampled_from(["--a", "-b", "--no-c", "x", "-1", "--d=e", ""]), max_size=8))
def test_every_argument_reaches_a_router_in_its_order(extra: list[str]) -> None:
    text = server.preset_text(
        [_routed_with(["--first", *extra, "--last"])], on_gpu=False
    ).splitlines()
    keys = [line.partition(" = ")[0] for line in text if " = " in line]
    assert keys.index("first") < keys.index("last")
    assert len(keys) == len(set(keys))


def _routed_with(extra: list[str]) -> server.Routed:
    own = settings(server_extra_args=extra)
    model_plan = plan(own).models[0]
    return server.Routed("", own, model_plan)
