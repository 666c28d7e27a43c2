"""The three passes over the weights, in torch and in Triton: where the weights go, with which bits, and that they come back.

Each back end is held to a float64 computation and to `philox.bits16`; the two are held to each other, bit for bit under
the interpreter. A compiled kernel fuses multiply and add, so a float32 anchor may differ in its last bit there.
"""

import itertools
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gapo_kernels import philox
from gapo_kernels import perturbation as torch_version
from gapo_kernels.perturbation import Move
from grids import BF16, DIGITS, F16, F32, F64, INTEGERS, assert_rounded, bits, cast_to_grid, coarsest, spacing

# theta, direction, grid.
SAME = [(F64, F64, F64), (F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16)]
MIXED = [(F32, F32, BF16), (F32, BF16, F16), (BF16, F32, BF16), (F16, F32, F16), (BF16, BF16, F32), (F64, F32, F32)]
COMBINATIONS = [
    pytest.param(combination, id="-".join(str(dtype).removeprefix("torch.") for dtype in combination))
    for combination in SAME + MIXED
]
GEOMETRIES = ["asam", "sam"]
SIZES = [1, 5, 1023, 8191, 8192, 8193, 3 * 8192 + 17]


@pytest.fixture
def perturbation(backend):
    """The class under test."""
    if backend == "torch":
        return torch_version.Perturbation
    from gapo_kernels.kernels.perturbation import Perturbation

    return Perturbation


def make_move(n, dtypes, device, number=3, first=0, shard=0, offset=0, alias=False, seed=0):
    """A move with theta, g of about 1, spread over some powers of two, in views that begin at `offset`."""
    theta_dtype, direction_dtype, grid = dtypes
    generator = torch.Generator().manual_seed(seed)
    theta, g, spread = torch.randn(3, n, generator=generator, dtype=F64)

    def place(values, dtype):
        storage = torch.full((offset + n + 8,), 7.0, dtype=dtype, device=device)
        return storage[offset : offset + n].copy_(values)

    direction = place(g, direction_dtype)
    original = direction if alias else place(torch.zeros(n), theta_dtype)
    return Move(place(theta * spread.exp(), theta_dtype), direction, original, grid, number, first, shard)


def exact(move, geometry, step_size):
    """(what the anchor lies around, delta) in float64, from the rounded inputs."""
    theta, g = move.theta.double().clone(), move.direction.double()
    return cast_to_grid(move.theta, move.grid), step_size * (theta * theta * g if geometry == "asam" else g)


def check_anchor(move, base, delta, stats, stochastic):
    """theta~ and the statistics against float64, inputs from before the exchange."""
    assert_rounded(move.theta, move.original, move.grid, base, delta, stochastic)
    tolerance = dict(rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[0], delta.square().sum(), **tolerance)
    if coarsest(move.grid, move.theta.dtype) == move.grid:  # else theta~ is rounded once more, after the statistics
        anchor = cast_to_grid(move.theta, move.grid)
        torch.testing.assert_close(stats[1], (anchor - base).square().sum(), **tolerance)
        assert stats[2] == (anchor != base).sum()


# ---- The generator ----


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Random123's own vectors."""
    c0, *others = counter
    got = philox.philox(torch.tensor([c0]), *others, seed=key[0] | key[1] << 32)
    assert tuple(word.item() for word in got) == words


PLACES = [  # number, shard, step, seed
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (0, 0, 0, 2**31),
    (0, 0, 0, 2**32),
    (0, 0, 0, 2**63),
    (7, 5, 2**31, 2**32 - 1),
    (2**32 - 1, 2**31 - 1, 2**32 - 1, 2**64 - 1),
]


