from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter, deque
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from titan.parallel.schedule_file import as_csv
from titan.parallel.schedules import LOOPS, STAGES, Table, forward_only, owner, stages_per_rank, table
from titan.parallel.timeline import (
    Action,
    Kind,
    Orders,
    Recv,
    Send,
    Times,
    bubble,
    in_flight,
    needs,
    program,
    programs,
    result_of,
    timeline,
)

SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble")


class Case(NamedTuple):
    name: str
    ranks: int
    stages: int
    micros: int
    table: Table
    times: Times


@cache
def cases() -> list[Case]:
    """Every schedule over ranks, stages a rank and micro batches."""
    found = []
    for name, usual in STAGES.items():
        for p in range(1, 9):
            for v in (1, 2, 3) if name in LOOPS and p in (1, 3, 4) else (usual,):
                for m in (1, 2, 3, 5, 7, 8, 9, 12, 16, 20):
                    if name != "DualPipeV" or m >= 2 * p:
                        schedule = table(name, p, v, m)
                        found.append(Case(name, p, v, m, schedule, timeline(*schedule)))
    return found


def draw(rng: random.Random) -> tuple[Table, int]:
    """A random placement with random orders that run, and its micro batches."""
    ranks, micros = rng.randint(1, 5), rng.randint(1, 6)
    owners = list(range(ranks)) + [rng.randrange(ranks) for _ in range(rng.randint(0, 5))]
    rng.shuffle(owners)
    todo = []
    for stage in range(len(owners)):
        for micro in range(micros):
            todo.append(Action(stage, "F", micro))
            todo += rng.choice([[Action(stage, "B", micro)], [Action(stage, "I", micro), Action(stage, "W", micro)]])
    orders: Orders = [[] for _ in range(ranks)]
    results: set[tuple[int, str, int]] = set()
    while todo:
        action = rng.choice([action for action in todo if results.issuperset(needs(action, len(owners)))])
        todo.remove(action)
        orders[owners[action.stage]].append(action)
        results.add(result_of(action))
    return Table(orders, owners), micros


def stuck(lists: list[list[Action | Send | Recv]], stages: int, per_pair: bool = False) -> list[str]:
    """Carry out all ranks' programs; what each rank that does not come to its end is stuck at.

    Posting does not wait. A transfer completes at the head of both its ranks' queues: one queue a rank, or one for each peer.
    """
    queues: dict[tuple[int, int], deque[tuple[Action, int, int]]] = {}
    place = [0] * len(lists)
    there: list[set[tuple[int, str, int]]] = [set() for _ in lists]
    moved = True
    while moved:
        moved = False
        for rank, items in enumerate(lists):
            while place[rank] < len(items):
                item = items[place[rank]]
                if isinstance(item, Action):
                    if not there[rank].issuperset(needs(item, stages)):
                        break
                    there[rank].add(result_of(item))
                else:
                    ends = (rank, item.peer) if isinstance(item, Send) else (item.peer, rank)
                    if isinstance(item, Send):
                        assert result_of(item.action) in there[rank], f"rank {rank} sends {item.action} before it has it"
                    queues.setdefault((rank, item.peer if per_pair else -1), deque()).append((item.action, *ends))
                place[rank] += 1
                moved = True
        for (rank, _), queue in queues.items():
            while queue:
                action, source, target = queue[0]
                other = queues.get((source + target - rank, rank if per_pair else -1))
                if not other or other[0] != queue[0]:
                    break
                queue.popleft()
                other.popleft()
                there[target].add(result_of(action))
                moved = True
    left = [f"rank {rank} at {items[place[rank]]}" for rank, items in enumerate(lists) if place[rank] < len(items)]
    return left + [f"{ends} wants {queue[0]}" for ends, queue in queues.items() if queue]


def test_each_action_once_on_its_rank_when_what_it_needs_is_there() -> None:
    for name, p, v, m, (orders, owners), times in cases():
        case = (name, p, v, m)
        assert owners == [owner(name, p, stage) for stage in range(p * v)], case
        assert Counter(owners) == dict.fromkeys(range(p), v), case
        assert len(times) == sum(map(len, orders)), case
        passes = Counter((a.stage, a.micro, kind) for a in times for kind in ("IW" if a.kind == "B" else a.kind))
        assert passes == dict.fromkeys(((s, i, kind) for s in range(p * v) for i in range(m) for kind in "FIW"), 1), case
        assert name not in SPLIT or all(a.kind != "B" for a in times), case
        ends = {result_of(action): end for action, (_, end) in times.items()}
        for rank, order in enumerate(orders):
            clock = 0.0
            for action in order:
                start, end = times[action]
                assert owners[action.stage] == rank, (case, action)
                assert start >= max([clock, *(ends[result] for result in needs(action, p * v))]), (case, action)
                assert end - start == (2 if action.kind == "B" else 1), (case, action)
                clock = end


