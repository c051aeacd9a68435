"""The newer conventional models: what each paper's equations say, and what every script needs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_backbone
from delrec.backbone import batches, bert4rec, contrast, models
from delrec.backbone.bsarec import low_pass
from delrec.backbone.lru import recurrence

N_ITEMS = 30
# they have a state at each position; of those that are causal later items do not move it
STATES = [name for name, model in models.ALL.items() if not model.one_state]
CAUSAL = [name for name in STATES if not models.ALL[name].cloze]


def small(name, history=8, **more):
    """A model that does not train, its weights large enough that a difference shows."""
    torch.manual_seed(0)
    own = {"history": history, "width": 8, "dropout": 0.3}
    cfg = SimpleNamespace(**(train_backbone.ALL[name] | own | more))
    model = models.build(name, N_ITEMS, cfg).eval()
    torch.nn.init.normal_(model.item.weight[1:].detach())
    torch.nn.init.normal_(model.bias)
    return model


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_state_does_not_move_when_a_later_item_changes(name):
    model = small(name)
    seq_BL = torch.tensor([[0, 0, 3, 7, 1, 9, 4, 2], [5, 3, 3, 8, 1, 9, 4, 2]])
    other_BL = seq_BL.clone()
    other_BL[:, 5:] = torch.tensor([20, 21, 22])
    x_BLE, other_BLE = model(seq_BL), model(other_BL)
    torch.testing.assert_close(x_BLE[:, 2:5], other_BLE[:, 2:5])
    assert (x_BLE[:, 5:] - other_BLE[:, 5:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_the_last_state_alone_is_the_last_of_all(name):
    model = small(name)
    seq_BL = torch.tensor([[0, 0, 3, 7, 1, 9, 4, 2], [5, 3, 3, 8, 1, 9, 4, 2]])
    torch.testing.assert_close(model(seq_BL, last=True), model(seq_BL)[:, -1:])


def windows(lengths, L=40):
    """Windows (B, L) of so many items each, padded on the left."""
    seq_BL = torch.randint(1, N_ITEMS + 1, (len(lengths), L), generator=torch.manual_seed(0))
    return seq_BL * (torch.arange(L) >= L - torch.tensor(lengths)[:, None])


SHORT = [2, 40, 1, 1, 2, 0, 1, 3]


@pytest.mark.parametrize("name", STATES)
def test_windows_in_parts_have_the_states_and_gradients_of_one_batch(name):
    seq_BL = windows(SHORT)
    model, whole = small(name, 40), small(name, 40)
    x_BLE, want_BLE = models.states(model, seq_BL), whole(seq_BL)
    is_item_BL = seq_BL != 0
    torch.testing.assert_close(x_BLE[is_item_BL], want_BLE[is_item_BL])
    for states_BLE in (x_BLE, want_BLE):
        states_BLE[is_item_BL].square().sum().backward()
    torch.testing.assert_close(model.item.weight.grad, whole.item.weight.grad)


@pytest.mark.parametrize(
    "name, seq_BL, columns",
    [
        ("sasrec", windows(SHORT), [2 * 1, 2 * 1, 2 * 2, 2 * 40]),
        (
            "sasrec",
            windows([40, 40, 37, 40, 40, 25, 40, 40]),
            [8 * 40],
        ),  # hardly anything to leave out
        ("sasrec", windows([2, 20, 1, 1, 2, 0, 1, 3], 20), [8 * 20]),  # parts would cost more
        ("caser", windows(SHORT), [8 * 40]),  # its padding counts
    ],
)
def test_padding_is_left_out_where_that_pays(name, seq_BL, columns):
    model, seen = small(name, seq_BL.shape[1]), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    models.states(model, seq_BL)
    assert seen == columns


# ---------------------------------------------------------------- eSASRec


def plain_attention(layer, y_LE):
    """Causal attention of one head and one row, by torch."""
    q, (k, v) = layer.q(y_LE), layer.kv(y_LE).chunk(2, -1)
    return layer.out(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0])


def forced(model, bias):
    """The model with gates that say the same whatever they read."""
    for block in model.blocks:
        for gate in (block.gate1, block.gate2):
            gate.weight.data.zero_()
            gate.bias.data.fill_(bias)
    return model


@torch.no_grad()
def test_closed_gates_leave_the_input_and_open_ones_make_a_plain_pre_norm_block():
    seq_BL = torch.tensor([[5, 3, 8, 1, 9, 4, 2, 6]])
    closed = forced(small("esasrec"), -100.0)
    y_LE = (closed.item(seq_BL) + closed.position.weight.flip(0))[0]
    torch.testing.assert_close(closed(seq_BL)[0], y_LE)
    opened = forced(small("esasrec"), 100.0)
    for block in opened.blocks:
        y_LE = y_LE + plain_attention(block.attention, block.norm1(y_LE))
        v_LE, ff = block.norm2(y_LE), block.ff
        y_LE = y_LE + (F.silu(v_LE @ ff.w1.weight.T) * (v_LE @ ff.w3.weight.T)) @ ff.w2.weight.T
    torch.testing.assert_close(opened(seq_BL)[0], y_LE)


@torch.no_grad()
def test_the_gates_read_the_input_and_not_its_norm():
    model = small("esasrec")
    block, y_BLE = model.blocks[0], torch.randn(1, 4, 8)
    see_BLL = torch.ones(1, 4, 4, dtype=torch.bool)
    block.gate2.weight.data.zero_()
    block.gate2.bias.data.fill_(-100.0)
    added = block(y_BLE, see_BLL, 4) - y_BLE
    half = block.attention(block.norm1(y_BLE), see_BLL, 4)
    gate = torch.sigmoid(y_BLE @ block.gate1.weight.T + block.gate1.bias)
    torch.testing.assert_close(added, gate * half)


# ---------------------------------------------------------------- BSARec


def filtered_by_fft(y_BLE, c):
    """What BSARec's own code does: real Fourier transform over positions, cut, back."""
    bins = torch.fft.rfft(y_BLE, dim=1, norm="ortho")
    bins[:, c // 2 + 1 :] = 0
    return torch.fft.irfft(bins, n=y_BLE.shape[1], dim=1, norm="ortho")


@pytest.mark.parametrize("L", [1, 2, 4, 5, 8, 50, 51])
@pytest.mark.parametrize("c", [1, 3, 5, 9])
def test_the_fixed_matrix_is_the_low_pass_of_a_fourier_transform(L, c):
    y_BLE = torch.randn(2, L, 3, generator=torch.Generator().manual_seed(L))
    torch.testing.assert_close(low_pass(L, c) @ y_BLE, filtered_by_fft(y_BLE, c))


@torch.no_grad()
def test_a_block_of_bsarec_is_its_equations():
    block, y_BLE = small("bsarec").blocks[0], torch.randn(2, 8, 8)
    see_BLL = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, -1, -1)
    low_BLE = filtered_by_fft(y_BLE, 5)
    d_BLE = F.layer_norm(low_BLE + block.beta**2 * (y_BLE - low_BLE) + y_BLE, (8,))
    a_BLE = torch.stack([plain_attention(block.attention, y_LE) for y_LE in y_BLE])
    z_BLE = 0.7 * d_BLE + 0.3 * F.layer_norm(a_BLE + y_BLE, (8,))
    want = F.layer_norm(block.ffn.outer(F.gelu(block.ffn.inner(z_BLE))) + z_BLE, (8,))
    found = block(y_BLE, see_BLL, low_pass(8, 5))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block(y_BLE, see_BLL, low_pass(8, 5)[-1:]), found[:, -1:])