@pytest.mark.parametrize("grid", [BF16, F16])
@pytest.mark.parametrize("place", PLACES)
def test_bits_are_those_of_philox(perturbation, device, grid, place):
    """theta + delta = 1 + k / 2^16 of a step, exactly: how each of these rounds is known from its 16 bits."""
    number, shard, step, seed = place
    n = 8192 + 2100
    k = torch.randint(2**16, (n,), generator=torch.Generator().manual_seed(1))
    if grid == F16:
        k = k // 8 * 8  # float32 has 13 bits more than float16
    step_above_1 = 2.0 ** -DIGITS[grid][0]
    g = (k.double() * 2**-16 * step_above_1).float().to(device)
    move = Move(torch.ones(n, device=device), g, torch.empty(n, device=device), grid, number, shard=shard)
    perturbation([move], "sam", True).exchange(1.0, seed, step)
    random = philox.bits16(0, n, number, shard, step, seed, torch.device("cpu"))
    up = k + random >= 2**16 if grid == BF16 else random < k
    assert torch.equal(move.theta.cpu(), 1 + up * step_above_1)
    assert 0 < up.sum() < n


def test_which_bits_are_an_elements():
    """The mapping that philox.py's head describes, spelt out for some elements."""
    number, shard, step, seed = 7, 5, 2**31, 2**40 + 1
    drawn = philox.bits16(0, 3 * 8192, number, shard, step, seed, torch.device("cpu"))
    for element in (0, 1, 1023, 1024, 2048 + 17, 8191, 8192, 2 * 8192 + 5 * 1024 + 3):
        tile, group, lane = element // 8192, element // 1024 % 8, element % 1024
        words = philox.philox(torch.tensor([1024 * tile + lane]), 2 * shard, number, step, seed)
        assert drawn[element] == words[group // 2].item() >> 16 * (group % 2) & 0xFFFF


def test_places_differ():
    """Another parameter, shard, step or seed: other bits."""
    drawn = [philox.bits16(0, 64, *place, torch.device("cpu")) for place in PLACES]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_parts_draw_what_the_whole_draws():
    whole = philox.bits16(0, 3 * philox.TILE, 1, 2, 3, 4, torch.device("cpu"))
    for start, stop in [(philox.TILE, 2 * philox.TILE + 5), (7, 9), (philox.TILE - 1, philox.TILE + 1), (5, 3 * philox.TILE)]:
        part = philox.bits16(start, stop - start, 1, 2, 3, 4, torch.device("cpu"))
        assert torch.equal(whole[start:stop], part)


# ---- Noise ----


def test_noise_by_hand(perturbation, device):
    """Box-Muller: a counter serves the elements at its lane of a tile's four groups, two from each pair of words."""
    for counter in (0, 1027, 2**32 - 1):
        words = philox.philox(torch.tensor([counter]), 2 * 5 + 1, 7, 2, seed=11)
        a, b, c, d = ((word.item() + 0.5) / 2**32 for word in words)
        expected = []
        for u, v in ((a, b), (c, d)):
            radius = math.sqrt(-2 * math.log(u))
            expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
        tile, lane = divmod(counter, 1024)
        values = torch.empty(4096 - lane, device=device)
        perturbation.fill_with_noise([values], [(4096 * tile + lane, 7, 5)], 2, 11)
        torch.testing.assert_close(values[::1024].cpu(), torch.tensor(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_noise_of_parts_is_that_of_the_whole(perturbation, device, dtype):
    """Whatever part of a parameter this is; what lies around the parts stays as it was."""
    parts = [(1, 0, 0, 0), (5, 1, 3, 0), (4096, 4098, 2**32 - 1, 5), (4097, 6, 1, 2**31 - 1)]
    parts += [(9000, 2**34 - 9001, 0, 0), (12_300, 4094, 4, 0), (0, 0, 2, 0)]
    step, seed = 2**31, 2**63 + 2**32 + 1
    storage, values, end = torch.full((30_000,), 7.0, dtype=dtype, device=device), [], 1
    for size, *_ in parts:
        values.append(storage[end : end + size])
        end += size + 1
    perturbation.fill_with_noise(values, [tuple(place) for _, *place in parts], step, seed)
    for value, (size, first, number, shard) in zip(values, parts):
        expected = philox.normal(first, size, number, shard, step, seed, torch.device("cpu"))
        tolerance = {BF16: 2.0**-7, F16: 2.0**-10}.get(dtype, 1e-6)
        torch.testing.assert_close(value.cpu().double(), expected.double(), atol=2e-6, rtol=tolerance)
        value.fill_(7.0)
    assert (storage == 7.0).all()


# ---- Where the weights go ----


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtypes", COMBINATIONS)
def test_anchor_against_float64(perturbation, device, dtypes, geometry, stochastic):
    """Each statement on its own parameter: one Perturbation has but one triple of sums."""
    for n in (5, 8193):
        move = make_move(n, dtypes, device)
        base, delta = exact(move, geometry, 0.03)
        theta = move.theta.clone()
        scaled = move.direction.double() * (theta.double() if geometry == "asam" else 1)
        subject = perturbation([move], geometry, stochastic)
        torch.testing.assert_close(subject.squared_norm(), scaled.square().sum(), rtol=1e-5, atol=0)
        assert torch.equal(bits(move.theta), bits(theta))
        check_anchor(move, base, delta, subject.exchange(0.03, 5, 1), stochastic)
        assert torch.equal(bits(move.original), bits(theta))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)])