def test_bubbles_are_those_of_the_papers() -> None:
    for name, p, v, m, (_, owners), times in cases():
        idle = {
            "GPipe": 3 * (p - 1),
            "1F1B": 3 * (p - 1),
            "Interleaved1F1B": 3 * (v * max(m, p) + min(m, p) - 1 - v * m),
            # One thin forward a rank: no schedule is shorter, since the last rank cannot start before.
            "InterleavedZeroBubble": p - 1 if m >= p else None,
            "ZBVZeroBubble": p - 1 if m >= 2 * p - 1 else None,
            "DualPipeV": p - 1,
        }[name]
        if idle is not None:
            share = idle / (3 * v * m + idle)
            assert bubble(times, owners) == pytest.approx(share, abs=1e-12), (name, p, v, m)


def test_zero_bubble_is_below_one_forward_one_backward() -> None:
    share = {name: bubble(timeline(*table(name, 8, 0, 16)), table(name, 8, 0, 16).owners) for name in STAGES}
    assert share["GPipe"] == share["1F1B"] == pytest.approx(7 / 23)
    assert share["Interleaved1F1B"] == pytest.approx(7 / 39)
    for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        assert share[name] == pytest.approx(7 / 103)
    usual = {(p, m): bubble(times, owners) for name, p, _, m, (_, owners), times in cases() if name == "1F1B"}
    for name, p, v, m, (_, owners), times in cases():
        if name in SPLIT and p > 1 and v > 1:
            assert bubble(times, owners) < usual[p, m], (name, p, m)
    orders, owners = table("ZBVZeroBubble", 8, 0, 128)
    assert bubble(timeline(orders, owners), owners) < 0.01


