"""Tokenizers from files, the tiny one, and the encoder behind one interface."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import longlive_jax
from longlive_jax.config import TINY_TEXT
from longlive_jax.data.caption import CUT_PREFIX, VALUES, WORDS, Scene, Thing, caption
from longlive_jax.text import encoder as text_encoder
from longlive_jax.text import tiny, tokenizer
from longlive_jax.text.encoder import TextEncoder
from longlive_jax.text.tokenizer import PieceTokenizer
from longlive_jax.text.umt5 import UMT5

SENTENCES = [
    "a cat walks on the grass",
    "the red circle moves to the left over a striped background",
    "waves break on a rocky beach at night, seen from above",
    "Tom & Jerry run through a café in the rain",
]
SPECIALS = ["<pad>", "</s>", "<unk>"]


@pytest.fixture(scope="module")
def unigram_json():
    """As UMT5's own `tokenizer.json`: Unigram, with a template that appends </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(SENTENCES, trainer)
    model.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    model.enable_truncation(5)
    model.enable_padding(length=7)
    return model.to_str()


@pytest.fixture(scope="module")
def spiece():
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=out,
        vocab_size=80,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    return out.getvalue()


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def folder(request, tmp_path, unigram_json, spiece):
    content = {"tokenizer.json": unigram_json.encode(), "spiece.model": spiece}
    (tmp_path / request.param).write_bytes(content[request.param])
    return tmp_path


def decode(folder: pathlib.Path, ids: list[int]) -> str:
    import sentencepiece
    import tokenizers

    if (folder / "tokenizer.json").exists():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return processor.decode(ids)


def test_prompts_end_with_eos_and_are_padded(folder):
    ids, mask = tokenizer.load(folder, 64)([SENTENCES[0], "", SENTENCES[1]])
    assert ids.shape == mask.shape == (3, 64)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    assert (ids[~mask] == 0).all()
    assert mask.sum(1)[1] == 1 and ids[1, 0] == 1
    for row, text in ((0, SENTENCES[0]), (2, SENTENCES[1])):
        length = mask[row].sum()
        assert mask[row, :length].all()
        assert (ids[row] == 1).sum() == 1 and ids[row, length - 1] == 1
        assert decode(folder, ids[row, : length - 1].tolist()) == text


def test_long_prompts_lose_their_tail_and_keep_eos(folder):
    whole, _ = tokenizer.load(folder, 64)([SENTENCES[1]])
    short, mask = tokenizer.load(folder, 6)([SENTENCES[1]])
    assert mask.all()
    np.testing.assert_array_equal(short[0, :5], whole[0, :5])
    assert short[0, 5] == 1


def test_prompts_are_cleaned(folder):
    load = tokenizer.load(folder, 64)
    ids, _ = load(["  Tom &amp;amp; Jerry run\n through a CafÃ© in  the rain "])
    expected, _ = load(["Tom & Jerry run through a Café in the rain"])
    np.testing.assert_array_equal(ids, expected)


def test_what_is_in_no_piece_is_unknown(folder):
    words = tokenizer.load(folder, text_len=24)
    assert words.note("a cat walks") == ""
    assert words.note("a cat 猫 walks") == 'prompt "a cat 猫 walks": the model does not know "猫"'