def test_sizes(perturbation, device, n, dtypes):
    """Whole and ragged tiles, in views that are aligned and not; what lies behind the views stays as it was."""
    for offset in (0, 1):
        move = make_move(n, dtypes, device, offset=offset)
        theta = move.theta.clone()
        base, delta = exact(move, "asam", 0.03)
        subject = perturbation([move], "asam", True)
        scaled = theta.double() * move.direction.double()
        torch.testing.assert_close(subject.squared_norm(), scaled.square().sum(), rtol=1e-5, atol=0)
        check_anchor(move, base, delta, subject.exchange(0.03, 5, 1), True)
        assert torch.equal(bits(move.original), bits(theta))
        subject.restore()
        assert torch.equal(bits(move.theta), bits(theta))
        for view in (move.theta, move.direction, move.original):
            everything = torch.empty(0, dtype=view.dtype, device=device).set_(view.untyped_storage())
            assert (everything[:offset] == 7).all() and (everything[offset + n :] == 7).all()


def many_moves(device, alias):
    """Dtypes in turn, sizes around a tile's, one empty, one not aligned."""
    sizes = [8193, 5, 0, 8192, 100, 1023, 1]
    moves = []
    for i, dtypes in enumerate(SAME + MIXED[:3] + SAME):
        n = sizes[i % len(sizes)]
        same_dtype = dtypes[0] == dtypes[1]
        moves.append(make_move(n, dtypes, device, i, i % 3, offset=i % 2, alias=alias and same_dtype, seed=i))
    return moves


