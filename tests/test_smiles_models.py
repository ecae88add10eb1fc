"""SMILES in memory, the networks that write them, and their systems."""

import gzip
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fastnuggets import nn as fnn
from fastnuggets.models import char_rnn
from fastnuggets.models.char_rnn import IGNORED, CharRNN, nats, unroll
from fastnuggets.models.smiles_aae import SmilesAAE
from fastnuggets.models.smiles_vae import SmilesVAE
from fastnuggets.molecules import vocabulary
from fastnuggets.molecules.vocabulary import Strings, Vocabulary

pytest.importorskip("rdkit")

from fastnuggets.molecules import read
from fastnuggets.molecules.smiles import digests, smiles_of_file
from fastnuggets.systems import Draw, find
from fastnuggets.systems.smiles import POOL, batch_of, grouped_rows

SMILES = [
    "CCO", "c1ccccc1C(N)=O", "ClC1CC1", "CS(C)(=O)=O", "OB(O)c1ccccc1", "[Na+].[Cl-]", "BrCC#N", "C/C=C/C",
    "N[C@@H](C)C(=O)O",
    "CCCCCCO", "CCN", "CC(=O)O", "Oc1ccccc1", "C1CCCCC1", "CCOCC", "NCCN", "OCC(O)CO", "c1ccncc1", "c1ccsc1", "CC(C)C",
]  # fmt: skip
SYSTEMS = ("char-rnn", "smiles-vae", "smiles-aae")
SMALL = {
    "char-rnn": {"hidden": 24, "layers": 2, "dropout": 0.0},
    "smiles-vae": {"encoder": 16, "hidden": 24, "layers": 2, "latent": 8, "final_rate": 1e-3},
    "smiles-aae": {"embedding": 8, "encoder": 16, "hidden": 24, "layers": 2, "latent": 8},
}


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr("fastnuggets.systems.smiles.SAMPLE", 64)
    monkeypatch.setattr("fastnuggets.systems.smiles_autoencoder.SAMPLE", 64)


@pytest.fixture
def smi(tmp_path):
    return write(tmp_path / "some.smi", SMILES)


def made(name, path, seed=0, **settings):
    kind = find(name)
    given = kind.Settings(**{"batch_size": 4, "learning_rate": 1e-2, "epochs": 5, **SMALL[name], **settings})
    facts, data = kind.read(path, given, seed=seed, progress=False)
    torch.manual_seed(seed)
    return kind(given, facts), data


def train(system, data, steps, draw=Draw(0)):  # noqa: B008
    losses = []
    for step in range(steps):
        for update in system.updates(data, step, draw):
            system.model.zero_grad()
            update.loss.backward()
            update.optimizer.step()
            losses.append((update.name, update.loss.item()))
    return losses


# Strings and vocabulary


def test_strings_are_rows_of_bytes():
    strings = Strings.of(SMILES)
    assert [strings[i] for i in range(len(strings))] == SMILES
    assert strings.data.dtype == np.uint8 and len(strings.data) == sum(map(len, SMILES))
    some = strings.take(np.array([3, 0, 3]))
    assert [some[i] for i in range(3)] == [SMILES[3], SMILES[0], SMILES[3]]
    assert len(strings.take(np.zeros(len(SMILES), bool))) == 0
    columns = strings.padded(np.array([0, 1]), 7)
    assert columns.shape == (len(SMILES[1]), 2)
    assert columns[:, 0].tobytes() == b"CCO" + bytes([7] * (len(SMILES[1]) - 3))
    both = Strings.cat([some, Strings.of([]), strings])
    assert both[0] == SMILES[3] and both[3] == SMILES[0] and len(both) == 3 + len(SMILES)
    with pytest.raises(IndexError, match="out of range for 3"):
        some[3]
    with pytest.raises(ValueError, match="'Cé': the character 'é'"):
        Strings.of(["CC", "Cé"])


