"""Publishing a memory: model card, upload and download, against a hub on this machine; and what is refused."""

import json
import re
import sys

import pytest
import torch

from ahn_layers import (
    GatedDeltaNet,
    SalientSlots,
    adapter_card,
    load_adapter,
    memory_report,
    push_adapter,
    retrofit,
    save_adapter,
)
from ahn_layers.card import MARK, state_bytes

from .fake_hub import fake_hub
from .test_adapter import make, plain, same, weights

BASE = "somebody/small-model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path) as found:
        yield found


def front_matter(card):
    yaml = pytest.importorskip("yaml")
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_model_is_published_and_loaded_again(hub, capsys):
    model = make(memory_positions="none")
    url = push_adapter(model, "me/memory", base_model=BASE, license="apache-2.0", private=True)
    assert "/me/memory/commit/" in url and hub.private == {"me/memory"}
    files = hub.repos["me/memory"]["main"]
    assert sorted(files) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert json.loads(files["adapter.json"])["base_model"] == BASE

    files |= {"training_args.bin": b"pickled", "checkpoints/model.safetensors": b"large"}
    other = load_adapter(plain(), "me/memory")
    assert same(weights(other), weights(model))
    assert other.hippocampus.memory_positions == "none"
    assert set(hub.requested) == {"adapter.json", "adapter.safetensors"}


def test_the_card_says_what_the_hub_and_the_reader_need(hub):
    model = make(shared_state=True)
    push_adapter(model, "me/memory", base_model=BASE, license="mit")
    card = hub.repos["me/memory"]["main"]["README.md"].decode()
    found = front_matter(card)
    assert found["base_model"] == BASE and found["license"] == "mit" and found["library_name"] == "ahn_layers"
    assert found["base_model_relation"] == "adapter" and "long-context" in found["tags"]
    parameters = sum(u.numel() for u in weights(model).values())
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", card, re.MULTILINE))
    assert rows["window"] == "6 tokens" and rows["sinks"] == "2 tokens" and rows["layers"] == "0-2"
    assert rows["compressor"] == "`GatedDeltaNet(shared_state=True)`" and rows["parameters"] == f"{parameters:,}"
    assert rows["weights"].endswith("MB, float32") and "Not recorded" in card
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f'"{BASE}"' in block and 'load_adapter(model, "me/memory")' in block


@pytest.mark.parametrize("options", [{}, {"shared_state": True}, {"eviction": SalientSlots(3)}], ids=str)
def test_bytes_of_a_state_are_those_of_the_report(options, tmp_path):
    model = retrofit(plain(dtype=torch.bfloat16), GatedDeltaNet, window_size={0: 6, 2: 9}, **options)
    save_adapter(model, tmp_path)
    total = re.search(r"^total .* ([\d,]+)$", memory_report(model), re.MULTILINE)[1]
    assert state_bytes(json.loads((tmp_path / "adapter.json").read_text())) == int(total.replace(",", ""))


def test_a_card_of_slots_without_a_compressor(tmp_path):
    model = retrofit(plain(), None, window_size=6, num_sinks=2, eviction=SalientSlots(3))
    save_adapter(model, tmp_path, card=True)
    card = (tmp_path / "README.md").read_text()
    assert "num_slots=3" in card and "| compressor | none |" in card and "license" not in front_matter(card)


def test_a_card_that_somebody_worked_on_stays(hub, tmp_path):
    model = make()
    save_adapter(model, tmp_path, card=True)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "Old.\n")
    save_adapter(model, tmp_path, card=True)
    assert "Old." not in path.read_text()
    path.write_text(path.read_text().replace(MARK, "") + "Mine.\n")
    save_adapter(model, tmp_path, card=True)
    push_adapter(tmp_path, "me/memory", base_model=BASE)
    assert "Mine." in hub.repos["me/memory"]["main"]["README.md"].decode()


