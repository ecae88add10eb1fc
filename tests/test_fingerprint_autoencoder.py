import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastnuggets.models.fingerprint_autoencoder import (
    FingerprintAAE,
    FingerprintVAE,
    bits_loss,
    discriminator_loss,
    encoder_loss,
)
from fastnuggets.molecules.fingerprints import Fingerprints, pack
from fastnuggets.systems import Draw, find
from fastnuggets.systems.fingerprint_data import Rows, Split
from fastnuggets.systems.fingerprint_measures import (
    energy_test,
    judge,
    ks_distance,
    ks_p,
    moments,
    nearest,
    regression,
)

SYSTEMS = ("fingerprint-vae", "fingerprint-aae")
MODELS = (FingerprintVAE, FingerprintAAE)


def alike(n, seed=0, bits=166):
    """Fingerprints of five families [n, bits], each bit of a family turned over with a chance of 1 in 20."""
    generator = torch.Generator().manual_seed(seed)
    families = torch.rand(5, bits, generator=torch.Generator().manual_seed(99)) < 0.3
    rows = families[torch.randint(5, (n,), generator=generator)]
    return (rows ^ (torch.rand(n, bits, generator=generator) < 0.05)).float()


def made(name, **settings):
    """A small system, and data for it."""
    kind = find(name)
    told = kind.Settings(
        **{"epochs": 8, "batch_size": 64, "hidden": 32, "latent": 4, "learning_rate": 0.01, **settings}
    )
    torch.manual_seed(0)
    system = kind(told, {"bits": 166, "kind": "maccs"})
    return system, Split(Rows(pack(alike(256)), ()), Rows(pack(alike(64, 1)), ()))


def go_on(system, data, steps, seed=0):
    system.model.train()
    for step in steps:
        for update in system.updates(data, step, Draw(seed)):
            system.model.zero_grad(set_to_none=True)
            update.loss.backward()
            update.optimizer.step()
    system.model.eval()
    return system


# --- networks and losses ---


@pytest.mark.parametrize(
    ("kind", "latent", "activation"), [(FingerprintVAE, 10, nn.ReLU), (FingerprintAAE, 20, nn.Tanh)]
)
def test_published_network(kind, latent, activation):
    model = kind()
    body = [type(m) for m in model.body]
    assert body == [nn.Linear, activation, nn.BatchNorm1d] * 2
    widths = [(m.in_features, m.out_features) for m in model.decoder.modules() if isinstance(m, nn.Linear)]
    assert widths == [(latent, 256), (256, 256), (256, 166)]
    x = alike(7)
    assert model(x).shape == (7, 166) and model.encode(x).shape == (7, latent)
    assert all(bool((m.bias == 0.1).all()) for m in model.modules() if isinstance(m, nn.Linear))
    # Variance 1 / 256 of 65,536 weights: a relative error of 0.6 % is one standard error of the estimate.
    assert model.body[3].weight.var().item() == pytest.approx(1 / 256, rel=0.03)


def test_bits_loss_is_the_likelihood():
    logits, x = torch.randn(5, 9, dtype=torch.float64) * 3, (torch.rand(5, 9) < 0.5).double()
    p = 1 / (1 + torch.exp(-logits))
    by_hand = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)
    torch.testing.assert_close(bits_loss(logits, x), by_hand)


def test_divergence_by_hand():
    model = FingerprintVAE(12, latent=3, hidden=[8], prior_std=2.0).double()
    x = alike(6, bits=12).double()
    code, kl = model.divergence(x, key=torch.tensor([1, 2]))
    mean, logvar = model.head.linear(model.body(x)).chunk(2, -1)
    by_hand = (math.log(2) - logvar / 2 + (logvar.exp() + mean**2) / 8 - 0.5).sum(1)
    torch.testing.assert_close(kl, by_hand)
    noise = (code - mean) / (logvar / 2).exp()
    assert noise.abs().max() > 0.1  # training draws
    torch.testing.assert_close(model.divergence(x, key=torch.tensor([1, 2]))[0], code)
    assert not torch.equal(model.divergence(x, key=torch.tensor([1, 3]))[0], code)
    model.eval()
    torch.testing.assert_close(model.encode(x), model.head.linear(model.body(x)).chunk(2, -1)[0])