def test_tokenizer_json_is_preferred(tmp_path, unigram_json, spiece):
    (tmp_path / "tokenizer.json").write_text(unigram_json)
    expected, _ = tokenizer.load(tmp_path, 32)(SENTENCES)
    (tmp_path / "spiece.model").write_bytes(spiece)
    np.testing.assert_array_equal(tokenizer.load(tmp_path, 32)(SENTENCES)[0], expected)
    (tmp_path / "tokenizer.json").unlink()
    assert not np.array_equal(tokenizer.load(tmp_path, 32)(SENTENCES)[0], expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no tokenizer.json or spiece.model in "),
        ("tokenizer.json", b"{", "cannot read the tokenizer .*: not a tokenizers file"),
        ("tokenizer.json", b"\xff\xfe", "cannot read the tokenizer .*tokenizer.json"),
        ("spiece.model", b"not a model", "cannot read the tokenizer .*sentencepiece model"),
        ("spiece.model", b"", "cannot read the tokenizer .*spiece.model"),
    ],
    ids=["missing", "json", "bytes", "spiece", "empty"],
)
def test_a_bad_folder_is_one_clear_sentence(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.load(tmp_path, 8)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_vocabulary_without_eos_is_refused(tmp_path):
    data = json.loads(tiny.tiny_tokenizer_json(WORDS))
    data["model"]["vocab"]["<eos>"] = data["model"]["vocab"].pop("</s>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="its vocabulary lacks </s>"):
        tokenizer.load(tmp_path, 8)


def test_tiny_knows_every_caption():
    rng = np.random.default_rng(0)
    tokens = tiny.tiny_tokenizer()

    def draw():
        values = {name: [str(v) for v in rng.choice(VALUES[name], 2)] for name in VALUES}
        things = zip(values["colour"], values["shape"], values["motion"], strict=True)
        things = tuple(Thing(*thing) for thing in things)[: rng.integers(1, 3)]
        return Scene(things, values["background"][0])

    texts = [prefix + caption(draw(), rng) for prefix in ("", CUT_PREFIX) for _ in range(200)]
    texts += [caption(draw()) for _ in range(50)]
    ids, mask = tokens(texts)
    assert ids.max() < TINY_TEXT.vocab
    assert not (ids == 2).any()
    words = [len(text.split()) for text in texts]
    np.testing.assert_array_equal(mask.sum(1), np.array(words) + 1)
    assert len({text.lower() for text in texts}) == len({row.tobytes() for row in ids})


def test_tiny_holds_its_longest_caption():
    from longlive_jax.data import caption as grammar

    def longest(phrases):
        return max(phrases, key=lambda phrase: len(phrase.split()))

    clause = longest(grammar._CLAUSES).format(
        thing=longest(grammar._THINGS).format(colour="red", shape="square"),
        motion=longest(phrase for said in grammar.MOTION_PHRASES.values() for phrase in said),
    )
    place = longest(grammar._PLACES).format("grey")
    _, mask = tiny.tiny_tokenizer(64)([f"{CUT_PREFIX} {clause} and {clause} {place}"])
    assert mask.sum() <= tiny.TEXT_LEN


def test_tiny_ignores_case_and_punctuation_and_marks_unknown_words():
    tokens = tiny.tiny_tokenizer(12)
    texts = ["A RED circle, (moves) left!", "a red circle moves left", "a purple circle"]
    ids, mask = tokens(texts)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert ids[2, :4].tolist() == [ids[0, 0], 2, ids[0, 2], 1]
    assert mask.sum(1).tolist() == [6, 6, 4]


def test_tiny_ids_are_in_the_order_of_the_words():
    vocab = json.loads(tiny.tiny_tokenizer_json(["zebra", "ant"]))["model"]["vocab"]
    assert vocab == {"<pad>": 0, "</s>": 1, "<unk>": 2, "zebra": 3, "ant": 4}


def test_the_shipped_tokenizer_is_the_grammars(tmp_path):
    tiny.write(tmp_path / "tokenizer.json")
    shipped = pathlib.Path(longlive_jax.__file__).parent / "models/tiny/tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_text() == shipped.read_text()
    texts = [caption(Scene((Thing("red", "circle", "bounces"),), "navy"))]
    loaded, built = tokenizer.load(shipped.parent, 16), tiny.tiny_tokenizer(16)
    np.testing.assert_array_equal(loaded(texts)[0], built(texts)[0])


@pytest.fixture(scope="module")
def umt5():
    return jax.jit(lambda key: UMT5(TINY_TEXT, rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_text_encoder_zero_pads_to_text_len(umt5):
    texts = ["a red circle moves left over a black background", ""]
    long = TextEncoder(umt5, tiny.tiny_tokenizer(24), 24)(texts)
    padded = TextEncoder(umt5, tiny.tiny_tokenizer(16), 24)(texts)
    assert long.shape == padded.shape == (2, 24, 128)
    np.testing.assert_allclose(long, padded, rtol=0, atol=1e-5)
    lengths = [int(np.flatnonzero(np.asarray(row).any(-1))[-1]) + 1 for row in padded]
    assert lengths == [10, 1]


def test_text_encoder_tells_words_and_their_order_apart(umt5):
    encoder = TextEncoder(umt5, tiny.tiny_tokenizer(), tiny.TEXT_LEN)
    texts = ["red circle blue square", "blue circle red square", "red circle blue triangle"]
    embeddings = np.asarray(encoder(texts))
    assert np.abs(embeddings[0] - embeddings[1]).max() > 0.1
    assert np.abs(embeddings[0] - embeddings[2]).max() > 0.1
    one = np.asarray(encoder(texts[:1]))
    np.testing.assert_allclose(one[0], embeddings[0], rtol=0, atol=1e-5)


def test_text_encoder_compiles_once_per_batch_size(umt5):
    encoder = TextEncoder(umt5, tiny.tiny_tokenizer(20), 20)
    encoder(["a red circle"])
    before = text_encoder._encode._cache_size()
    encoder(["a blue square moves left over a navy background"])
    assert text_encoder._encode._cache_size() == before > 0


def test_text_encoder_refuses_a_tokenizer_that_does_not_fit(umt5):
    with pytest.raises(ValueError, match="gives 9 tokens, the model takes 8"):
        TextEncoder(umt5, tiny.tiny_tokenizer(9), 8)(["red"])
    foreign = PieceTokenizer(lambda prompt: [200], 1, 0, 8)
    with pytest.raises(ValueError, match="token 200 is outside the text encoder's 128 embeddings"):
        TextEncoder(umt5, foreign, 8)(["red"])