@pytest.mark.parametrize("alias", [False, True], ids=["own original", "original over direction"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_many_parameters(perturbation, device, geometry, alias):
    """As one as each alone: the sums, the anchors and the way back."""
    together, alone = many_moves(device, alias), many_moves(device, alias)
    thetas = [move.theta.clone() for move in together]
    subject = perturbation(together, geometry, True)
    singles = [perturbation([move], geometry, True) for move in alone]
    norm, norms = subject.squared_norm(), [single.squared_norm() for single in singles]
    torch.testing.assert_close(norm, torch.stack(norms).sum())
    stats, single_stats = subject.exchange(0.03, 5, 1), [single.exchange(0.03, 5, 1) for single in singles]
    # Two digits of float32: a dot product adds in another order where its memory is aligned otherwise.
    torch.testing.assert_close(stats, torch.stack(single_stats).sum(0), rtol=2.4e-7, atol=0)
    for move, single, theta in zip(together, alone, thetas):
        assert torch.equal(bits(move.theta), bits(single.theta))
        assert torch.equal(bits(move.original), bits(theta))
        assert not len(theta) or not torch.equal(move.theta, theta)
    subject.restore()
    assert all(torch.equal(bits(move.theta), bits(theta)) for move, theta in zip(together, thetas))


def test_nothing_to_move(perturbation, device):
    subject = perturbation([make_move(0, (F32, F32, F32), device)], "asam", True)
    assert subject.squared_norm() == 0
    assert subject.exchange(0.1, 0, 0).tolist() == [0, 0, 0]
    subject.restore()


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtypes", COMBINATIONS)
def test_back_ends_agree(perturbation, backend, device, interpreted, dtypes, geometry, stochastic):
    """Bit for bit; compiled, a last bit may differ, and with it, seldom, the side that it is rounded to."""
    if backend == "torch":
        pytest.skip("nothing to compare")
    one, other = (make_move(8192 + 1100, dtypes, device, number=9, shard=2) for _ in range(2))
    step_size = torch.tensor(0.1, dtype=F64, device=device)  # not a float32 number
    stats = perturbation([one], geometry, stochastic).exchange(step_size, 2**40 + 3, 6)
    wanted = torch_version.Perturbation([other], geometry, stochastic).exchange(0.1, 2**40 + 3, 6)
    torch.testing.assert_close(stats, wanted, rtol=1e-5, atol=0)
    same = bits(one.theta) == bits(other.theta)
    if interpreted:
        assert same.all()
    elif one.grid in (BF16, F16):
        assert (~same).sum() <= 4
    else:
        torch.testing.assert_close(one.theta, other.theta, rtol=2.0 ** -DIGITS[one.theta.dtype][0], atol=1e-6)


@pytest.mark.parametrize("cuts", [[8, 4096, 8192 + 1024, 2 * 8192], [1, 8191, 8192, 8201, 2 * 8192 + 1]], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, BF16, F16), (BF16, F32, BF16), (F32, F32, F32)])
def test_shards_move_as_the_whole_does(perturbation, device, dtypes, cuts):
    """Wherever rows are cut apart: the same anchor bit for bit, and sums to match."""
    n = 3 * 8192 + 17
    whole, split = (make_move(n, dtypes, device) for _ in range(2))
    before = split.theta.clone()
    shards = [
        split._replace(first=start, theta=split.theta[start:stop], direction=split.direction[start:stop], original=part)
        for start, stop in itertools.pairwise([0, *cuts, n])
        for part in [torch.empty_like(split.theta[start:stop])]
    ]
    one, other = perturbation([whole], "asam", True), perturbation(shards, "asam", True)
    torch.testing.assert_close(one.squared_norm(), other.squared_norm(), rtol=1e-5, atol=0)
    stats = [subject.exchange(0.03, 5, 1) for subject in (one, other)]
    torch.testing.assert_close(*stats, rtol=1e-5, atol=0)
    assert (bits(whole.theta) == bits(split.theta)).all() and (bits(split.theta) != bits(before)).any()
    other.restore()
    assert (bits(split.theta) == bits(before)).all()


def test_step_size_on_the_device(perturbation, device):
    """The same as a float, and rounded to float32 before it is multiplied."""
    anchors = []
    for step_size in (0.1, torch.tensor(0.1, dtype=F64, device=device)):
        move = make_move(100, (F32, F32, F32), device)
        move.theta.fill_(0)
        perturbation([move], "sam", False).exchange(step_size, 0, 0)
        anchors.append(move.theta)
        assert torch.equal(move.theta, move.direction * torch.tensor(0.1))
    assert torch.equal(*anchors)