def test_a_folder_is_published_without_its_checkpoints(hub, tmp_path):
    folder = tmp_path / "out"
    save_adapter(make(), folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"much")
    report = {"command": "python train.py", "steps": 1000, "metrics": {"eval_memory": 3.25, "eval_gap": "0.1 | 0.2"}}
    (folder / "training.json").write_text(json.dumps(report))
    push_adapter(folder, "me/memory", base_model=BASE, revision="first")
    assert hub.repos["me/memory"]["main"] == {}
    files = hub.repos["me/memory"]["first"]
    assert sorted(files) == ["README.md", "adapter.json", "adapter.safetensors", "training.json"]
    card = files["README.md"].decode()
    assert "| steps | 1,000 |" in card and "| eval_memory | 3.2500 |" in card and r"0.1 \| 0.2" in card
    assert same(weights(load_adapter(plain(), "me/memory", revision="first")), weights(load_adapter(plain(), folder)))
    assert "base_model" in json.loads((folder / "adapter.json").read_text())  # what is here is unchanged
    assert json.loads((folder / "adapter.json").read_text())["base_model"] is None


def test_a_base_from_the_hub_is_known(hub):
    model = make()
    model.config._name_or_path = BASE
    push_adapter(model, "me/memory")
    assert front_matter(hub.repos["me/memory"]["main"]["README.md"].decode())["base_model"] == BASE


@pytest.mark.parametrize("options, message", [
    ({"repo_id": "memory"}, "repo_id='memory': expected 'owner/name'"),
    ({"base_model": None}, "the base model was loaded from None, which others do not have"),
    ({"base_model": "model"}, "base_model='model': expected 'owner/name'"),
    ({"license": "no: such"}, "license='no: such': expected an identifier"),
])  # fmt: skip
def test_what_cannot_be_published(options, message, hub):
    given = {"repo_id": "me/memory", "base_model": BASE} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        push_adapter(make(), **given)
    assert hub.repos == {}


def test_folders_that_cannot_be_published(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="in this folder"):
        push_adapter(tmp_path, "me/memory", base_model=BASE)
    with pytest.raises(ValueError, match="not retrofitted"):
        push_adapter(plain(), "me/memory", base_model=BASE)
    save_adapter(make(), tmp_path / "a")
    data = json.loads((tmp_path / "a" / "adapter.json").read_text())
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(data | {"base_model": "another/one"}))
    with pytest.raises(ValueError, match="changed by hand"):
        push_adapter(tmp_path / "a", "me/memory")
    assert hub.repos == {}


def test_a_token_that_is_missing_or_wrong(hub, monkeypatch):
    with pytest.raises(RuntimeError, match=r"me/memory: the hub did not take the adapter .*401"):
        push_adapter(make(), "me/memory", base_model=BASE, token="hf_read")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token of the Hugging Face hub: run `hf auth login`"):
        push_adapter(make(), "me/memory", base_model=BASE)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="push_adapter needs huggingface_hub"):
        push_adapter(make(), "me/memory", base_model=BASE)
    with pytest.raises(FileNotFoundError, match="downloading needs huggingface_hub"):
        load_adapter(plain(), "me/memory")


def test_revisions_and_repositories_that_are_not_there(hub, tmp_path):
    push_adapter(make(), "me/memory", base_model=BASE)
    model = plain()
    with pytest.raises(FileNotFoundError, match=r"me/memory: no such file or folder, and .* at revision='v9'"):
        load_adapter(model, "me/memory", revision="v9")
    with pytest.raises(FileNotFoundError, match="me/nothing: no such file or folder"):
        load_adapter(model, "me/nothing")
    save_adapter(make(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"revision='main': .* is on this machine"):
        load_adapter(model, tmp_path / "a", revision="main")
    assert not hasattr(model, "hippocampus")


def test_released_files_have_no_card(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.layers.0.ahn.fn.o_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no adapter of this library"):
        adapter_card(tmp_path)
