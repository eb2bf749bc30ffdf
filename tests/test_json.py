"""JSON of users' files: what is there twice, or is of another type than it should be, is refused by name."""

import json
from pathlib import Path

import pytest

from fewstep.data.prompts import find_prompts
from fewstep.reading import json_of


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^it has the key 'a' twice$"):
        json_of('{"b": 1, "a": 2, "a": 3}')
    assert json_of('{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}


def test_a_prompt_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "red cat"}) + '\n{"prompt": "cat", "prompt": "dog"}\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON \(it has the key 'prompt' twice\); correct it"):
        find_prompts(str(file))
