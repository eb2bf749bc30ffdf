"""Prompts from every kind of file, mistakes named; embeddings made once."""

import csv
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewstep.atomic import write_tensors
from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import EDM
from fewstep.data.prompts import Embeddings, embed, embedding_bytes, find_prompts, read_prompts
from fewstep.data.texts import text_of

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
        (
            "p.jsonl",
            '{"prompt": "red cat"}\n{"prompt": "blue dog, wet", "id": 3}\n\n{"prompt": "grün"}\n{"prompt": null}\n',
        ),
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
        ValueError,
        match=rf"p\..*has no column {column or 'prompt or caption or text'}; it has url, alt; "
        r"pass --set prompts\.column=NAME$",
    ):
        read_prompts(file(tmp_path, name, text), column)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", ""),
        ("p.txt", " \n\n"),
        ("p.csv", ""),
        ("p.csv", "prompt\n"),
        ("p.jsonl", "\n"),
        ("p.tsv", "prompt\n \n"),
    ],
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
    return all(
        torch.equal(a.cond[k][:], b.cond[k][:]) and torch.equal(a.null[k], b.null[k])
        for k in (*a.cond, *a.null, *b.cond)
    )


def test_conditions_are_encoded_once_and_in_order(tmp_path: Path) -> None:
    backbone, labels = counted()
    first = embed(backbone, THREE, tmp_path / "cache", "base", chunk=2)
    assert labels.encoded == 3 + 1  # and the empty prompt
    assert (first.encoded, first.count) == (3, 3)
    assert torch.equal(first.cond["label"][:], backbone.encode(THREE)["label"])
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
    assert torch.equal(second.cond["label"][:], backbone.encode(prompts)["label"])


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
    for row in data.cond["label"][:]:
        share = (drawn == row).all(1).float().mean().item()
        assert abs(share - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5
    again = data.draw(3000, torch.Generator().manual_seed(0), torch.device("cpu"))["label"]
    assert torch.equal(drawn, again)


@pytest.mark.parametrize(
    ("name", "data", "prompts"),
    [
        ("p.TXT", "a\r\nb\u2028still b\x0bstill\x85\n\n\u200b\n", ["a", "b\u2028still b\x0bstill"]),
        ("p.txt", "a\nü".encode("utf-16"), ["a", "ü"]),
        ("p.csv", b"\xfe\xff" + "id,prompt\n1,ü\n".encode("utf-16-be"), ["ü"]),
        ("p.CSV", "Prompt , id\nx,1\n2\n,3\n", ["x", "2"]),
        ("p.tsv", 'id\tcaption\n1\t"a ""b"", c"\n', ['a "b", c']),
        ("p.jsonl", '{"prompt": ["a", "b"]}\n["c", null]\n{"caption": "d"}\n{"prompt": NaN}\n', ["a", "b", "c", "d"]),
    ],
)
def test_files_as_programs_write_them(tmp_path: Path, name: str, data: str | bytes, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", 'prompt,id\n"a cat,1\nb,2\nc,3\n', "line 2: unexpected end of data"),
        ("p.csv", "prompt\na cat\nb, sitting\n", "line 3 has 2 columns, its header 1"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns prompt"),
        ("p.csv", f"prompt\n{'x' * 200_000}\n", "line 2: field larger"),
        ("p.tsv", 'prompt\n"a" b\n', "line 2: "),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n', "line 2 has 7 where a text belongs"),
        ("p.jsonl", '{"prompt": {"en": "a"}}\n', "line 1 has an object where a text belongs"),
        ("p.jsonl", '{"prompt": [["a"]]}\n', "line 1 has a list where a text belongs"),
        ("p.jsonl", '{"prompt": "a"}\n{"url": "b"}\n', "line 2 has no column prompt or caption or text; it has url"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', r"half a character or a zero byte in its text \(\\ud800\)"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON .nested too deeply"),
        ("p.txt", "a\rb\rc", "line 1 has a carriage return"),
        ("p.txt", "a\n\0", "zero bytes"),
        ("p.txt", "x" * 5_000_000, "line 1 has a text of 5,000,000 characters"),
        ("p.txt", "\u200b\n\u3000\n\ufeff\n", "has no prompt in it"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^prompts: [^\n]*{said}[^\n]*$"):
        read_prompts(file(tmp_path, name, text))


def test_only_files_are_read_and_names_are_printed_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, kind in (("folder.txt", "folder"), ("pipe.txt", "pipe or a device")):
        with pytest.raises(ValueError, match=rf"{name} is a {kind}, not a file; pass a \.txt"):
            read_prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"prompts: [^\n\x1b]*\\x1b\[31mred\\n\.txt has no prompt"):
        read_prompts(file(tmp_path, "\x1b[31mred\n.txt", ""))


def test_what_was_found_is_said(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", "id,prompt\n1,a\n2,b\n3,a\n4,\n")
    assert find_prompts(path)[1].line == f"2 prompts in {path}: 1 empty, 1 repeated"


def test_a_data_set_of_the_hub_by_any_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dots are part of names; lists of captions are captions; columns that hold images are left alone."""

    class Data:
        column_names = ("image", "caption")

        def select_columns(self, names: list[str]) -> dict[str, list[object]]:
            assert names == ["caption"]
            return {"caption": ["a cat", ["a dog", "one dog"], None]}

    def load_dataset(name: str, split: str) -> Data:
        if name != "owner/photos-v1.2":
            raise ConnectionError("no such\nthing")
        return Data()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("owner/photos-v1.2") == ["a cat", "a dog", "one dog"]
    with pytest.raises(
        ValueError, match=r"^prompts: data set owner/other cannot be loaded \(no such\); check its name"
    ):
        read_prompts("owner/other")


TEXT = st.text("aü #,;\"'\t\u2028\x85\u200b\ufeff日\U0001f680", max_size=12)


@given(texts=st.lists(TEXT, min_size=1, max_size=6))
def test_every_text_comes_back_from_every_kind_of_file(texts: list[str]) -> None:
    wanted = list(dict.fromkeys(t for t in (text_of(t, "") for t in texts) if t))
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"p.{kind}" for kind in ("txt", "jsonl", "csv")]
        paths[0].write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")
        paths[1].write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts), encoding="utf-8")
        with paths[2].open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([["id", "prompt"], *enumerate(texts)])
        for path in paths:
            if wanted:
                assert read_prompts(str(path)) == wanted
            else:
                with pytest.raises(ValueError, match="has no prompt in it"):
                    read_prompts(str(path))


@given(data=st.binary(max_size=60), kind=st.sampled_from(["txt", "jsonl", "csv", "tsv"]))
def test_bytes_are_prompts_or_one_line(data: bytes, kind: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"p.{kind}"
        path.write_bytes(data)
        said, found = "", ["nothing"]
        try:
            found = read_prompts(str(path))
        except ValueError as error:
            said = str(error)
        assert all(p.strip() for p in found)
        assert not said or (said.startswith("prompts: ") and said.isprintable())


def test_a_cache_that_holds_something_else_is_made_again(tmp_path: Path) -> None:
    """Whole files of other keys, of fewer rows, of another width."""
    backbone, _ = counted()
    first = embed(backbone, THREE, tmp_path, "base")
    (path,) = tmp_path.iterdir()
    whole = load_file(path)
    rows, lengths = "cond.label.000000000", "lengths.label.000000000"
    cases: list[dict[str, torch.Tensor]] = [
        {"x": torch.zeros(3)},
        {rows: whole[rows]},
        {**whole, rows: whole[rows][:2]},
        {**whole, lengths: whole[lengths][:2]},
        {**whole, "null.label": torch.zeros(1, 4)},
        {**whole, "null.label": whole["null.label"].half()},
    ]
    for tensors in cases:
        write_tensors(path, tensors)
        assert equal(embed(backbone, THREE, tmp_path, "base"), first)


def test_the_size_is_said_and_the_room_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, labels = counted()
    many, told = [f"prompt {i}" for i in range(200)], []
    embed(backbone, many, tmp_path / "cache", "base", keep=lambda path, size: told.append((path.exists(), size)))
    (path,) = (tmp_path / "cache").iterdir()
    taken = sum(t.nbytes for t in load_file(path).values())
    ((there, said),) = told
    assert not there and said == pytest.approx(path.stat().st_size, rel=0.1)
    assert embedding_bytes(backbone, many) == pytest.approx(taken, rel=0.1)
    assert path.stat().st_size < taken + 6000
    path.unlink()
    labels.encoded = 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"^cannot write .*: it takes 0\.0 GiB, 0\.0 GiB are free there; free some space"):
        embed(backbone, many, tmp_path / "cache", "base")
    assert labels.encoded <= 64 + 1
    assert list((tmp_path / "cache").iterdir()) == []