def test_vocabulary_round_trip():
    strings = Strings.of(SMILES)
    words = Vocabulary.of(strings)
    assert words.characters == tuple(sorted(set("".join(SMILES))))
    assert words.tokens[:2] == ["<begin>", "<end>"] and len(words) == len(words.tokens)
    assert Vocabulary.from_tokens(words.tokens).tokens == words.tokens
    tokens = words.encode(strings)
    first = tokens.data[tokens.ptr[0] : tokens.ptr[1]].tolist()
    assert first == [0, words.tokens.index("C"), words.tokens.index("C"), words.tokens.index("O"), 1]
    rows = tokens.padded(np.arange(len(tokens)), 1).T
    assert words.decode(rows) == SMILES
    assert words.decode(rows[:, 1:3]) == [text[:2] for text in SMILES]  # without an end as far as it goes
    assert (vocabulary.BEGIN, vocabulary.END) == (char_rnn.BEGIN, char_rnn.END)


def test_many_strings_are_worked_on_in_parts(monkeypatch):
    strings = Strings.of([*SMILES, "", "C"])
    words = Vocabulary.of(strings)
    rows = np.random.default_rng(0).permutation(len(strings))
    whole = [strings.take(rows), words.encode(strings)]
    monkeypatch.setattr(vocabulary, "_PART", 3)
    assert Vocabulary.of(strings).tokens == words.tokens
    assert Vocabulary("C").knows(strings).tolist() == [set(text) <= {"C"} for text in [*SMILES, "", "C"]]
    for a, b in zip(whole, [strings.take(rows), words.encode(strings)], strict=True):
        assert np.array_equal(a.data, b.data) and np.array_equal(a.ptr, b.ptr)


def test_vocabulary_says_what_is_wrong():
    words = Vocabulary("CNO")
    strings = Strings.of(["CC", "CSN", "", "CS"])
    assert words.knows(strings).tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"'CSN': the character 'S' is not in the vocabulary CNO"):
        words.encode(strings)
    with pytest.raises(ValueError, match="numbers below 5, got 5"):
        words.decode(np.array([[5]]))
    with pytest.raises(ValueError, match="begins with <begin>, <end>"):
        Vocabulary.from_tokens(["C", "N", "O"])
    for wrong in (["C", "C"], ["Cl"], ["é"], []):
        with pytest.raises(ValueError, match="single ASCII characters, each once"):
            Vocabulary(wrong)


# Reading


@pytest.mark.parametrize("ending", [".smi", ".smi.gz", ".csv", ".sdf"])
@pytest.mark.parametrize("processes", [0, 2])
def test_smiles_are_those_of_read(tmp_path, ending, processes):
    path = tmp_path / f"some{ending}"
    texts = ["OCC", *SMILES, "C(C", "CCO", "C" * 60, "[H]C", "not one"]
    if ending == ".sdf":
        from rdkit import Chem

        blocks = (Chem.MolToMolBlock(mol) for text in texts if (mol := Chem.MolFromSmiles(text)))
        path.write_text("".join(f"{block}$$$$\n" for block in [*blocks, "broken\n"]))
    else:
        head = "id,smiles\n" if ending == ".csv" else ""
        lines = "".join(f"{i},{text}\n" if ending == ".csv" else f"{text}\n" for i, text in enumerate(texts))
        (gzip.open if ending == ".smi.gz" else open)(path, "wb").write((head + lines).encode())
    records = list(read(path))
    expected = list(dict.fromkeys(r.smiles for r in records if not r.error and len(r.smiles) <= 50))
    found = smiles_of_file(path, longest=50, processes=processes)
    assert [found.strings[i] for i in range(len(found.strings))] == expected
    assert found.broken == sum(r.error is not None for r in records)
    assert (found.too_long, found.repeated) == (1, 2)
    assert found.reason == next(r.error for r in records if r.error)


def test_many_blocks_in_order(tmp_path):
    texts = ["".join(atoms) for atoms in itertools.product("CNO", repeat=7)]
    path = write(tmp_path / "many.smi", texts)
    found = smiles_of_file(path, processes=2)
    expected = list(dict.fromkeys(record.smiles for record in read(path)))
    assert [found.strings[i] for i in range(len(found.strings))] == expected
    assert found.repeated == len(texts) - len(expected) > 1000


