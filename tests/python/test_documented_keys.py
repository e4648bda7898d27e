"""Every key of the train part of proto/itwin/v1/spec.proto is explained in docs/training.md or docs/models.md."""
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def train_fields():
    """{message.field} of TrainSpec and of the messages that it leads to."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "proto/itwin/v1/spec.proto").read_text())
    text = re.sub(r"\s+", " ", text)
    messages = {}
    for start in re.finditer(r"\bmessage (\w+) \{", text):
        depth, end = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body = re.sub(r"\[[^\]]*\]", "", text[start.end():end - 1])
        messages[start[1]] = re.findall(r"(?:optional |repeated )?([\w.]+) (\w+) = \d+ ?;", body)
    found, todo = set(), ["TrainSpec"]
    seen = set(todo)
    while todo:
        message = todo.pop()
        for kind, name in messages[message]:
            found.add(f"{message}.{name}")
            if kind in messages and kind not in seen:
                seen.add(kind)
                todo.append(kind)
    return found


def undocumented(fields, documents):
    """Fields whose name occurs as a word nowhere in backticks: neither `so` nor in an example of YAML."""
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", documents, re.S))
    words = set(re.findall(r"\w+", code))
    return sorted(field for field in fields if field.split(".")[1] not in words)


def test_every_key_of_a_training_is_in_the_documents():
    fields = train_fields()
    assert {"TrainSpec.epochs", "IdxFiles.test_labels", "LossScale.hysteresis", "Reshape.shape", "Clip.max"} <= fields
    documents = "".join((ROOT / "docs" / name).read_text() for name in ("training.md", "models.md"))
    assert undocumented(fields, documents) == []


def test_a_key_that_nobody_explains_is_named():
    assert undocumented({"A.epochs", "B.hidden_key"}, "Say `epochs: 3`; hidden_key is in no code.") == ["B.hidden_key"]
