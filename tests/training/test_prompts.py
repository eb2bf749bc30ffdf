"""Prompts from every kind of file, mistakes named; embeddings made once."""

from pathlib import Path

import pytest
import torch

from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import EDM
from fewstep.training.prompts import Embeddings, embed, read_prompts

from .. import tiny

THREE = ["red cat", "blue dog, wet", "grün"]


def file(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "red cat\nblue dog, wet\ngrün\n"),
        ("p.txt", "  red cat \r\n\r\nblue dog, wet\r\ngrün\r\nred cat\r\n"),
        ("p.txt", "\ufeffred cat\nblue dog, wet\ngrün"),
        ("p.jsonl", '{"prompt": "red cat"}\n{"prompt": "blue dog, wet", "id": 3}\n\n{"prompt": "grün"}\n{"prompt": null}\n'),
        ("p.jsonl", '"red cat"\n"blue dog, wet"\n"gr\\u00fcn"\n'),
        ("p.jsonl", '{"text": "red cat"}\n{"text": "blue dog, wet"}\n{"text": "grün"}\n'),
        ("p.csv", 'id,caption\n1,red cat\n2,"blue dog, wet"\n3,grün\n4,\n5,red cat\n'),
        ("p.csv", '\ufeffprompt,id\r\nred cat,1\r\n"blue dog, wet",2\r\ngrün,3\r\n'),
        ("p.tsv", "prompt\tid\nred cat\t1\nblue dog, wet\t2\ngrün\t3\n"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    assert read_prompts(file(tmp_path, name, text)) == THREE


def test_lines_within_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(file(tmp_path, "p.csv", 'prompt,id\n"a cat\non a mat",1\nb,2\n')) == ["a cat\non a mat", "b"]
    assert read_prompts(file(tmp_path, "p.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')) == ["a\u2028b", "c"]


def test_a_named_column_comes_before_the_usual_ones(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", "prompt,title\na,b\n")
    assert read_prompts(path) == ["a"]
    assert read_prompts(path, "title") == ["b"]


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl"])
@pytest.mark.parametrize("column", [None, "captions"])
def test_a_wrong_column_lists_the_columns(tmp_path: Path, name: str, column: str | None) -> None:
    text = {"p.csv": "url,alt\na,b\n", "p.tsv": "url\talt\na\tb\n", "p.jsonl": '{"url": "a", "alt": "b"}\n'}[name]
    with pytest.raises(
        ValueError, match=rf"p\..*has no column {column or 'prompt or caption or text'}; it has url, alt; pass --set prompts\.column=NAME$"
    ):
        read_prompts(file(tmp_path, name, text), column)


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", ""), ("p.txt", " \n\n"), ("p.csv", ""), ("p.csv", "prompt\n"), ("p.jsonl", "\n"), ("p.tsv", "prompt\n \n")]
)
def test_nothing_in_it(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts: .*{name} has no prompt in it; write one a line"):
        read_prompts(file(tmp_path, name, text))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv"])
def test_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts: cannot read .*{name} \(No such file or directory\); pass a \.txt"):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("source", ["prompts", "p.parquet", "a/b/c.txt2", "./a/b", "a b/c", ""])
def test_no_kind_of_source(source: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are a \.txt, \.jsonl, \.csv or \.tsv file, or a hub data set id"):
        read_prompts(source)


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts: .*p\.jsonl, line 2 is not JSON"):
        read_prompts(file(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": \n'))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 2\); save it as UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))


def counted() -> tuple[Denoiser, tiny.Labels]:
    backbone = tiny.denoiser()
    assert isinstance(backbone.conditions, tiny.Labels)
    return backbone, backbone.conditions


def equal(a: Embeddings, b: Embeddings) -> bool:
    return all(torch.equal(a.cond[k], b.cond[k]) and torch.equal(a.null[k], b.null[k]) for k in (*a.cond, *a.null, *b.cond))


def test_conditions_are_encoded_once_and_in_order(tmp_path: Path) -> None:
    backbone, labels = counted()
    first = embed(backbone, THREE, tmp_path / "cache", "base", chunk=2)
    assert labels.encoded == 3 + 1  # and the empty prompt
    assert (first.encoded, first.count) == (3, 3)
    assert torch.equal(first.cond["label"], backbone.encode(THREE)["label"])
    assert first.null["label"].tolist() == [[0, 0, 0]]
    labels.encoded = 0
    second = embed(backbone, THREE, tmp_path / "cache", "base")
    assert labels.encoded == second.encoded == 0
    assert equal(first, second)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("prompts", "identity"), [(THREE, "other base"), (THREE[::-1], "base"), (THREE[:2], "base")])
def test_another_encoder_or_other_prompts_are_encoded_anew(tmp_path: Path, prompts: list[str], identity: str) -> None:
    backbone, labels = counted()
    first = embed(backbone, THREE, tmp_path, "base")
    labels.encoded = 0
    second = embed(backbone, prompts, tmp_path, identity)
    assert labels.encoded == len(prompts) + 1
    assert first.key != second.key
    assert torch.equal(second.cond["label"], backbone.encode(prompts)["label"])


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.9])
def test_a_truncated_cache_is_made_again(tmp_path: Path, keep: float) -> None:
    backbone, labels = counted()
    first = embed(backbone, THREE, tmp_path, "base")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()  # `first` still reads the old file
    path.write_bytes(whole[: int(len(whole) * keep)])
    labels.encoded = 0
    second = embed(backbone, THREE, tmp_path, "base")
    assert labels.encoded == 4
    assert equal(first, second)
    assert path.read_bytes() == whole


def test_without_a_cache_nothing_is_written_and_without_conditions_nothing_is_needed(tmp_path: Path) -> None:
    backbone, _ = counted()
    assert embed(backbone, THREE, None, "base").encoded == 3
    unconditional = embed(Denoiser(torch.nn.Linear(2, 2), EDM(), (2,)), THREE, tmp_path / "cache", "base")
    assert unconditional.draw(5, torch.Generator(), torch.device("cpu")) == {}
    assert unconditional.unconditional(torch.device("cpu")) == {}
    assert not (tmp_path / "cache").exists()


def test_prompts_are_drawn_evenly_and_by_their_generator() -> None:
    backbone, _ = counted()
    data = embed(backbone, THREE, None, "base")
    drawn = data.draw(3000, torch.Generator().manual_seed(0), torch.device("cpu"))["label"]
    for row in data.cond["label"]:
        share = (drawn == row).all(1).float().mean().item()
        assert abs(share - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5
    again = data.draw(3000, torch.Generator().manual_seed(0), torch.device("cpu"))["label"]
    assert torch.equal(drawn, again)