def test_smiles_as_they_stand(tmp_path):
    path = write(tmp_path / "some.smi", ["OCC", "C(C", "OCC", "é", "C" * 9])
    found = smiles_of_file(path, canonical=False, longest=8)
    assert [found.strings[i] for i in range(len(found.strings))] == ["OCC", "C(C"]
    assert (found.broken, found.too_long, found.repeated) == (1, 1, 1)
    assert "not of SMILES" in found.reason


def test_a_file_that_was_cut_off(tmp_path):
    whole = gzip.compress("".join(f"{'C' * n}\n" for n in range(1, 400)).encode())
    (tmp_path / "cut.smi.gz").write_bytes(whole[:-20])
    found = smiles_of_file(tmp_path / "cut.smi.gz")
    assert found.broken == 1 and "damaged" in found.reason and len(found.strings) > 0
    with pytest.raises(FileNotFoundError):
        smiles_of_file(tmp_path / "none.smi")
    with pytest.raises(ValueError, match="expected a file ending in"):
        smiles_of_file(write(tmp_path / "some.txt", SMILES))


# Networks


def encoded(texts=SMILES):
    strings = Strings.of(texts)
    words = Vocabulary.of(strings)
    return words, words.encode(strings)


def lstm(rnn, layer, x, h, c):
    """One step of a layer, from its weights: float64."""
    w, r, b, s = (
        getattr(rnn, f"{name}_l{layer}").double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    i, f, g, o = (w @ x + b + r @ h + s).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def test_char_rnn_is_its_definition():
    torch.manual_seed(0)
    words, tokens = encoded()
    net = CharRNN(len(words), hidden=12, layers=2, dropout=0.0)
    batch = batch_of(tokens, np.arange(6), torch.device("cpu"))
    found = nats(net(batch.inputs)[0], batch.targets)
    for column in range(6):
        state = [(torch.zeros(12).double(), torch.zeros(12).double()) for _ in range(2)]
        total = 0.0
        for place in range(int(batch.lengths[column])):
            x = net.embedding.weight[batch.tokens[place, column]].double()
            for layer in range(2):
                state[layer] = lstm(net.rnn, layer, x, *state[layer])
                x = state[layer][0]
            logits = net.output.weight.double() @ x + net.output.bias.double()
            total -= logits.log_softmax(0)[batch.tokens[place + 1, column]].item()
        assert found[column].item() == pytest.approx(total, rel=1e-5)  # float32; seen: 2e-7


def test_padding_changes_nothing():
    """Dense batches give what packed ones do, and what each sequence alone does, gradients too."""
    torch.manual_seed(0)
    words, tokens = encoded()
    net = CharRNN(len(words), hidden=12, layers=2, dropout=0.0).double()
    batch = batch_of(tokens, np.arange(len(tokens)), torch.device("cpu"))
    assert (batch.targets == IGNORED).sum() > 50
    dense = nats(net(batch.inputs)[0].double(), batch.targets).sum()
    packed = pack_padded_sequence(net.embedding(batch.inputs), batch.lengths)
    logits = net.output(net.rnn(packed)[0].data)
    aims = pack_padded_sequence(batch.targets, batch.lengths).data
    other = torch.nn.functional.cross_entropy(logits, aims, reduction="sum")
    assert dense.item() == pytest.approx(other.item(), rel=1e-6)  # the loss is taken in float32
    for a, b in zip(
        torch.autograd.grad(dense, net.parameters()), torch.autograd.grad(other, net.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SmilesVAE, SmilesAAE])
def test_an_autoencoder_takes_each_sequence_for_itself(kind):
    torch.manual_seed(0)
    words, tokens = encoded()
    net = kind(len(words), encoder=10, hidden=12, layers=2, latent=5).eval()

    def through(batch):
        if kind is SmilesVAE:
            codes, kl = net.encode(batch.tokens, batch.lengths + 1)
        else:
            codes, kl = net.encode(batch.inputs, batch.lengths), torch.zeros(len(batch.lengths))
        return codes, kl, nats(net.decode(batch.inputs, codes), batch.targets)

    rows = np.arange(len(tokens))
    together = batch_of(tokens, rows, torch.device("cpu"))
    order = rows[np.argsort(-tokens.lengths[rows], kind="stable")]
    for place, row in enumerate(order):
        alone = through(batch_of(tokens, np.array([row]), torch.device("cpu")))
        for a, b in zip(through(together), alone, strict=True):
            torch.testing.assert_close(a[place], b[0], rtol=1e-4, atol=1e-5)


def test_vae_begins_with_its_identity_and_has_a_known_kl():
    words, tokens = encoded()
    net = SmilesVAE(len(words), encoder=10, hidden=12, layers=1, latent=5)
    assert torch.equal(net.embedding.weight, torch.eye(len(words))) and net.embedding.weight.requires_grad
    batch = batch_of(tokens, np.arange(4), torch.device("cpu"))
    torch.nn.init.zeros_(net.code.linear.weight)
    with torch.no_grad():
        net.code.linear.bias[:5], net.code.linear.bias[5:] = 0.5, math.log(0.25)
    _, kl = net.encode(batch.tokens, batch.lengths + 1)
    expected = 5 * 0.5 * (0.25 + 0.25 - 1 - math.log(0.25))
    torch.testing.assert_close(kl, torch.full((4,), expected))


def test_aae_code_sets_the_cell_state():
    net = SmilesAAE(7, encoder=10, hidden=12, layers=2, latent=5)
    hidden, cells = net._begin(torch.randn(3, 5))
    assert not hidden.any() and torch.equal(cells[0], cells[1]) and cells.shape == (2, 3, 12)
    sizes = [tuple(p.shape) for p in SmilesAAE(30).discriminator.parameters() if p.dim() == 2]
    assert sizes == [(640, 128), (256, 640), (1, 256)]


# Drawing


PROBABILITIES = torch.tensor([[0, 0.1, 0.6, 0.3], [1, 0, 0, 0], [0, 0.5, 0.1, 0.4], [0, 0.2, 0.7, 0.1]])  # by the last


def chain(tokens, state):
    """A network whose logits depend on the last token alone; its state counts the steps."""
    return PROBABILITIES.log()[tokens], (state[0] + 1,)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sequences_have_their_probabilities(temperature):
    count, length = 40_000, 3
    drawn = unroll(chain, (torch.zeros(1, count, 1),), length=length, temperature=temperature, key=3)
    p = (PROBABILITIES.double() ** (1 / temperature)) * (PROBABILITIES > 0)
    p = p / p.sum(1, keepdim=True)
    expected = {}
    for text in itertools.product(range(1, 4), repeat=length):
        cut = text[: text.index(1) + 1] if 1 in text else text
        if cut + (1,) * (length - len(cut)) == text:
            expected[text] = math.prod(float(p[a, b]) for a, b in itertools.pairwise((0, *cut)))
    assert sum(expected.values()) == pytest.approx(1)
    rows, counts = drawn.unique(dim=0, return_counts=True)
    seen = {tuple(row): n for row, n in zip(rows.tolist(), counts.tolist(), strict=True)}
    assert set(seen) <= set(expected)
    chi2 = sum((seen.get(text, 0) - count * q) ** 2 / (count * q) for text, q in expected.items())
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_draws_repeat_and_do_not_depend_on_the_others():
    torch.manual_seed(0)
    net = CharRNN(9, hidden=16, layers=2, dropout=0.5).eval()
    with torch.no_grad():
        net.output.weight *= 8
    many = net.sample(64, length=30, key=5)
    assert torch.equal(many, net.sample(64, length=30, key=5))
    assert torch.equal(many[:10], net.sample(10, length=30, key=5))
    assert not torch.equal(many, net.sample(64, length=30, key=6))
    ended = (many == 1).long().cumsum(1)
    assert (many[ended > 0] == 1).all() and (ended[:, -1] > 0).float().mean() > 0.5
    assert net.sample(0, key=1).shape == (0, 100)
    likeliest = net.sample(3, length=5, temperature=0)
    logits, _ = net(torch.tensor([[0], *likeliest[:1, :-1].T.tolist()]))
    before_end = int((likeliest[0] == 1).float().argmax()) + 1 if (likeliest[0] == 1).any() else 5
    assert torch.equal(logits[:before_end, 0].argmax(1), likeliest[0, :before_end].long())
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got -1"):
        net.sample(1, temperature=-1)


def test_what_has_ended_is_computed_no_further():
    sizes = []

    def step(tokens, state):
        sizes.append(tokens.shape[1])
        return chain(tokens, state)

    drawn = unroll(step, (torch.zeros(1, 500, 1),), length=200, key=0)
    alive = 1 + (drawn != 1).sum(0)[: len(sizes)] - 1
    assert sizes == [500, *alive[:-1].tolist()] and len(sizes) < 60


# Batches


def test_batches_are_of_equal_lengths_and_miss_nobody():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 90, 8 * POOL * 5)  # five pools an epoch
    draw = Draw(3)
    pool = [grouped_rows(draw, step, lengths, 8) for step in range(5 * POOL)]
    assert sorted(np.concatenate(pool).tolist()) == list(range(len(lengths)))
    padding = sum(lengths[rows].max() * len(rows) for rows in pool) / lengths.sum() - 1
    assert padding < 0.1  # seen: 0.03; without grouping: 0.7
    assert np.array_equal(grouped_rows(draw, 7, lengths, 8), pool[7])
    assert not np.array_equal(np.sort(pool[0]), np.sort(grouped_rows(Draw(4), 0, lengths, 8)))
    means = [lengths[rows].mean() for rows in pool[:POOL]]
    assert means != sorted(means)
    halves = [[grouped_rows(Draw(3, rank, 2), step, lengths, 8) for step in range(5 * POOL)] for rank in range(2)]
    assert sorted(np.concatenate([*halves[0], *halves[1]]).tolist()) == list(range(len(lengths)))
    # An epoch of 18 batches: none of its pools reaches into the next one, and the last batch is filled up.
    epoch = np.concatenate([grouped_rows(draw, step, lengths[:140], 8) for step in range(18, 36)])
    assert len(epoch) == 144 and set(epoch.tolist()) == set(range(140))
    assert sorted(grouped_rows(draw, 5, lengths[:3], 8).tolist()) == [0, 1, 2]