def test_activations_held() -> None:
    for name, p, v, m, (orders, _), _ in cases():
        held = in_flight(orders)
        rounds = -(-m // max(1, m // p))  # the largest
        if name == "GPipe":
            assert held == [m] * p
        elif name == "1F1B" or (name == "Interleaved1F1B" and v == 1):
            assert held == [min(m, p - rank) for rank in range(p)], (p, m)
        elif name == "Interleaved1F1B":
            assert max(held) == held[0] == min(v * m, 2 * (p - 1) + (v - 1) * rounds + 1), (p, v, m)
        elif name == "InterleavedZeroBubble":
            assert max(held) <= min(v * m, p + (v - 1) * rounds), (p, v, m)
        elif name == "ZBVZeroBubble":
            assert max(held) == 2 * min(m, p), (p, m)
        else:
            assert held == [2 * p + 1] * p, (p, m)


@pytest.mark.parametrize("name", ["GPipe", *STAGES])
def test_idle_time_no_longer_grows_after_two_rounds(name: str) -> None:
    """Which `titan plan --search` relies on. Of what is held only GPipe's grows."""
    for ranks, stages in ((2, 0), (4, 0), (8, 0), *([(2, 2), (4, 4)] if name in LOOPS else [])):
        found = set()
        for rounds in (2, 3, 5):
            orders, owners = table(name, ranks, stages, rounds * ranks)
            times = timeline(orders, owners)
            span = max(end for _, end in times.values())
            found.add((round(span * bubble(times, owners), 6), name == "GPipe" or tuple(in_flight(orders))))
        assert len(found) == 1, (ranks, stages)


def test_one_stage_interleaved_is_not() -> None:
    assert table("Interleaved1F1B", 4, 1, 7) == table("1F1B", 4, 1, 7)


def test_forward_only() -> None:
    for name, p, v, m, (_, owners), _ in cases():
        if name not in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble"):
            continue  # placed like one of these
        orders = forward_only(owners, m)
        times = timeline(orders, owners)
        assert sorted(times) == [Action(s, "F", i) for s in range(p * v) for i in range(m)]
        assert not stuck(programs(orders, owners), p * v), (name, p, v, m)
        if m >= 2 * p:
            way_back = p - 1 if owners[-1] == 0 else 0
            assert max(end for _, end in times.values()) == v * m + p - 1 + way_back, (name, p, v, m)


def test_timeline_with_costs() -> None:
    times = timeline(*table("1F1B", 2, 0, 2), cost=lambda a: {"F": 1.5, "B": 4}[a.kind] * (1 + a.stage))
    assert {str(action): span for action, span in times.items()} == {
        **{"0F0": (0, 1.5), "0F1": (1.5, 3), "0B0": (12.5, 16.5), "0B1": (23.5, 27.5)},
        **{"1F0": (1.5, 4.5), "1B0": (4.5, 12.5), "1F1": (12.5, 15.5), "1B1": (15.5, 23.5)},
    }


def test_a_deadlock_names_what_each_rank_waits_at() -> None:
    orders, owners = table("1F1B", 3, 0, 2)
    orders[1].insert(0, orders[1].pop())
    with pytest.raises(ValueError, match=r"deadlock: rank 0 at 0B0, rank 1 at 1B1, rank 2 at 2F0 wait"):
        timeline(orders, owners)


def test_no_program_deadlocks() -> None:
    for name, p, v, m, (orders, owners), _ in cases():
        lists = programs(orders, owners)
        assert not stuck(lists, p * v), (name, p, v, m)
        if m in (5, 16):
            assert not stuck(lists, p * v, per_pair=True), (name, p, v, m)


def test_programs_list_each_transfer_once_in_one_order() -> None:
    rng = random.Random(1)
    tables = [draw(rng)[0] for _ in range(60)] + [case.table for case in cases() if case.ranks == 4 and case.micros < 9]
    for orders, owners in tables:
        lists = programs(orders, owners)
        assert not stuck(lists, len(owners)), (orders, owners)
        assert not stuck(lists, len(owners), per_pair=True), (orders, owners)
        sent: Counter[tuple[Action, int, int]] = Counter()
        received: Counter[tuple[Action, int, int]] = Counter()
        expected: set[tuple[Action, int, int]] = set()
        for rank, items in enumerate(lists):
            assert items == program(orders, owners, rank)
            assert [item for item in items if isinstance(item, Action)] == orders[rank]
            sent.update((item.action, rank, item.peer) for item in items if isinstance(item, Send))
            received.update((item.action, item.peer, rank) for item in items if isinstance(item, Recv))
            acted: list[Action] = []
            for item in items:
                if isinstance(item, Action):
                    acted.append(item)
                elif isinstance(item, Send):
                    assert item.action == acted[-1], "a send waits"
        for action in timeline(orders, owners):
            stage = action.stage + {"F": 1, "B": -1, "I": -1, "W": len(owners) + 1}[action.kind]
            if 0 <= stage < len(owners) and owners[stage] != owners[action.stage]:
                expected.add((action, owners[action.stage], owners[stage]))
        assert sent == received == dict.fromkeys(expected, 1), (orders, owners)


def test_the_simulation_finds_a_transfer_out_of_order() -> None:
    orders, owners = table("1F1B", 4, 0, 8)
    lists = programs(orders, owners)
    receives = [i for i, item in enumerate(lists[2]) if isinstance(item, Recv) and item.peer == 1]
    a, b = receives[4:6]
    lists[2][a], lists[2][b] = lists[2][b], lists[2][a]
    assert stuck(lists, 4)
    assert stuck(lists, 4, per_pair=True)


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    rng = random.Random(2)
    some = [draw(rng) for _ in range(60)]
    some += [(case.table, case.micros) for case in cases() if case.ranks <= 4 and case.micros < 10]
    for schedule, micros in some:
        assert _read(path, as_csv(schedule.orders), len(schedule.orders), micros) == schedule
        lines = []
        for line in as_csv(schedule.orders).splitlines():
            cells = [cell if rng.random() < 0.8 else f" {cell} " for cell in line.split(",")]
            for _ in range(rng.randint(0, 5)):
                cells.insert(rng.randint(0, len(cells)), rng.choice(["", "  "]))
            lines.append(",".join(cells))
        text = "\r\n".join(lines) + rng.choice(["", "\r\n", "\r\n\r\n"])
        assert _read(path, text, len(schedule.orders), micros) == schedule, text


def test_broken_files_are_refused_or_run(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    rng = random.Random(3)
    refused = 0
    for trial in range(400):
        schedule, micros = draw(rng)
        rows: list[list[Any]] = [list(order) for order in schedule.orders]
        row, other = rng.choice(rows), rng.choice(rows)
        i, j = rng.randrange(len(row)), rng.randrange(len(other))
        match rng.randrange(5):
            case 0:
                del row[i]
            case 1:
                row[i], other[j] = other[j], row[i]
            case 2:
                row.insert(i, other[j])
            case 3:
                row[i] = row[i]._replace(kind=rng.choice("FBIW"))
            case _:
                row[i] = row[i]._replace(micro=rng.randint(0, micros), stage=rng.randint(0, len(schedule.owners)))
        try:
            orders, owners = _read(path, as_csv(rows), len(rows), micros)
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        assert orders == rows, trial
        assert timeline(orders, owners), trial
    assert 200 < refused < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n", r"has 1 rows, but the pipeline 2 ranks"),
        ("0F0,0X0\n1F0,1B0\n", r"row 1, cell 2 \(0X0\): is not stage, F, B, I or W, and micro batch"),
        ("0F0,(0F0;1B0)OVERLAP_F_B\n1F0,1B0\n", r"row 1, cell 2 .*: is not stage"),
        ("0F0,0B0\n1F0,,1B1\n", r"row 2, cell 3 \(1B1\): there are 1 micro batches, numbered from 0"),
        ("0F0,0B0\n1F0,1B0,0F0\n", r"row 2, cell 3 \(0F0\): stage 0 is in row 1 already"),
        ("0F0,0B0\n1F0,1F0,1B0\n", r"row 2, cell 2 \(1F0\): comes a second time"),
        ("0F0,0I0,0W0,0B0\n1F0,1B0\n", r"row 1, cell 4 \(0B0\): 0I0 is this backward pass already"),
        ("0F0,0B0,0W0\n1F0,1B0\n", r"row 1, cell 3 \(0W0\): needs 0I0 before it in its row"),
        ("0B0,0F0\n1F0,1B0\n", r"row 1, cell 1 \(0B0\): needs 0F0 before it in its row"),
        ("0F0,0B0\n2F0,2B0\n", r"no row has stage 1, though there are stages up to 2"),
        ("0F0,0B0,1F0,1B0\n,\n", r"row 2 has no actions|has 1 rows"),
        ("0F0,0I0\n1F0,1B0\n", r"row 1 lacks 0W0"),
        ("0F0,0B0\n1F0\n", r"row 2 lacks 1B0"),
        ("0F0,0B0,2F0,2B0\n1F0,1B0\n", r"deadlock: rank 0 at 0B0, rank 1 at 1B0 wait .*row 1"),
        ("", r"has 0 rows"),
        ("9999999F0\n1F0\n", r"is not stage"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "schedule.csv", text, 2, 1)


def test_a_file_says_how_many_stages_a_rank_holds(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    text = "0F0,1F0,1B0,0B0\n2F0,2B0\n"
    assert stages_per_rank(str(path)) == 0
    assert _read(path, text, 2, 1).owners == [0, 0, 1]
    with pytest.raises(ValueError, match=r"row 2 has 1 stages, not 2"):
        table(str(path), 2, 2, 1)
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read"):
        table(str(tmp_path / "none.csv"), 2, 0, 1)
    path.write_bytes(b"\xff\xfe0F0")
    with pytest.raises(ValueError, match=r"schedule\.csv: cannot be read"):
        table(str(path), 2, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1F1B1", 2, 0, 2), r"'1F1B1' is no schedule: write one of GPipe, 1F1B, .* or the path of a \.csv file"),
        (("1F1B", 2, 2, 2), r"1F1B has 1 stage a rank, not 2; Interleaved1F1B takes any number"),
        (("ZBVZeroBubble", 2, 3, 2), r"ZBVZeroBubble has 2 stages a rank, not 3"),
        (("Interleaved1F1B", 2, -1, 2), r"2 stages a rank, not -1$"),
        (("DualPipeV", 4, 0, 7), r"DualPipeV needs 8 micro batches or more, 2 for each of 4 ranks, not 7"),
        (("GPipe", 0, 0, 7), r"at least 1 rank"),
        (("GPipe", 1, 0, 0), r"and 1 micro batch, not 1 and 0"),
    ],
)
def test_what_there_is_no_table_of(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(*arguments)


def test_against_pytorch() -> None:
    """PyTorch's tables, through our timeline, are nowhere shorter than ours; and it reads our cells."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    from torch.distributed.pipelining.schedules import _Action

    kinds: dict[str, Kind] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    compared = 0
    # PyTorch's 1F1B numbers the last rank's forwards from 1: it is left out.
    for name in ("GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        for p, m in ((2, 1), (3, 3), (4, 4), (4, 8), (8, 16)):
            if name == "DualPipeV" and m < 2 * p:
                continue
            theirs: Orders = []
            for row in visualizer.get_schedule_ops(name, p, m):
                flat = [part for cell in row if cell is not None for part in cell.sub_actions or [cell]]
                theirs.append([Action(a[0], kinds[a[1].name], a[2]) for a in flat if a[1].name in kinds])
            ours, owners = table(name, p, 0, m)
            lengths = [max(end for _, end in timeline(orders, owners).values()) for orders in (theirs, ours)]
            assert lengths[1] <= lengths[0], (name, p, m, lengths)
            assert max(in_flight(ours)) <= max(in_flight(theirs)), (name, p, m)
            assert [str(_Action.from_str(str(a))) for a in ours[-1]] == [str(a) for a in ours[-1]]
            compared += 1
    assert compared == 22


def test_torch_is_not_needed() -> None:
    code = "import sys, titan.parallel.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def _read(path: Path, text: str, ranks: int, micro_batches: int) -> Table:
    path.write_text(text, encoding="utf-8", newline="")
    return table(str(path), ranks, 0, micro_batches)
