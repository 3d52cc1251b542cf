"""The word-level tokenizer."""

import pytest

from focus_jax.data.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer, token_ids


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["what colour is the 47 ?", "red", "top left"]
    return build_tokenizer(texts, words=("row12",), special=("USER:", "ASSISTANT:"))


def tokens(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    return tokenizer.convert_ids_to_tokens(ids[1:])


def test_splits_words_punctuation_digits_and_special_marks(tokenizer):
    text = "USER:what  colour is the 747?\nASSISTANT: red</s>"
    expected = "USER: what colour is the 7 4 7 ? ASSISTANT: red </s>"
    assert " ".join(tokens(tokenizer, text)) == expected


def test_unknown_words_and_control_ids(tokenizer):
    assert tokens(tokenizer, "the zebra 5") == ["the", "<unk>", "<unk>"]
    assert tokenizer.pad_token_id == 0
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0}) == 4


def test_offsets_point_at_the_text(tokenizer):
    text = "the  47 ? red"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces == ["the", "4", "7", "?", "red"]


def test_ids_do_not_depend_on_the_order_of_texts():
    assert build_tokenizer(["a b", "c"]).get_vocab() == build_tokenizer(["c", "b a"]).get_vocab()


def test_words_are_found_by_name(tokenizer):
    assert token_ids(tokenizer, ["row12"]) == [tokenizer.get_vocab()["row12"]]
    with pytest.raises(ValueError, match="row13"):
        token_ids(tokenizer, ["row12", "row13"])


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "new" / "tokenizer")
    save_tokenizer(tokenizer, tmp_path / "new" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    text = "USER: what is the 4 ? ASSISTANT: top left</s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.bos_token) == (0, "<s>")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer"]


def test_load_errors_name_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
