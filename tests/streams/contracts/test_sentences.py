"""The sentence model in numpy equals the same network in torch, and, where it is installed, the published model."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from streams.contracts import minilm, sentences
from streams.contracts.encoders import TEXT, ContentEncoder, HashedText, Kind, Reduction, TextEncoder
from streams.contracts.minilm import NUM_HEADS, NUM_LAYERS, WIDTH, MiniLM
from streams.contracts.sentences import SentenceEncoder, TextModelError

installed = pytest.mark.skipif(find_spec(sentences.PACKAGE) is None, reason="pip install 'genco-online[text]'")


def random_weights(seed: int = 0, vocabulary: int = 50, positions: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"embeddings.word_embeddings.weight": vocabulary, "embeddings.position_embeddings.weight": positions}
    weights = {}
    for name, shape in minilm._shapes().items():
        whole = tuple(sizes.get(name, 2) if size is None else size for size in shape)
        scale = 1.0 if name.startswith("embeddings") else 0.1
        center = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        weights[name] = (center + scale * rng.standard_normal(whole)).astype(np.float32)
    return weights


def torch_embedding(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    t = {name: torch.from_numpy(array).double() for name, array in w.items()}
    x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + t["embeddings.token_type_embeddings.weight"][0]
    norm = t["embeddings.LayerNorm.weight"], t["embeddings.LayerNorm.bias"]
    x = torch.nn.functional.layer_norm(x, (WIDTH,), *norm, 1e-12)
    for i in range(NUM_LAYERS):
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, NUM_HEADS, 4 * WIDTH, 0.0, "gelu", 1e-12, batch_first=True, dtype=torch.float64
        )
        p = f"encoder.layer.{i}"
        qkv = [f"{p}.attention.self.{name}" for name in ("query", "key", "value")]
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(torch.cat([t[f"{name}.weight"] for name in qkv]))
            layer.self_attn.in_proj_bias.copy_(torch.cat([t[f"{name}.bias"] for name in qkv]))
            for part, name in (
                (layer.self_attn.out_proj, "attention.output.dense"),
                (layer.norm1, "attention.output.LayerNorm"),
                (layer.linear1, "intermediate.dense"),
                (layer.linear2, "output.dense"),
                (layer.norm2, "output.LayerNorm"),
            ):
                part.weight.copy_(t[f"{p}.{name}.weight"])
                part.bias.copy_(t[f"{p}.{name}.bias"])
            x = layer(x[None])[0]
    mean = x.mean(0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("ids", [[3], [3, 7, 7, 1, 49, 0, 12]])
def test_network_equals_torch(ids: list[int]) -> None:
    weights = random_weights()
    assert np.abs(MiniLM(weights).embed(ids) - torch_embedding(weights, ids)).max() < 1e-6


def test_network_with_a_tensor_missing_or_misshapen_is_refused() -> None:
    weights = random_weights()
    name = "encoder.layer.5.output.dense.weight"
    with pytest.raises(ValueError, match=rf"{name} of the sentence model has shape \(384, 3\); expected \(384, 1536\)"):
        MiniLM(weights | {name: np.zeros((384, 3), np.float32)})
    with pytest.raises(ValueError, match=r"has shape \(3,\)"):
        MiniLM(weights | {name: np.zeros(3, np.float32)})
    del weights[name]
    with pytest.raises(ValueError, match="has shape None"):
        MiniLM(weights)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "PACKAGE", "genco_no_such_model")
    encoder = SentenceEncoder()
    assert encoder.id.startswith("minilm-1-")
    assert not encoder.encode("  ").any()  # nothing to embed: nothing is loaded
    with pytest.raises(TextModelError, match=r"not installed; pip install 'genco-online\[text\]'"):
        encoder.encode("red shoes")
    with pytest.raises(TextModelError, match="not installed"):
        encoder.load()


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes) -> None:
    model = folder / "genco_fake_model" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('the package is read, never run')")
    (model / "model.safetensors").write_bytes(weights)
    (model / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\nshoe\n##s\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sentences, "PACKAGE", "genco_fake_model")


def test_other_weights_than_the_id_says_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, b"other weights")
    with pytest.raises(TextModelError, match="has sha256"):
        SentenceEncoder().load()


def test_package_without_its_files_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, b"")
    (tmp_path / "genco_fake_model" / "model" / "vocab.txt").unlink()
    with pytest.raises(TextModelError, match=r"cannot be read: .*vocab.txt"):
        SentenceEncoder().load()


def test_texts_are_cut_cached_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import numpy as safetensors_numpy

    weights = safetensors_numpy.save(random_weights(positions=sentences.MAX_TOKENS))
    fake_package(tmp_path, monkeypatch, weights)
    vocabulary = (tmp_path / "genco_fake_model" / "model" / "vocab.txt").read_bytes()
    monkeypatch.setattr(sentences, "SHA256", hashlib.sha256(weights + vocabulary).hexdigest())
    monkeypatch.setattr(sentences, "MAX_CACHED", 2)
    embedded: list[int] = []
    embed = MiniLM.embed
    monkeypatch.setattr(MiniLM, "embed", lambda self, ids: embedded.append(len(ids)) or embed(self, ids))
    encoder = SentenceEncoder()
    red = encoder.encode("red shoes")
    assert encoder.encode(" red shoes\n") is red
    assert np.linalg.norm(red) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        red[0] = 0
    encoder.encode("shoe " * 1_000_000)
    encoder.encode("shoe")
    assert np.array_equal(encoder.encode("red shoes"), red)
    assert embedded == [5, sentences.MAX_TOKENS, 3, 5]


@installed
@pytest.mark.parametrize(
    ("text", "first"),
    [
        # As sentence-transformers 6.2.0 with torch 2.14.1 embeds them.
        ("Warm winter jacket", [-0.096344, 0.119729, 0.008608, 0.096235, 0.066388, 0.04304]),
        ("Crème brûlée, naïve façade", [0.034621, 0.036885, 0.022399, -0.060864, -0.035322, -0.065597]),
        ("温かい冬のジャケット", [-0.009514, 0.134741, 0.023838, -0.0361, -0.067619, 0.063239]),
        ("don't stop — buy now!! 50% off", [0.023504, 0.021577, 0.029002, -0.043611, 0.053649, 0.0017]),
    ],
)
def test_published_model_gives_the_published_embeddings(text: str, first: list[float]) -> None:
    assert SentenceEncoder().encode(text)[:6] == pytest.approx(first, abs=2e-6)


@installed
def test_new_title_starts_near_titles_that_mean_the_same() -> None:
    shipping = "Free shipping on all orders", "No delivery costs, whatever you buy"
    parking = "Free shipping on all orders", "Free parking on all levels"

    def likeness(encoder: TextEncoder, pair: tuple[str, str]) -> float:
        return float(encoder.encode(pair[0]) @ encoder.encode(pair[1]))

    meaning, letters = SentenceEncoder(), HashedText(256)
    assert likeness(meaning, ("Warm winter jacket", "Cozy cold-weather parka")) > 0.5
    assert likeness(meaning, ("Warm winter jacket", "USB charging cable")) < 0.3
    # The first pair means the same in other words, the second shares its words.
    assert likeness(meaning, shipping) > likeness(meaning, parking)
    assert likeness(letters, shipping) < likeness(letters, parking)


@installed
def test_element_encoder_with_sentences_travels_by_its_id_and_tensors() -> None:
    matrix = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)
    encoder = ContentEncoder(
        8,
        text_encoder=SentenceEncoder(),
        reductions={Kind("title", TEXT): Reduction(np.zeros(WIDTH, np.float32), matrix)},
    )
    again = ContentEncoder.from_id(encoder.id, encoder.tensors(), {SentenceEncoder.id: SentenceEncoder()})
    assert again.encode("title", (), "red shoes").tolist() == encoder.encode("title", (), "red shoes").tolist()
    assert encoder.encode("title", (), "red shoes").any()