def test_adversarial_losses_by_hand():
    judge_ = nn.Linear(3, 1).double()
    code, prior = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, dtype=torch.float64)
    real, fake = (torch.sigmoid(judge_(of)).flatten() for of in (prior, code))
    by_hand = -((1 - fake).log().sum() + real.log().sum()) / 10
    loss = discriminator_loss(judge_, code, prior)
    torch.testing.assert_close(loss, by_hand)
    assert torch.autograd.grad(loss, code, allow_unused=True, retain_graph=True)[0] is None
    fooling = encoder_loss(judge_, code, prior)
    torch.testing.assert_close(fooling, -fake.log().mean())
    assert torch.autograd.grad(fooling, code)[0].abs().sum() > 0


def test_discriminator_is_at_ln_2_where_there_is_nothing_to_tell():
    torch.manual_seed(0)
    model = FingerprintAAE(latent=3)
    adam = torch.optim.Adam(model.discriminator.parameters(), 1e-3)
    losses = []
    for _ in range(100):
        loss = discriminator_loss(model.discriminator, torch.randn(512, 3), torch.randn(512, 3))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    # Of codes that are draws of the prior; the last 30 had a mean of 0.6945 to 0.6963 with five seeds.
    assert np.mean(losses[-30:]) == pytest.approx(math.log(2), abs=0.01)
    far = [discriminator_loss(model.discriminator, torch.randn(512, 3) + 5, torch.randn(512, 3)) for _ in range(3)]
    for _ in range(60):
        loss = discriminator_loss(model.discriminator, torch.randn(512, 3) + 5, torch.randn(512, 3))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.3 < far[0]


@pytest.mark.parametrize("kind", MODELS)
def test_bad_networks(kind):
    with pytest.raises(ValueError, match="latent"):
        kind(latent=0)
    with pytest.raises(ValueError, match="prior_std"):
        kind(prior_std=0.0)


# --- training ---


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_short_training_learns(name):
    system, data = made(name)
    before = system.model.eval() and system.validate(data)
    go_on(system, data, range(60))
    after = system.validate(data)
    assert next(iter(after)) == ("bound" if name == "fingerprint-vae" else "nats")
    # 120 before; 35 and 42 after. The noise of the bits alone is 166 H(1/20) = 33 nats.
    assert before["nats"] > 100 and after["nats"] < 70
    assert after["bit accuracy"] > before["bit accuracy"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_depends_on_weights_step_and_draw_alone(name):
    whole, data = made(name)
    go_on(whole, data, range(6))
    first, _ = made(name)
    go_on(first, data, range(3))
    second, _ = made(name)
    second.model.load_state_dict(first.model.state_dict())
    for adam, other in zip(second.optimizers(), first.optimizers(), strict=True):
        adam.load_state_dict(other.state_dict())
    torch.manual_seed(123)
    go_on(second, data, range(3, 6))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_the_adversary_takes_turns_each_on_its_own_batch():
    system, data = made("fingerprint-aae", batch_size=32)
    seen = []
    system.unpacked = lambda packed, unpack=system.unpacked: seen.append(packed) or unpack(packed)
    system.model.train()
    names = []
    for update in system.updates(data, 0, Draw(0)):
        names.append(update.name)
        before = {key: value.clone() for key, value in system.model.named_parameters()}
        system.model.zero_grad(set_to_none=True)
        update.loss.backward()
        update.optimizer.step()
        changed = {key.split(".")[0] for key, value in system.model.named_parameters() if not value.equal(before[key])}
        wanted = {"discriminator": {"discriminator"}, "encoder": {"body", "head"}}
        assert changed == wanted.get(update.name, {"body", "head", "decoder"})
    assert names == ["discriminator", "encoder", "autoencoder"]
    assert all(not a.equal(b) for a, b in itertools.combinations(seen, 2))


def test_the_weight_of_the_regularizer_counts():
    nats = {}
    for weight in (0.0, 5.0):
        system, data = made("fingerprint-vae", weight=weight)
        nats[weight] = go_on(system, data, range(80)).validate(data)
    assert nats[0.0]["kl"] > 2 * nats[5.0]["kl"] and nats[0.0]["nats"] < nats[5.0]["nats"]
    rates = [adam.param_groups[0]["lr"] for adam in made("fingerprint-aae", weight=0.1)[0].adams]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-2])


