"""Which files of a repository are the model: names as people really give them."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.rules.hub_files import (
    QUALITY,
    Candidate,
    ChoiceError,
    HubFile,
    HubModel,
    Reference,
    candidates,
    first_that_fits,
    in_order_of_trial,
    is_model,
    is_poor,
    parse_reference,
    projector,
    quant_of,
    rank,
    select,
    select_source,
    source_names,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def file(path: str, size: int = 1000, sha256: str | None = "") -> HubFile:
    if sha256 == "":
        sha256 = hashlib.sha256(path.encode()).hexdigest()
    return HubFile(path, size, sha256, f"https://hub/user/repo/resolve/{COMMIT}/{path}")


def files(*paths: str) -> list[HubFile]:
    return [file(path) for path in paths]


def parts(stem: str, count: int, leave_out: int = 0) -> list[HubFile]:
    numbers = [number for number in range(1, count + 1) if number != leave_out]
    return files(*(f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in numbers))


def chosen(text: str, repository: list[HubFile]) -> str:
    return select(parse_reference(text), repository)[0].files[0].path


def refused(text: str, repository: list[HubFile]) -> tuple[str, str]:
    with pytest.raises(ChoiceError) as caught:
        select(parse_reference(text), repository)
    assert "\n" not in str(caught.value)
    return caught.value.finding.code, str(caught.value)


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ggml-org/gemma-3-4b-it-GGUF", Reference("ggml-org/gemma-3-4b-it-GGUF")),
        ("user/repo:Q4_K_M", Reference("user/repo", quant="Q4_K_M")),
        ("user/repo:UD-Q8_K_XL", Reference("user/repo", quant="UD-Q8_K_XL")),
        ("user/repo/file.gguf", Reference("user/repo", file="file.gguf")),
        ("user/repo/BF16/a-00001-of-00002.gguf", None),
        ("bartowski/Qwen_Qwen3-8B-GGUF:q4_0", None),
    ],
)
def test_a_reference_is_read_and_written(text: str, expected: Reference | None) -> None:
    found = parse_reference(text)
    assert expected in (None, found)
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "user/repo"),
        ("repo", "user/repo"),
        ("user/repo:", "user/repo"),
        ("user/repo@main:Q4_K_M", "revision is a setting of its own"),
        ("user/repo/model.safetensors", "no .gguf file"),
        ("user/repo/../../x.gguf", "no path inside"),
        ("user/repo//x.gguf", "no path inside"),
        ("https://huggingface.co/user/repo", "user/repo"),
        ("/srv/models/x.gguf", "user/repo"),
        ("./x.gguf", "user/repo"),
        ("user/repo:Q4_K_M:Q8_0", "user/repo"),
        ("user/repo x", "user/repo"),
        ("-user/repo", "user/repo"),
    ],
)
def test_what_is_no_reference_is_told_what_one_looks_like(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_reference(text)


@given(st.text())
def test_any_text_is_a_reference_or_a_value_error(text: str) -> None:
    try:
        found = parse_reference(text)
    except ValueError:
        return
    assert str(found) == text


# Names


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-2-7b.Q4_K_S.gguf", "Q4_K_S"),
        ("tinyllama-1.1b-chat-v1.0.Q8_0.gguf", "Q8_0"),
        ("qwen2.5-0.5b-instruct-q4_0.gguf", "Q4_0"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("gemma-3-4b-it-BF16.gguf", "BF16"),
        ("Qwen3-8B-UD-Q8_K_XL.gguf", "UD-Q8_K_XL"),
        ("Qwen3-8B-UD-IQ1_S.gguf", "UD-IQ1_S"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Model-NVFP4.gguf", "NVFP4"),
        ("Mixtral-8x7B-IQ4_XS.gguf", "IQ4_XS"),
        ("Mixtral-8x7B-IQ3_XXS.gguf", "IQ3_XXS"),
        ("Model-IQ4_NL.gguf", "IQ4_NL"),
        ("Model-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("Model-Q6_K_L.gguf", "Q6_K_L"),
        ("BitNet-TQ1_0.gguf", "TQ1_0"),
        ("Q4_K_M/DeepSeek-V3-Q4_K_M-00001-of-00009.gguf", "Q4_K_M"),
        ("BF16/DeepSeek-V3-00001-of-00030.gguf", "BF16"),
        ("UD-Q2_K_XL/DeepSeek-R1-00001-of-00005.gguf", "UD-Q2_K_XL"),
        ("ggml-model-f16.gguf", "F16"),
        ("model-F32.gguf", "F32"),
        ("model_Q5_1.gguf", "Q5_1"),
        ("SQ4_0-model.gguf", None),
        ("model.gguf", None),
        ("Q4-something.gguf", None),
        ("if16.gguf", None),
    ],
)
def test_the_quantisation_stands_in_the_name(path: str, quant: str | None) -> None:
    assert quant_of(path) == quant


def test_the_order_of_quality() -> None:
    names = ["Q2_K", "Q8_0", "IQ4_XS", "UD-Q4_K_XL", "Q4_K_M", "Q5_K_S", "F16", "IQ1_S", "Q4_K_XL"]
    assert sorted(names, key=rank) == [
        "F16",
        "Q8_0",
        "Q5_K_S",
        "UD-Q4_K_XL",
        "Q4_K_XL",
        "Q4_K_M",
        "IQ4_XS",
        "Q2_K",
        "IQ1_S",
    ]
    assert len(set(QUALITY)) == len(QUALITY)


def test_an_unknown_quantisation_is_last_among_those_of_its_bits() -> None:
    assert rank("Q4_0") < rank("Q4_0_4_4") < rank("Q3_K_XL")
    assert rank("Q5_0") < rank("IQ5_KS") < rank("Q4_K_XL")
    assert rank("IQ1_S") < rank(None)


@pytest.mark.parametrize(
    ("quant", "poor"),
    [("Q4_K_M", False), ("Q3_K_M", False), ("Q3_K_S", True), ("IQ2_M", True), (None, False)],
)
def test_what_is_poor(quant: str | None, poor: bool) -> None:
    assert is_poor(quant) is poor


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model-Q4_K_M.gguf", True),
        ("MODEL.GGUF", True),
        ("mmproj-model-f16.gguf", False),
        ("gemma-3-4b-it-mmproj-BF16.gguf", False),
        ("imatrix.gguf", False),
        ("Qwen3-8B-imatrix.gguf", False),
        ("mtp-model-Q8_0.gguf", False),
        ("eagle3-model-Q8_0.gguf", False),
        ("model.safetensors", False),
        ("README.md", False),
        ("model.gguf.part1of2", False),
    ],
)
def test_what_stands_beside_a_model_is_none(path: str, expected: bool) -> None:
    assert is_model(path) is expected


# Parts


def test_parts_come_whole_and_in_order() -> None:
    repository = [*reversed(parts("Q8_0/Big-Q8_0", 12)), *files("Big-Q4_K_M.gguf")]
    [big, small] = candidates(repository)
    assert [each.path[-20:] for each in big.files] == [
        f"-{number:05d}-of-00012.gguf" for number in range(1, 13)
    ]
    assert (big.quant, big.missing, big.size) == ("Q8_0", (), 12_000)
    assert small.quant == "Q4_K_M"


def test_a_missing_part_is_an_error_that_names_it() -> None:
    repository = parts("Big-Q8_0", 3, leave_out=2)
    code, said = refused("user/repo:Q8_0", repository)
    assert code == "model-incomplete"
    assert "lacks part 2 of Q8_0" in said
    code, _ = refused("user/repo", repository)
    assert code == "model-incomplete"


def test_a_bare_repository_passes_over_what_is_incomplete() -> None:
    repository = [*parts("Big-Q8_0", 3, leave_out=2), *files("Big-Q4_K_M.gguf")]
    assert chosen("user/repo", repository) == "Big-Q4_K_M.gguf"


def test_any_part_means_the_whole() -> None:
    repository = parts("Big-Q8_0", 3)
    [found] = select(parse_reference("user/repo/Big-Q8_0-00002-of-00003.gguf"), repository)
    assert len(found.files) == 3


def test_an_absurd_count_of_parts_is_no_list_of_that_length() -> None:
    [found] = candidates(files("Big-Q8_0-00001-of-99999.gguf"))
    assert len(found.missing) == 999


def test_part_zero_is_none() -> None:
    [found] = candidates(files("a-00000-of-00001.gguf"))
    assert found.missing == (1,)
    assert found.files


# Choice


def test_an_exact_name_is_not_swallowed_by_a_longer_one() -> None:
    repository = files("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q4_K.gguf", "m-Q4_K_L.gguf")
    assert chosen("user/repo:Q4_K", repository) == "m-Q4_K.gguf"
    assert chosen("user/repo:q4_k_s", repository) == "m-Q4_K_S.gguf"


@pytest.mark.parametrize(
    ("wanted", "paths", "expected"),
    [
        ("Q4_K", ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf"), "m-Q4_K_M.gguf"),
        ("Q4_K", ("m-Q4_K_S.gguf", "m-Q8_0.gguf"), "m-Q4_K_S.gguf"),
        ("Q4_K_XL", ("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"), "m-UD-Q4_K_XL.gguf"),
        ("Q4_K_M", ("m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"), "m-Q4_K_M.gguf"),
        ("ud-q4_k_m", ("m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"), "m-UD-Q4_K_M.gguf"),
        ("MXFP4", ("m-MXFP4_MOE.gguf", "m-Q8_0.gguf"), "m-MXFP4_MOE.gguf"),
        ("fp16", ("m-F16.gguf", "m-BF16.gguf"), "m-F16.gguf"),
        ("F16", ("m-bf16.gguf", "m-fp16.gguf"), "m-fp16.gguf"),
        ("distilled", ("m-distilled-Q8_0.gguf", "m-Q8_0.gguf"), "m-distilled-Q8_0.gguf"),
    ],
)
def test_what_a_quantisation_means(wanted: str, paths: tuple[str, ...], expected: str) -> None:
    assert chosen(f"user/repo:{wanted}", files(*paths)) == expected
    assert chosen(f"user/repo:{wanted}", files(*reversed(paths))) == expected


def test_a_quantisation_that_is_not_there_lists_those_that_are() -> None:
    repository = files("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf")
    code, said = refused("user/repo:Q6_K", repository)
    assert code == "no-such-quant"
    assert "has no Q6_K" in said
    assert "It has Q8_0, Q4_K_M." in said


def test_only_whole_words_count() -> None:
    assert chosen("user/repo:Q4", files("m-Q4_K_M.gguf", "m-Q8_0.gguf")) == "m-Q4_K_M.gguf"
    assert refused("user/repo:8_0", files("m-Q8_0.gguf"))[0] == "no-such-quant"
    assert refused("user/repo:Q4", files("m-SQ4_0.gguf"))[0] == "no-such-quant"


def test_two_models_of_one_quantisation_are_told_apart_by_their_files() -> None:
    repository = files("a-Q8_0.gguf", "b-Q8_0.gguf")
    code, said = refused("user/repo:Q8_0", repository)
    assert code == "ambiguous-quant"
    assert "a-Q8_0.gguf, b-Q8_0.gguf" in said
    assert chosen("user/repo/b-Q8_0.gguf", repository) == "b-Q8_0.gguf"


def test_an_ambiguous_half_is_told() -> None:
    code, _ = refused("user/repo:Q4_K", files("m-Q4_K_S.gguf", "m-Q4_K_L.gguf"))
    assert code == "ambiguous-quant"


def test_a_file_that_is_not_there() -> None:
    code, said = refused("user/repo/x.gguf", files("m-Q8_0.gguf"))
    assert code == "no-such-file"
    assert "m-Q8_0.gguf" in said


def test_a_repository_without_gguf() -> None:
    code, said = refused("user/repo", files("model.safetensors", "config.json"))
    assert code == "no-gguf"
    assert "only safetensors" in said
    assert refused("user/repo:Q8_0", [])[0] == "no-gguf"
    assert refused("user/repo", files("mmproj-F16.gguf"))[0] == "no-gguf"


def test_without_a_sha256_there_is_no_download() -> None:
    code, said = refused("user/repo:Q8_0", [file("m-Q8_0.gguf", sha256=None)])
    assert code == "no-sha256"
    assert "model_sha256" in said
    repository = [file("m-Q8_0.gguf", sha256=None), file("m-Q4_0.gguf")]
    assert chosen("user/repo", repository) == "m-Q4_0.gguf"


# The best that fits


SIZES = {"BF16": 16, "F32": 32, "Q8_0": 8, "Q6_K": 6, "Q4_K_M": 4, "Q2_K": 2}


def trial() -> tuple[Candidate, ...]:
    repository = [file(f"m-{quant}.gguf", size) for quant, size in SIZES.items()]
    return select(parse_reference("user/repo"), repository)


def test_what_nobody_could_tell_apart_is_tried_last() -> None:
    labels = [each.label for each in trial()]
    assert labels == ["Q8_0", "Q6_K", "Q4_K_M", "Q2_K", "BF16", "F32"]


def test_the_best_that_fits_and_what_else_there_was() -> None:
    ranking = first_that_fits(trial(), lambda each: each.size <= 5)
    assert ranking.chosen is not None
    assert ranking.chosen.label == "Q4_K_M"
    assert [each.label for each in ranking.too_large] == ["Q8_0", "Q6_K"]
    assert [each.label for each in ranking.runners_up] == ["Q2_K", "BF16", "F32"]


def test_nothing_fits() -> None:
    ranking = first_that_fits(trial(), lambda _: False)
    assert ranking.chosen is None
    assert len(ranking.too_large) == len(SIZES)


def test_only_what_is_more_than_ample_is_there() -> None:
    repository = files("m-BF16.gguf")
    assert chosen("user/repo", repository) == "m-BF16.gguf"


# Projectors


def test_the_projector_comes_alongside() -> None:
    repository = files("m-Q8_0.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf")
    [model] = candidates(repository)
    found = projector(model, repository)
    assert found is not None
    assert found.path == "mmproj-F16.gguf"


def test_the_nearest_projector_is_the_right_one() -> None:
    repository = files(
        "a/m-Q8_0.gguf", "b/mmproj-F16.gguf", "a/mmproj-BF16.gguf", "mmproj-F16.gguf"
    )
    [model] = candidates(repository)
    found = projector(model, repository)
    assert found is not None
    assert found.path == "a/mmproj-BF16.gguf"


def test_another_models_projector_is_not_taken() -> None:
    repository = files("a/m-Q8_0.gguf", "b/mmproj-F16.gguf")
    [model] = candidates(repository)
    assert projector(model, repository) is None


# What is kept on a host


def test_a_model_is_kept_as_one_line() -> None:
    repository = [*parts("Big-Q8_0", 2), *files("mmproj-F16.gguf")]
    [model] = candidates(repository)
    kept = HubModel(
        Reference("user/repo", quant="Q8_0"), COMMIT, False, model, projector(model, repository)
    )
    assert "\n" not in kept.as_json()
    assert HubModel.from_json(kept.as_json()) == kept
    assert [each.path for each in kept.files] == [
        "Big-Q8_0-00001-of-00002.gguf",
        "Big-Q8_0-00002-of-00002.gguf",
        "mmproj-F16.gguf",
    ]
    assert kept.first.path == "Big-Q8_0-00001-of-00002.gguf"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"commit": 1}'])
def test_what_was_damaged_is_not_believed(text: str) -> None:
    assert HubModel.from_json(text) is None


@given(
    st.lists(
        st.from_regex(
            r"([a-z]{1,3}/)?[a-zA-Z0-9._-]{1,20}(-0000\d-of-0000\d)?\.gguf", fullmatch=True
        )
    )
)
def test_any_names_are_grouped_without_losing_one(paths: list[str]) -> None:
    repository = files(*dict.fromkeys(paths))
    grouped = [each.path for group in candidates(repository) for each in group.files]
    assert set(grouped) <= {each.path for each in repository}
    assert len(in_order_of_trial(candidates(repository))) == len(candidates(repository))
    for group in candidates(repository):
        assert group.files


# What a quantisation is made from

TOKENIZED = ("config.json", "tokenizer.json")
WHOLE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", *TOKENIZED)


def source(text: str, *paths: str) -> list[str]:
    return [each.path for each in select_source(parse_reference(text), files(*paths)).files]


def no_source(text: str, *paths: str) -> str:
    with pytest.raises(ChoiceError) as caught:
        source(text, *paths)
    return caught.value.finding.code


def test_a_gguf_that_nothing_was_taken_from_spares_the_conversion() -> None:
    ggufs = ("m-F32.gguf", "m-F16.gguf", "m-BF16.gguf", "m-Q8_0.gguf")
    assert source("user/repo", *WHOLE, *ggufs) == ["m-BF16.gguf"]
    assert source("user/repo", *ggufs[:2]) == ["m-F16.gguf"]
    assert source("user/repo:F32", *ggufs) == ["m-F32.gguf"]
    assert source("user/repo/m-F16.gguf", *ggufs) == ["m-F16.gguf"]


def test_of_weights_come_those_that_are_converted_with_what_belongs_to_them_and_no_code() -> None:
    beside = ("merges.txt", "vocab.json", "chat_template.jinja", "1_Pooling/config.json")
    others = (
        *("modeling_x.py", "consolidated.safetensors", "README.md", "LICENSE.txt", "a.bin"),
        *("onnx/model.onnx", "original/params.json", "adapter_model.safetensors"),
    )
    assert set(source("user/repo", *WHOLE, *beside, *others)) == {*WHOLE, *beside}


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        (WHOLE[1:], "model-incomplete"),
        (("model.safetensors", "tokenizer.json"), "no-config"),
        (("model.safetensors", "config.json"), "no-tokenizer"),
        (("m-Q4_K_M.gguf", "README.md"), "requantising"),
        (("README.md", "pytorch_model.bin"), "no-source"),
    ],
)
def test_what_cannot_be_quantised_is_said(paths: tuple[str, ...], code: str) -> None:
    assert no_source("user/repo", *paths) == code


def test_what_is_quantised_is_not_quantised_again() -> None:
    assert no_source("user/repo:Q8_0", "m-Q8_0.gguf", "m-F16.gguf") == "requantising"


@given(st.lists(st.text("/abmodel-0123456789.sfetnrjin", max_size=40), max_size=20))
def test_whatever_lies_there_only_what_is_there_is_taken(names: list[str]) -> None:
    with suppress(ChoiceError):
        assert set(source_names("x", names)) <= set(names)