@torch.no_grad()
def test_bsarec_hears_its_padding_so_another_window_is_another_model():
    short, long = small("bsarec", 8), small("bsarec", 12)
    own = short.state_dict()
    tail = own["position.weight"]
    position = torch.cat([torch.zeros(4, 8), tail])
    long.load_state_dict(own | {"position.weight": position})
    gap = models.score(short, [[3, 7]])[0, 1:] - models.score(long, [[3, 7]])[0, 1:]
    assert gap.abs().max() > 1e-2


# ---------------------------------------------------------------- LRURec


@pytest.mark.parametrize("L", [1, 2, 3, 8, 13, 50])
def test_the_recurrence_is_a_loop_over_the_places_and_a_sum_of_powers(L):
    draw = torch.Generator().manual_seed(L)
    u_BLS = torch.randn(2, L, 5, generator=draw, dtype=torch.complex64)
    turn = 6.28 * torch.rand(5, generator=draw)
    lam_S = torch.polar(0.8 + 0.19 * torch.rand(5, generator=draw), turn)
    h_BS, found = torch.zeros(2, 5, dtype=torch.complex64), recurrence(u_BLS, lam_S)
    for t in range(L):
        h_BS = lam_S * h_BS + u_BLS[:, t]
        torch.testing.assert_close(found[:, t], h_BS, rtol=1e-4, atol=1e-4)
    faded = lam_S ** torch.arange(L - 1, -1, -1)[:, None]
    torch.testing.assert_close(found[:, -1], (faded * u_BLS).sum(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_block_of_lrurec_is_its_equations():
    block, y_BLE = small("lrurec").blocks[0], torch.randn(2, 8, 8)
    real_BL = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    lru, (re_w, im_w) = block.lru, block.lru.inward.weight.chunk(2)
    lam_S = torch.exp(-lru.nu.exp() + 1j * lru.theta.exp())
    assert lam_S.abs().min() >= 0.8 and lam_S.abs().max() <= 0.99 and lam_S.shape == (16,)
    torch.testing.assert_close(lru.log_gamma.exp() ** 2, 1 - lam_S.abs() ** 2)
    W_in, b = torch.complex(re_w, im_w), torch.complex(*lru.inward.bias.chunk(2))
    re_w, im_w = lru.outward.weight.chunk(2, 1)
    W_out = torch.complex(re_w, -im_w)  # Re(W h) = re(W) re(h) - im(W) im(h)
    for row, (y_LE, real_L) in enumerate(zip(y_BLE, real_BL)):
        h_S, y_LE = torch.zeros(16, dtype=torch.complex64), y_LE[real_L]
        for t, y_E in enumerate(y_LE):
            h_S = lam_S * h_S + lru.log_gamma.exp() * (W_in @ y_E.to(W_in.dtype) + b)
            x_E = (W_out @ h_S).real + lru.outward.bias
            z_E = F.layer_norm(x_E + y_E, (8,))
            want = F.layer_norm(block.ffn.outer(F.gelu(block.ffn.inner(z_E))) + z_E, (8,))
            found = block(y_BLE, real_BL, 8)[row, int((~real_L).sum()) + t]
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- BERT4Rec


def cloze_batches(data):
    """Every batch of an epoch of BERT4Rec."""
    cfg = dict(model="bert4rec", history=8, batch=64, loss="ce", seed=0, one_target=False)
    cfg = SimpleNamespace(**cfg)
    targets = batches.Targets(cfg, data)
    for step, (first, last) in enumerate(targets.epoch(1)):
        yield targets.batch(first, last, 1, step)


def test_each_window_hides_a_fifth_of_its_items_and_at_least_one(cycle):
    parts = list(cloze_batches(cycle))
    seq_BL = np.concatenate([part.seq_BL for part in parts])
    target_BL = np.concatenate([part.target_BL for part in parts])
    is_hidden_BL = seq_BL == bert4rec.MASK
    assert (is_hidden_BL == (target_BL > 0)).all() and is_hidden_BL.any(1).all()
    last_n = np.concatenate([part.last_B for part in parts])
    place_BL = last_n[:, None] - np.arange(7, -1, -1)
    real_BL = seq_BL != 0
    whole_BL = np.where(is_hidden_BL, target_BL, seq_BL)
    assert (whole_BL[real_BL] == cycle.items[place_BL[real_BL]]).all()
    many = real_BL.all(1)
    assert is_hidden_BL[many, :-1].mean() == pytest.approx(0.2, abs=0.03)
    allowed = np.union1d(cycle.train, np.asarray(cycle.ptr)[:-1])
    assert np.isin(place_BL[real_BL], allowed).all()  # nothing of validation or test


@torch.no_grad()
def test_bert4rec_is_told_nothing_of_what_it_shall_say():
    model, rng = small("bert4rec"), np.random.default_rng(0)
    items_BL = rng.integers(1, N_ITEMS + 1, (4, 8))
    seq_BL, target_BL = bert4rec.hide(np.roll(items_BL, 1, 1), items_BL, np.random.default_rng(1))
    other_BL = np.where(target_BL > 0, items_BL % N_ITEMS + 1, items_BL)
    again_BL, told_BL = bert4rec.hide(np.roll(other_BL, 1, 1), other_BL, np.random.default_rng(1))
    assert (again_BL == seq_BL).all() and (told_BL[target_BL > 0] != target_BL[target_BL > 0]).all()
    # the state at a hidden item hears both sides
    window_BL = torch.tensor([[0, 3, 7, bert4rec.MASK, 9, 2]])
    state_E = model(window_BL)[0, 3]
    for place in (1, 2, 4, 5):
        moved_BL = window_BL.clone()
        moved_BL[0, place] = 25
        assert (model(moved_BL)[0, 3] - state_E).abs().max() > 1e-5


@torch.no_grad()
def test_a_history_is_its_last_items_and_a_hidden_one():
    model = small("bert4rec")
    history_BL = torch.tensor([[5, 3, 8, 1, 9, 4, 2, 6]])
    window_BL = torch.tensor([[3, 8, 1, 9, 4, 2, 6, bert4rec.MASK]])
    torch.testing.assert_close(model(history_BL, last=True), model(window_BL)[:, -1:])
    x_BE = models.state(model, [[3, 7]])
    window_BL = torch.tensor([[0, 0, 0, 0, 0, 3, 7, bert4rec.MASK]])
    torch.testing.assert_close(x_BE, model(window_BL)[:, -1])
    assert len(model.item.weight) == N_ITEMS + 1


def test_changed_histories_are_made_of_the_items_that_bert4rec_hides(cycle, alone, monkeypatch):
    given, cfg = [], dict(model="bert4rec", history=8, width=16, dropout=0, seed=0)
    cfg = SimpleNamespace(**cfg, contrast=0.5, contrast_tau=0.5)
    made = contrast.views_of
    monkeypatch.setattr(
        contrast, "views_of", lambda seq_BL, *rest: given.append(seq_BL) or made(seq_BL, *rest)
    )
    net, batch = models.build("bert4rec", cycle.n_items, cfg), next(cloze_batches(cycle))
    contrast.add_mask(net, cfg)
    contrast.Contrast(cfg, cycle).term(net, batch, (0, 0), alone)
    place_BL = batch.last_B[:, None] - np.arange(7, -1, -1)
    real_BL = batch.seq_BL != 0
    assert (batch.seq_BL == bert4rec.MASK).any()
    assert (given[0][real_BL] == cycle.items[place_BL[real_BL]]).all()