# --- data in, fingerprints out ---

SMILES = [
    "CCO", "CCN", "CCC", "c1ccccc1", "Cc1ccccc1", "CC(=O)O", "CC(=O)N", "CCCl", "CCBr", "OCCO", "C1CCCCC1", "CC#N",
    "c1ccncc1", "CS", "CS(C)=O", "CP", "O=C1CCCO1", "NCC(=O)O", "Oc1ccccc1", "Nc1ccccc1", "FC(F)F", "CC=O", "COC",
    "C=CC=C", "CN(C)C", "OO",
]  # fmt: skip


def written(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def molecules(tmp_path):
    pytest.importorskip("rdkit")
    return written(tmp_path / "some.smi", [*SMILES, "CCO twice", "nonsense"])


def test_reads_molecules_each_fingerprint_once(molecules):
    kind = find("fingerprint-vae")
    facts, data = kind.read(molecules, kind.Settings(), seed=0, progress=False)
    rows = torch.cat([data.train.packed, data.test.packed])
    assert facts["molecules"] == len(SMILES) + 1 and len(rows) == len(rows.unique(dim=0)) == facts["learned"] + len(
        data.test
    )
    again = kind.read(molecules, kind.Settings(), seed=0, progress=False)[1]
    assert again.test.packed.equal(data.test.packed) and again.test.smiles == data.test.smiles
    assert len(data.train.smiles) == len(data.train)


def test_reads_saved_fingerprints(molecules, tmp_path):
    from fastnuggets.molecules import fingerprints_of_file

    fingerprints_of_file(molecules, out=tmp_path / "some.npz")
    kind = find("fingerprint-aae")
    _, data = kind.read(tmp_path / "some.npz", kind.Settings(), seed=0, progress=False)
    assert data.train.packed.equal(kind.read(molecules, kind.Settings(), seed=0, progress=False)[1].train.packed)
    with pytest.raises(ValueError, match="are maccs, not morgan"):
        kind.read(tmp_path / "some.npz", kind.Settings(kind="morgan"), seed=0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [([], "no molecule"), (["nonsense"], "no molecule"), (["CCO", "CCN"], "2 distinct fingerprints")],
)
def test_too_little_to_learn_from(tmp_path, lines, message):
    pytest.importorskip("rdkit")
    kind = find("fingerprint-vae")
    with pytest.raises(ValueError, match=message):
        kind.read(written(tmp_path / "few.smi", lines), kind.Settings(), seed=0, progress=False)


@pytest.mark.parametrize("bad", [{"latent": 0}, {"prior_std": 0.0}, {"weight": -1.0}, {"tested": 1.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        find("fingerprint-vae").Settings(**bad)


def test_weights_of_other_settings_do_not_fit():
    small, other = made("fingerprint-vae")[0], made("fingerprint-vae", latent=5)[0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.model.load_state_dict(small.model.state_dict())


@pytest.mark.parametrize("name", SYSTEMS)
def test_generates_by_seed(name, molecules):
    system = made(name)[0]
    first = list(system.generate(30, seed=1))
    assert len(first) == 30 and all(len(line) == 166 and set(line) <= {"0", "1"} for line in first)
    assert first == list(system.generate(30, seed=1)) != list(system.generate(30, seed=2))
    assert first[:7] == list(system.generate(7, seed=1))  # a shorter call is the beginning of a longer one
    rounded = list(system.generate(30, seed=1, rounded=True))
    assert rounded == list(system.generate(30, seed=1, rounded=True)) != first
    lines = [line.split("\t") for line in system.generate(3, seed=1, database=str(molecules))]
    assert [line[0] for line in lines] == first[:3] and all(line[1] and float(line[3]) < 0 for line in lines)
    with pytest.raises(TypeError, match="temperature"):
        system.generate(1, seed=0, temperature=1.0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_evaluates_a_file(name, tmp_path):
    pytest.importorskip("rdkit")
    system, data = made(name)
    table = written(tmp_path / "some.csv", ["smiles,number", *(f"{one},{len(one)}" for one in SMILES)])
    found = system.evaluate(table, seed=3)
    x = torch.from_numpy(Fingerprints(np.array(_packed(SMILES)), 166, "maccs").unpack()).float()
    with torch.no_grad():
        logits = system.model(x)
    assert found["nats"] == pytest.approx(bits_loss(logits, x).mean().item(), rel=1e-5)
    assert found["molecules"] == len(SMILES) and 1 <= found["coverage of 1000"] <= len(SMILES)
    assert {"R² of logP", "R² of number"} <= set(found) and found == system.evaluate(table, seed=3)
    sections = system.sections(data)
    assert len(sections) == 2 and all("<svg" in section.html for section in sections)


def _packed(smiles):
    from fastnuggets.molecules.fingerprints import fingerprints

    return fingerprints(smiles, processes=0).packed


# --- what is measured ---


def test_nearest_is_the_likeliest_row(monkeypatch):
    monkeypatch.setattr("fastnuggets.systems.fingerprint_measures._BLOCK", 7)
    x, logits = alike(40).double(), torch.randn(5, 166, dtype=torch.float64)
    p = logits.sigmoid()
    scores = (x[None] * p[:, None].log() + (1 - x[None]) * (1 - p[:, None]).log()).sum(2)
    found = nearest(logits, pack(x), k=3)
    best = scores.topk(3)
    torch.testing.assert_close(found.score, best.values)
    assert found.row.equal(best.indices)
    mean, std = moments(pack(x), 166)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(std, x.std(0, correction=0))


def test_coverage_of_the_data_itself():
    x = alike(50).unique(dim=0)
    drawn = judge(20 * (2 * x - 1), pack(x))
    assert drawn.covered == len(x) and drawn.best == pytest.approx(0, abs=1e-4)
    assert drawn.mean_cosine == pytest.approx(1) and drawn.std_cosine == pytest.approx(1)
    assert judge(20 * (2 * x[:1] - 1).expand(9, -1), pack(x)).covered == 1


def test_ks_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for n, shift in ((12, 0.0), (200, 0.1), (200, 0.5)):
        values = torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) * 2 + shift
        ours = ks_distance(values, 2.0)
        theirs = [stats.kstest(column, "norm", args=(0, 2)) for column in values.double().T.numpy()]
        np.testing.assert_allclose(ours, [one.statistic for one in theirs], atol=1e-12)
        # Stephens' approximation: 0.021 from the exact p of 12 values at most, 0.002 of 200.
        np.testing.assert_allclose(ks_p(ours, n), [one.pvalue for one in theirs], atol=0.03 if n == 12 else 0.005)


def test_energy_tells_distributions_apart():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(80, 3, generator=generator) for _ in range(2))
    found, p = energy_test(a, b, 99, 0)
    by_hand = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    assert found == pytest.approx(by_hand.item(), abs=1e-5) and p > 0.05
    assert energy_test(a, 2 * b, 99, 0)[1] == 0.01


def test_regression_of_what_is_linear():
    codes = torch.randn(60, 3)
    values = codes @ torch.tensor([1.0, -2.0, 0.5]) + 4
    score, predicted = regression(codes, values)
    assert score == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(predicted.float(), values, atol=1e-4, rtol=1e-4)
    assert regression(codes, torch.randn(60))[0] < 0.3