def test_short_molecules_weigh_no_more(tmp_path):
    """Over a pool of batches the losses are the mean over all characters, whatever the batches are."""
    path = write(tmp_path / "some.smi", [f"{'C' * n}{'O' * m}" for n in range(1, 17) for m in range(1, 12)])
    system, data = made("char-rnn", path, tested=0.09, batch_size=10, max_length=60)
    assert len(data.train) == 10 * POOL
    losses = [next(system.updates(data, step, Draw(0))).loss.item() for step in range(POOL)]
    assert np.std(losses) > 0.1
    character, _ = system._measured(data.train)
    assert np.mean(losses) == pytest.approx(character, rel=1e-5)


# Systems


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_sizes_are_the_defaults(name):
    kind = find(name)
    facts = {
        "vocabulary": ["<begin>", "<end>", *"#()-123456=BCFHNOS[]clnors"],
        "molecules": 10_000,
        "mean_length": 36.0,
    }
    system = kind(kind.Settings(), facts)
    numbers = sum(p.numel() for p in system.model.parameters())
    v, z = 28, 128

    def recurrent(gates, x, h, layers=1):
        return sum(gates * (h * (x if layer == 0 else h) + h * h + 2 * h) for layer in range(layers))

    expected = {
        "char-rnn": v * v + recurrent(4, v, 768, 3) + v * 769,
        "smiles-vae": v * v + recurrent(3, v, 256) + 257 * 2 * z + recurrent(3, v + z, 512, 3)
        + (z + 1) * 512 + 513 * v,
        "smiles-aae": v * 32 + 2 * recurrent(4, 32, 512) + 1025 * z + recurrent(4, 32, 512, 2) + (z + 1) * 512 + 513 * v
        + (z + 1) * 640 + 641 * 256 + 257,
    }  # fmt: skip
    assert numbers == expected[name]
    assert {key: getattr(kind.Settings(), key) for key in ("epochs", "batch_size")} == {
        "char-rnn": {"epochs": 80, "batch_size": 64},
        "smiles-vae": {"epochs": 100, "batch_size": 512},
        "smiles-aae": {"epochs": 120, "batch_size": 512},
    }[name]


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_lowers_the_loss(smi, name):
    system, data = made(name, smi, batch_size=18, epochs=1000, learning_rate=5e-3)
    seen = data._replace(held=data.train)
    before = system.model.eval() and system.validate(seen)
    system.model.train()
    losses = train(system, data, 40)
    after = system.model.eval() and system.validate(seen)
    assert next(iter(after)) == ("per_character" if name == "smiles-aae" else "loss") and set(after) == set(before)
    key = "loss" if name == "char-rnn" else "per_character"
    assert after[key] < 0.7 * before[key]  # seen: 0.4 to 0.6
    assert all(0 <= after[key] <= 1 for key in ("valid", "unique", "novel"))
    again, _ = made(name, smi, batch_size=18, epochs=1000, learning_rate=5e-3)
    assert train(again, data, 2) == losses[: 2 * len(losses) // 40]
    figures = system.evaluate(smi)
    assert figures["molecules"] == len(SMILES)
    assert figures["nats_per_molecule"] / figures["nats_per_character"] == pytest.approx(
        np.mean([len(r.smiles) + 1 for r in read(smi)])
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_half_precision_on_the_cpu(smi, name):
    """Autocast's losses are near those of float32; not every processor could run the recurrent layers in bfloat16."""
    values = []
    for enabled in (False, True):
        system, data = made(name, smi)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            updates = list(system.updates(data, 0, Draw(0)))
        for update in updates:
            update.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in system.model.parameters() if p.grad is not None)
        values.append([update.loss.item() for update in updates])
    assert values[1] == pytest.approx(values[0], rel=1e-3)  # seen: 3e-5


def test_a_uniform_network_has_its_entropy(smi):
    system, data = made("char-rnn", smi)
    system.model.eval()
    for parameter in system.model.output.parameters():
        torch.nn.init.zeros_(parameter)
    figures = system.evaluate(smi)
    assert figures["nats_per_character"] == pytest.approx(math.log(len(system.vocabulary)), rel=1e-6)
    assert system.validate(data)["loss"] == pytest.approx(math.log(len(system.vocabulary)), rel=1e-6)


@pytest.mark.parametrize("name", SYSTEMS[1:])
def test_what_it_has_learnt_is_reconstructed(tmp_path, name):
    path = write(tmp_path / "few.smi", ["CCO", "NC", "OCC(O)CO", "C1CC1", "CCS", "CC=O"])
    system, data = made(name, path, batch_size=6, epochs=10**6, learning_rate=1e-2)
    assert len(data.train) == 5
    before = system.model.eval() and system.reconstructed(data.train)
    system.model.train()
    for _ in range(40):
        train(system, data, 10)
        system.model.eval()
        if system.reconstructed(data.train) == 1:
            break
        system.model.train()
    assert system.reconstructed(data.train) == 1 > before
    codes = torch.cat([system.code(batch) for batch in system.each(data.train)])
    written = system.vocabulary.decode(system.model.sample(codes, temperature=0).numpy())
    assert sorted(written) == sorted(data_smiles(system, data))


def data_smiles(system, data):
    rows = data.train.padded(np.arange(len(data.train)), 1).T
    return system.vocabulary.decode(rows)


def test_schedules():
    settings = find("char-rnn").Settings
    facts = {"vocabulary": ["<begin>", "<end>", "C"], "molecules": 64, "mean_length": 3.0}
    rnn = find("char-rnn")(settings(hidden=4, layers=1), facts)
    assert [rnn.schedule(step, 80) for step in (0, 9, 10, 19, 79)] == [1, 1, 0.5, 0.5, 2**-7]
    vae = find("smiles-vae")
    system = vae(vae.Settings(encoder=4, hidden=4, latent=2), facts)
    assert [system.kl_weight(epoch) for epoch in (0, 1, 50, 99)] == pytest.approx([0, 0.0005, 0.025, 0.0495])
    assert {system.schedule(step, 100) for step in range(100)} == {1.0}  # MOSES' restarts change nothing
    warm = vae(vae.Settings(epochs=20, kl_start=11, kl_end=1.0, final_rate=0.0, encoder=4, hidden=4, latent=2), facts)
    assert [warm.kl_weight(epoch) for epoch in (0, 10, 11, 19)] == pytest.approx([0, 0, 0.1, 0.9])
    assert [warm.schedule(step, 20) for step in (0, 5, 10, 15)] == pytest.approx([1, 0.5, 1, 0.5])
    kind = find("smiles-aae")
    aae = kind(kind.Settings(encoder=4, hidden=4, latent=2), facts)
    assert aae.steps(None) == 60  # 120 epochs of a batch, in turns
    assert [aae.schedule(step, 60) for step in (0, 9, 10, 59)] == [1, 1, 0.5, 2**-5]


def test_autoencoder_and_discriminator_take_turns(smi):
    system, data = made("smiles-aae", smi, turns=2)
    theirs = set(system.model.discriminator.parameters())
    names, batches = [], []
    real = system.batch
    system.batch = lambda data, step, draw: batches.append(step) or real(data, step, draw)
    for step in range(2):
        for update in system.updates(data, step, Draw(0)):
            before = {p: p.detach().clone() for p in system.model.parameters()}
            system.model.zero_grad()
            update.loss.backward()
            update.optimizer.step()
            changed = {p for p, value in before.items() if not torch.equal(p, value)}
            assert changed and (changed <= theirs) == (update.name == "discriminator")
            assert changed <= theirs or not changed & theirs
            names.append(update.name)
    assert names == ["autoencoder", "discriminator", "discriminator"] * 2
    assert batches == [0, 1, 2, 3, 4, 5]
    given = [p for optimizer in system.optimizers() for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == set(system.model.parameters())


def test_gradients_are_clamped(smi):
    system, data = made("smiles-aae", smi, clamp=0.001)
    update = next(system.updates(data, 0, Draw(0)))
    update.loss.backward()
    assert max(float(p.grad.abs().max()) for p in system.model.parameters()) > 0.01
    update.optimizer.step()
    ours = [p for group in system.autoencoder.param_groups for p in group["params"]]
    assert max(float(p.grad.abs().max()) for p in ours) == pytest.approx(0.001)


def test_a_discriminator_that_cannot_tell_has_ln_2(smi):
    system, data = made("smiles-aae", smi)
    torch.nn.init.zeros_(system.model.discriminator[-1].weight)
    torch.nn.init.zeros_(system.model.discriminator[-1].bias)
    assert system._discriminate(system.batch(data, 0, Draw(0))).loss.item() == pytest.approx(math.log(2))


def test_vae_bound_is_above_what_the_mean_gives(smi):
    """Draws of the code make it harder to write, and the figures are the same for a seed."""
    system, data = made("smiles-vae", smi, epochs=1000, batch_size=18)
    train(system, data, 20)
    system.model.eval()
    a, b = (system.evaluate(smi, seed=seed) for seed in (1, 1))
    assert a == b != system.evaluate(smi, seed=2)
    with torch.no_grad():
        means = sum(
            float(nats(system.model.decode(batch.inputs, system.code(batch)), batch.targets).sum())
            for batch in system.each(data.train)
        )
    drawn, kl, _ = system._measured(data.train, 10**6, seed=0)
    assert drawn > means / len(data.train) and kl > 0
    with fnn.sampling(system.model):
        assert system.reconstructed(data.train) <= 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_generating(smi, name):
    system, data = made(name, smi, batch_size=18, epochs=1000)
    train(system, data, 30)
    system.model.eval()
    texts = list(system.generate(30, seed=1))
    assert len(texts) == 30 and texts == list(system.generate(30, seed=1)) != list(system.generate(30, seed=2))
    assert texts[:7] == list(system.generate(7, seed=1))
    assert all(set(text) <= set(system.vocabulary.characters) and len(text) <= 100 for text in texts)
    long = list(system.generate(1030, seed=1))
    assert long[:30] == texts and long[512:542] != texts
    good = list(system.generate(20, seed=1, valid=True, temperature=0.7))
    from rdkit import Chem

    assert [Chem.CanonSmiles(text) for text in good] == good and len(good) == 20


def test_generating_what_never_is_a_molecule(tmp_path):
    system, _ = made("char-rnn", write(tmp_path / "some.smi", ["C(C)C", "CC(C)(C)C", "C(O)O"]))
    system.model.eval()
    with torch.no_grad():
        system.model.output.weight.zero_()
        system.model.output.bias.copy_(
            torch.tensor([-99.0] + [9.0 * (t == "(") - 1 for t in system.vocabulary.tokens[1:]])
        )
    with pytest.raises(ValueError, match=r"of 512 SMILES that were written 0 are molecules"):
        next(system.generate(1, seed=0, valid=True))


def test_novel_is_what_was_not_learnt(smi, monkeypatch):
    system, data = made("char-rnn", smi)
    known = [data_smiles(system, data)[0], "CCCCCCCCCCC", "CCCCCCCCCCC", "C(("]
    assert np.isin(digests([known[0]]), data.known).all()
    monkeypatch.setattr(system, "_texts", lambda *_: known * 16)
    assert system.sampled(data) == {"valid": 0.75, "unique": 2 / 48, "novel": 0.5}


def test_pages(smi):
    pytest.importorskip("matplotlib")
    system, data = made("char-rnn", smi, batch_size=18, epochs=1000)
    train(system, data, 40)
    system.model.eval()
    lengths, drawn = system.sections(data)
    assert "<svg" in lengths.html and "data:image/png" in drawn.html


# What can go wrong


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_to_learn_from(tmp_path, name):
    kind = find(name)
    with pytest.raises(ValueError, match=r"none.smi: 0 molecules to learn from"):
        kind.read(write(tmp_path / "none.smi", []), kind.Settings(), seed=0)
    path = write(tmp_path / "bad.smi", ["CCCCCC", "CCCCCO", "C(C", "CO"])
    with pytest.raises(ValueError, match=r"1 molecules .* 1 cannot be read \(.+\), 2 have more than 5 characters"):
        kind.read(path, kind.Settings(max_length=5), seed=0)


def test_weights_of_another_vocabulary(smi):
    ours, _ = made("char-rnn", smi)
    facts = {**ours.facts, "vocabulary": [t.replace("B", "P") for t in ours.facts["vocabulary"]]}
    other = find("char-rnn")(ours.settings, facts)
    with pytest.raises(ValueError, match="the weights are of another vocabulary"):
        other.model.load_state_dict(ours.model.state_dict())
    same = find("char-rnn")(ours.settings, ours.facts)
    same.model.load_state_dict(ours.model.state_dict())
    with pytest.raises(ValueError, match="begins with <begin>"):
        find("char-rnn")(ours.settings, {**ours.facts, "vocabulary": ["C", "N"]})


def test_molecules_that_the_vocabulary_cannot_write(tmp_path, smi):
    system, _ = made("char-rnn", smi, max_length=20)
    path = write(tmp_path / "other.smi", ["CCO", "[SeH2]", "C(C", "C" * 21])
    figures = system.evaluate(path)
    keys = ("molecules", "unknown_characters", "broken", "too_long")
    assert [figures[key] for key in keys] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"'\[SeH2\]': the character 'e' is not in the vocabulary"):
        system.evaluate(write(tmp_path / "none.smi", ["[SeH2]"]))
    with pytest.raises(ValueError, match="no molecule of it can be used"):
        system.evaluate(write(tmp_path / "bad.smi", ["C(C"]))


def test_settings_that_make_no_sense():
    for name, wrong in (
        ("char-rnn", "hidden"),
        ("smiles-vae", "latent"),
        ("smiles-aae", "turns"),
        ("char-rnn", "max_length"),
    ):
        with pytest.raises(ValueError, match=f"{wrong}: expected a whole number above 0, got 0"):
            find(name).Settings(**{wrong: 0})


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_split_is_of_the_seed(smi, name):
    (a, first), (b, second), (_, other) = (made(name, smi, seed=seed) for seed in (0, 0, 1))
    assert a.facts == b.facts and np.array_equal(first.held.data, second.held.data)
    assert not np.array_equal(first.held.data, other.held.data)
    assert len(first.train) + len(first.held) == len(SMILES) and a.facts["held_out"] == 2