def test_repeats(perturbation, device):
    """Bit for bit from the same seed, step, number and shard; elsewhere with another."""
    outcomes = []
    for seed, step, number, shard in [
        (5, 1, 3, 0),
        (5, 1, 3, 0),
        (6, 1, 3, 0),
        (5, 2, 3, 0),
        (5, 1, 4, 0),
        (5, 1, 3, 1),
    ]:
        move = make_move(8200, (BF16, BF16, BF16), device, number, shard=shard)
        stats = perturbation([move], "asam", True).exchange(0.03, seed, step)
        outcomes.append((stats, move.theta))
    (stats, theta), (stats_again, theta_again), *others = outcomes
    assert torch.equal(stats, stats_again) and torch.equal(theta, theta_again)
    for i, (_, one) in enumerate([outcomes[0], *others]):
        assert not any(torch.equal(one, other) for _, other in others[i:])


@pytest.mark.parametrize("dtype, first", [(BF16, 0), (BF16, 12_345), (torch.float64, 0)])
def test_threads_change_nothing(dtype, first):
    """Of the torch version, which shares its chunks out, shorter ones over more than four threads."""
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8, 16):
            torch.set_num_threads(threads)
            move = make_move(7 * torch_version.ROUNDED_CHUNK + 77, (dtype,) * 3, torch.device("cpu"), first=first)
            subject = torch_version.Perturbation([move], "asam", True)
            outcomes.append((subject.squared_norm(), subject.exchange(0.03, 5, 1), move.theta))
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcome, outcomes[0]))


class Held(TorchDispatchMode):
    """The most bytes at once of what torch operations have made in here."""

    def __init__(self):
        super().__init__()
        self._alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in made:
            if (place := tensor.untyped_storage().data_ptr()) not in known:
                self._alive[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._alive.pop, place, None)
        self.most = max(self.most, sum(self._alive.values()))
        return result


@pytest.mark.parametrize("threads", [4, 48])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16), (F16, F16, F16), (F32, F32, BF16), (F32, F32, F16), (F64, F64, BF16), (F64, F64, F16)]
)
def test_scratch_of_many_threads_stays_below_64_mib(dtypes, threads):
    """All that one thread holds at its worst, times the threads."""
    before = torch.get_num_threads()
    move = make_move(torch_version.ROUNDED_CHUNK + 5, dtypes, torch.device("cpu"))
    try:
        torch.set_num_threads(threads)
        subject = torch_version.Perturbation([move], "asam", True)
    finally:
        torch.set_num_threads(before)
    subject._chunks = subject._chunks[:1]
    held = 0
    for work in (subject.squared_norm, lambda: subject.exchange(0.03, 5, 1)):
        with Held() as found:
            work()
        held = max(held, found.most)
    assert subject._size * 12 < held and min(threads, subject._threads) * held < 2**26


@pytest.mark.parametrize("theta, most", [(BF16, torch_version.MOST_THREADS), (F64, torch_version.MOST_THREADS // 2)])
def test_few_of_many_threads_have_scratch(theta, most, monkeypatch):
    made, begin = [], torch_version._Scratch.__init__
    monkeypatch.setattr(torch_version._Scratch, "__init__", lambda self, *args: made.append(self) or begin(self, *args))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(192)
        move = make_move(192 * torch_version.SQUARED_TOGETHER, (theta, theta, BF16), torch.device("cpu"))
        torch_version.Perturbation([move], "asam", True).exchange(0.03, 5, 1)
    finally:
        torch.set_num_threads(before)
    assert len(made) == most


# ---- Stochastic rounding ----

ROUNDED = {  # theta: its exponent in the grid's range; float16's subnormal numbers begin at 2^-14
    "bfloat16": (BF16, 0),
    "float16": (F16, 0),
    "float16 subnormal": (F16, -17),
    "float16 across the border": (F16, -14),
}


@pytest.mark.parametrize("grid, exponent", ROUNDED.values(), ids=ROUNDED.keys())
def test_stochastic_rounding_is_unbiased(perturbation, device, grid, exponent):
    """To the two neighbours only, and on average to what was rounded: within 5 standard errors, by the place between."""
    n, seeds = 8192, 12
    generator = torch.Generator().manual_seed(2)
    theta = (torch.randn(n, generator=generator, dtype=F64) * 2.0**exponent).to(grid)
    step = spacing(theta.double().abs().clamp(min=2.0**-60), grid)  # that of zero as well
    fraction = (torch.arange(n) % 16 + torch.rand(n, generator=generator)) / 16
    g = (fraction * step).float()
    g = g.where(theta >= 0, -g)  # away from zero: the spacing there is theta's
    x = (theta.float() + g).double()
    outward = spacing(x, grid) * x.sign()
    lower = (x / outward).floor() * outward
    place = (x - lower) / outward
    error = torch.zeros(16, dtype=F64)
    for seed in range(seeds):
        move = Move(theta.float().to(device), g.to(device), torch.empty(n, device=device), grid, number=0)
        perturbation([move], "sam", True).exchange(1.0, seed, 0)
        up = (move.theta.cpu().double() - lower) / outward
        assert ((up == 0) | ((up == 1) & (place > 0))).all()
        error.index_add_(0, torch.arange(n) % 16, up - place)
    variance = torch.zeros(16, dtype=F64).index_add_(0, torch.arange(n) % 16, place * (1 - place)) * seeds
    assert (error.abs() < 5 * variance.sqrt()).all(), error / variance.sqrt()
    assert abs(error.sum()) < 4 * variance.sum().sqrt()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_values_on_the_grid_stay(perturbation, device, dtype):
    """All of a dtype's finite numbers, with g = 0: none moves, and none is counted."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()].to(device)
    for stochastic in (True, False):
        move = Move(values.clone(), torch.zeros_like(values), torch.empty_like(values), dtype, number=0)
        stats = perturbation([move], "sam", stochastic).exchange(1.0, 3, 0)
        assert torch.equal(bits(move.theta), bits(values)) or torch.equal(move.theta, values)
        assert stats.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_ties_go_to_even(perturbation, device, dtype):
    """To nearest, a hair's breadth around and on the middle between neighbours, as torch's own cast."""
    n = 4000
    theta = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype).float()
    middle = spacing(theta.double(), dtype) / 2
    g = (middle * torch.tensor([1.0, 1 + 2**-6, 1 - 2**-6, -1.0]).repeat(n // 4)).float()
    move = Move(theta.clone().to(device), g.to(device), torch.empty(n, device=device), dtype, number=0)
    perturbation([move], "sam", False).exchange(1.0, 0, 0)
    assert torch.equal(move.theta.cpu(), (theta + g).to(dtype).float())


# ---- The way back ----

AWKWARD = {  # NaNs with a payload (one signalling, one negative), infinities, zeros, subnormal numbers
    2: [0x7FC1, 0x7F81, -0x0001, 0x7F80, 0x7C00, -0x0400, 0, -0x8000, 1, -0x7FFF, 0x7C01, 0x0080],
    4: [0x7FC00001, 0x7F800001, -1, 0x7F800000, -0x800000, 0, -0x80000000, 1, -0x7FFFFFFF, 0x007FFFFF],
    8: [0x7FF8000000000001, 0x7FF0000000000001, -1, 0x7FF0000000000000, 0, -(2**63), 1, 1 - 2**63],
}


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_restores_every_bit(perturbation, device, dtype, offset):
    patterns = torch.tensor(AWKWARD[dtype.itemsize], dtype=torch.int64).to(INTEGERS[dtype.itemsize])
    move = make_move(8192 + 40, (dtype, dtype, dtype), device, offset=offset, alias=True)
    bits(move.theta)[: len(patterns)] = patterns.to(device)
    bits(move.theta)[-len(patterns) :] = patterns.to(device)
    saved = bits(move.theta).clone()
    subject = perturbation([move], "asam", True)
    subject.exchange(0.03, 5, 1)
    assert not torch.equal(bits(move.theta), saved)
    assert torch.equal(bits(move.original), saved)
    subject.restore()
    assert torch.equal(bits(move.theta), saved)


def test_restores_what_was_exchanged_and_once(perturbation, device):
    """Without an exchange, and a second time, nothing is touched; after another exchange, it is."""
    move = make_move(8192 + 40, (F32, F32, F32), device)
    subject = perturbation([move], "asam", True)
    saved = move.theta.clone()
    subject.restore()
    assert torch.equal(move.theta, saved)
    subject.exchange(0.03, 5, 1)
    subject.restore()
    assert torch.equal(move.theta, saved)
    move.theta.add_(1)  # an optimizer's step
    moved = move.theta.clone()
    subject.restore()
    assert torch.equal(move.theta, moved)
    subject.exchange(0.03, 5, 2)
    assert torch.equal(move.original, moved) and not torch.equal(move.theta, moved)
    subject.restore()
    assert torch.equal(move.theta, moved)


class Failing:
    """Launches a kernel as ever, the second time not."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        if self.launches == 2:
            raise MemoryError("the second launch")
        return self.kernel[grid]


def test_restores_after_half_an_exchange(perturbation, backend, device, monkeypatch):
    """What failed half-way is put back where it was moved, and left alone where it was not."""
    moves = [make_move(8192 + 40, dtypes, device) for dtypes in [(F32, F32, F32), (BF16, BF16, BF16)]]
    saved = [move.theta.clone() for move in moves]
    subject = perturbation(moves, "asam", True)
    if backend == "torch":
        move_chunk = torch_version.Perturbation._move

        def fail(self, chunk, *args):
            if chunk.move is moves[1]:
                raise MemoryError("the second move")
            return move_chunk(self, chunk, *args)

        monkeypatch.setattr(torch_version.Perturbation, "_move", fail)
    else:
        from gapo_kernels.kernels import perturbation as kernels

        monkeypatch.setattr(kernels, "exchange_kernel", Failing(kernels.exchange_kernel))
    with pytest.raises(MemoryError):
        subject.exchange(0.03, 5, 1)
    assert not torch.equal(moves[0].theta, saved[0]) and torch.equal(moves[1].theta, saved[1])
    subject.restore()
    assert all(torch.equal(bits(move.theta), bits(theta)) for move, theta in zip(moves, saved))


class Loading:
    """A kernel of which no other version can be loaded any more once memory is full."""

    def __init__(self, kernel):
        self.kernel, self.loaded, self.full = kernel, set(), False

    def __getitem__(self, grid):
        def launch(*arguments, **version):
            if self.full and str(version) not in self.loaded:
                raise MemoryError("no room for a module")
            self.loaded.add(str(version))
            return self.kernel[grid](*arguments, **version)

        return launch


def test_what_restores_is_loaded_before_the_weights_move(perturbation, backend, device, monkeypatch):
    """Out of memory at the anchor leaves none to load a kernel into."""
    if backend == "torch":
        pytest.skip("there is nothing to load")
    from gapo_kernels.kernels import perturbation as kernels

    kernel = Loading(kernels.restore_kernel)
    monkeypatch.setattr(kernels, "restore_kernel", kernel)
    moves = [make_move(40, dtypes, device) for dtypes in [(F32, F32, F32), (BF16, BF16, BF16)]]
    saved = [move.theta.clone() for move in moves]
    subject = perturbation(moves, "asam", True)
    subject.exchange(0.03, 5, 1)
    assert len(kernel.loaded) == 2 and not torch.equal(moves[0].theta, saved[0])
    kernel.full = True
    subject.restore()
    assert all(torch.equal(bits(move.theta), bits(theta)) for move, theta in zip(moves, saved))


def test_nan_reaches_the_norm(perturbation, device):
    """The caller looks at the norm alone before it moves anything."""
    for value in (math.nan, math.inf):
        move = make_move(8200, (BF16, BF16, BF16), device)
        move.direction[8195] = value
        assert not perturbation([move], "asam", True).squared_norm().isfinite()
