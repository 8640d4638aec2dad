"""Relations as data, the graph of characteristics by hand, and losses that are zero exactly when they should be."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from facemllm.tasks import characteristics as graph
from facemllm.tasks.characteristics import Characteristics, Node, characteristics, cooccurrence, correlation_matrix
from facemllm.tasks.relations import RELATIONS, Relation, load
from facemllm.train.data import read_turns
from facemllm.train.penalties import Penalties, audit, bce, enforced
from tests.conftest import messages_of
from tests.refusing import refuses

EYEWEAR = ("No_Eyewear", "Eyeglasses", "Sunglasses")


def template(item, way=None, claim=None):
    """The name of a wording."""
    return f"{item}{f':{way}' if way else ''}{f'={claim}' if claim else ''}/0"


def turns_of(*rows):
    """Columns of turns from rows of (task, item, answer[, way[, claim]])."""
    flat = [turn for row in rows for turn in row]
    return SimpleNamespace(
        count=np.array([len(row) for row in rows]),
        task=pa.array([turn[0] for turn in flat], pa.string()),
        template=pa.array([template(turn[1], *turn[3:]) for turn in flat], pa.string()),
        canonical=pa.array([turn[2] for turn in flat], pa.string()),
    )


def labels_of(names, *rows):
    """What each row tells, by name: True, False, or nothing where unknown."""
    found = characteristics(names, turns_of(*rows))
    return found, [
        {name: bool(label) for name, label in zip(found.names, row, strict=True) if label >= 0}
        for row in found.labels_RN
    ]


def of(names, labels_RN):
    """Characteristics of these names with these labels."""
    nodes = tuple(Node(task="t", item=name, value="yes", name=name, words=name) for name in names)
    return Characteristics(nodes, np.array(labels_RN, dtype=np.int8))


def test_every_relation_of_the_file_loads_and_says_something_of_its_own():
    assert {relation.kind for relation in RELATIONS} == {"exclusive", "at_least_one", "excludes", "implies"}
    assert all(relation.within(relation.attributes) == relation for relation in RELATIONS)
    assert "No_Beard excludes Goatee" in {str(relation) for relation in RELATIONS}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {kind: excludes, given: a, names: [b]}\n- {kind: forbids, names: [a, b]}", "entry 2: kind: Input should"),
        ("- {kind: exclusive, names: [a]}", "entry 1: names: exclusive needs 2 or more"),
        ("- {kind: implies, given: a, names: []}", "entry 1: names: implies needs 1 or more"),
        ("- {kind: implies, names: [a]}", "entry 1: given: implies needs an attribute here"),
        ("- {kind: exactly_one, given: c, names: [a, b]}", "entry 1: given: exactly_one takes none here"),
        ("- {kind: excludes, given: a, names: [b, a]}", "entry 1: names: an attribute stands here twice"),
        ("- {kind: exclusive, names: [a, 3]}", "entry 1: names.1: Input should be a valid string"),
        ("- {kind: exclusive, names: [a, b], when: c}", "entry 1: when: Extra inputs are not permitted"),
        ("- {names: [a, b]}", "entry 1: kind: Field required"),
        ("- {kind: exclusive, names: [a, b]}\n- {kind: exclusive, names: [a, b]}", "entry 2: names: entry 1 says"),
        ("- just words", "entry 1: Input should be"),
        ("kind: exclusive", "Input should be a valid tuple"),
        ("- {kind: [", "cannot be read as relations"),
    ],
)
def test_a_broken_entry_is_refused_by_file_entry_and_key(tmp_path, text, says):
    path = tmp_path / "relations.yaml"
    path.write_text(text)
    message = refuses(None, load, path)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert "\n" not in message
    refuses("cannot be read as relations", load, tmp_path / "none.yaml")


def test_what_a_relation_says_of_a_part_of_its_attributes():
    one = Relation(kind="exactly_one", names=("a", "b", "c"))
    assert one.within("abc") == one
    assert one.within("ab") == Relation(kind="exclusive", names=("a", "b"))  # c may be the one
    assert one.within("a") is None
    assert Relation(kind="at_least_one", names=("a", "b")).within("a") is None
    assert Relation(kind="implies", given="a", names=("b", "c")).within("ab") is None
    assert str(Relation(kind="excludes", given="a", names=("b", "c")).within("ac")) == "a excludes c"
    assert Relation(kind="excludes", given="a", names=("b", "c")).within("bc") is None


def test_answers_in_every_way_tell_what_they_settle():
    found, rows = labels_of(
        ["attributes", "expression"],
        [("attributes", "eyewear", "Eyeglasses"), ("attributes", "Bangs", "yes"), ("expression", "expression", "fear")],
        [("attributes", "eyewear", "false", "statement", "Eyeglasses"), ("attributes", "Bangs", "no")],
        [("attributes", "eyewear", "true", "statement", "Sunglasses")],
        [("attributes", "Bangs", "false", "statement", "no"), ("attributes", "eyewear", "No_Eyewear", "lettered")],
        [("attributes", "eyewear", "yes", "dialogue", "present"), ("expression", "expression", "anger", "unseen")],
        [],
        [("attributes", "hair_color", "not_visible", "lettered"), ("attributes", "Bangs", None)],
        [("age", "age", "30"), ("caption", "caption", "eyewear=Eyeglasses")],
    )
    assert found.names == (*EYEWEAR, "Bangs", "expression=fear", "expression=anger")  # no other value occurs
    fear = {"expression=fear": True, "expression=anger": False}
    assert rows[:5] == [
        {"No_Eyewear": False, "Eyeglasses": True, "Sunglasses": False, "Bangs": True} | fear,
        {"Eyeglasses": False, "Bangs": False},
        {"No_Eyewear": False, "Eyeglasses": False, "Sunglasses": True},
        {"No_Eyewear": True, "Eyeglasses": False, "Sunglasses": False, "Bangs": True},
        {"No_Eyewear": False, "expression=fear": False, "expression=anger": True},
    ]
    assert rows[5:] == [{}] * 3
    assert [node.words for node in found.nodes] == ["no eyewear", "glasses", "sunglasses", "bangs", "fearful", "angry"]
    node = {"task": "attributes", "item": "eyewear", "value": "Eyeglasses", "name": "Eyeglasses", "words": "glasses"}
    assert found.nodes[1] == Node(**node)
    assert found.labels_RN.dtype == np.int8


def test_an_attribute_is_one_node_whichever_question_asks_for_it():
    found, rows = labels_of(
        ["attributes", "presence"], [("attributes", "eyewear", "Sunglasses")], [("presence", "Eyeglasses", "yes")]
    )
    assert found.names == ("Eyeglasses",)  # of the others no row tells both yes and no
    assert rows == [{"Eyeglasses": False}, {"Eyeglasses": True}]


@pytest.mark.parametrize(
    ("names", "rows", "complaint"),
    [
        (["attributes"], [[("attributes", "Bangs", "yes")]] * 2, r"^model\.knowledge\.tasks: .* characteristic of att"),
        (["age", "caption"], [[("age", "age", "30")]], "no characteristic of age, caption"),
        (["attributes"], [[("attributes", "shoes", "yes")]], "has no template 'shoes/0'"),
    ],
)
def test_turns_that_give_no_node_or_that_the_task_does_not_know_are_refused(names, rows, complaint):
    refuses(complaint, labels_of, names, *rows)


def test_what_a_mirror_changes_gives_no_node():
    found, _ = labels_of(
        ["head_pose_bins"],
        [("head_pose_bins", "yaw_bin", "10_20"), ("head_pose_bins", "pitch_bin", "10_20")],
        [("head_pose_bins", "yaw_bin", "-10_0"), ("head_pose_bins", "pitch_bin", "-10_0")],
    )
    assert found.names == ("pitch_bin=-10_0", "pitch_bin=10_20")


def test_labels_stand_in_the_order_of_the_turns_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "_ROWS", 1000)
    generator = np.random.default_rng(0)
    wears = generator.integers(0, 3, 3000)
    splits = np.where(generator.random(3000) < 0.7, "train", "test")

    def row(number):
        asked = [("age", "30"), ("eyewear", EYEWEAR[wears[number]])][: generator.integers(0, 3)]
        about = {"conversation_id": str(number), "image_id": str(number), "images": [], "source": "render"}
        tasks = {"age": "age", "eyewear": "attributes"}
        turns = [{"task": tasks[item], "template": f"{item}/0", "answer": answer} for item, answer in asked]
        return about | {"split": splits[number], "messages": messages_of([("?", "!")] * len(asked)), "turns": turns}

    rows = [row(number) for number in range(3000)]
    with TableWriter(tmp_path / "talk", CONVERSATIONS) as writer:
        writer.write(rows)
    turns = read_turns(open_table(tmp_path / "talk", CONVERSATIONS), "train")
    found = characteristics(["attributes"], turns)
    labelled_R = np.array([len(rows[number]["turns"]) == 2 for number in turns.pixel_row])
    assert 0.2 < labelled_R.mean() < 0.5
    assert (found.labels_RN[~labelled_R] == -1).all()
    assert (found.labels_RN[labelled_R] == np.eye(3, dtype=int)[wears[turns.pixel_row[labelled_R]]]).all()


def test_a_choice_is_a_relation_of_its_own():
    nodes = [SimpleNamespace(name=name) for name in (*EYEWEAR, "Bald", "Short_Hair", "Red_Hair", "Gray_Hair", "Bangs")]
    of_choices = [
        "at most one of Bald, Short_Hair",  # a hat can hide both
        "at most one of Red_Hair, Gray_Hair",
        "exactly one of No_Eyewear, Eyeglasses, Sunglasses",
    ]
    of_file = [
        "Bald excludes Red_Hair, Gray_Hair",
        "Bald excludes Bangs",
        "Bald excludes Short_Hair",
        "No_Eyewear excludes Eyeglasses",
        "No_Eyewear excludes Sunglasses",
        "at least one of No_Eyewear, Eyeglasses, Sunglasses",
    ]
    assert [str(relation) for relation in graph.relations_of(["attributes"], nodes)] == of_choices + of_file
    alone = [str(relation) for relation in graph.relations_of(["presence"], nodes)]
    assert alone == [*of_file[:-1], of_choices[1], of_file[-1]]


def test_what_an_enforced_relation_forces_is_not_enforced_twice():
    one = Relation(kind="exactly_one", names=("a", "b", "c"))
    most = Relation(kind="exclusive", names=("a", "b", "c"))
    some = Relation(kind="at_least_one", names=("c", "b", "a"))
    apart = Relation(kind="excludes", given="a", names=("b",))
    beyond = Relation(kind="excludes", given="a", names=("d",))
    every = [one, most, some, apart, beyond]
    sound = of("abcd", [[1, 0, 0, 0], [0, 1, 0, 1]])
    assert enforced(audit(every, sound), 0.0) == [one, beyond]
    assert enforced(audit(every[1:], sound), 0.0) == [most, some, beyond]
    broken = of("abcd", [[0, 1, 1, 0], [0, 1, 0, 1]])
    assert enforced(audit(every, broken), 0.0) == [some, apart, beyond]  # what the first would force stands without it


def test_counts_are_of_known_labels_alone_and_the_matrix_is_that_by_hand():
    """Of the nodes a, b, c, d on six rows."""
    rows = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, -1], [0, 1, 0, 0], [0, 1, -1, 1], [0, 0, 0, 0]]
    m_NN, n_NN = cooccurrence(np.array(rows, dtype=np.int8))
    assert m_NN.tolist() == [[3, 2, 1, 0], [2, 4, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1]]
    assert n_NN.tolist() == [[3, 3, 3, 2], [4, 4, 3, 4], [1, 1, 1, 1], [1, 1, 0, 1]]
    many = cooccurrence(np.tile(np.array(rows, dtype=np.int8), (5000, 1)))
    assert (np.stack(many) == 5000 * np.stack([m_NN, n_NN])).all()
    # p: a->b 2/3, a->c 1/3; b->a 1/2, b->c 1/3, b->d 1/4; c->a 1, c->b 1; d->b 1; d with c was never known
    for given, by_hand in (
        ((0.6, 0.2), [[0.8, 0.2, 0, 0], [0, 1, 0, 0], [0.1, 0.1, 0.8, 0], [0, 0.2, 0, 0.8]]),
        ((0.5, 0.4), [[0.6, 0.4, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.2, 0.6, 0], [0, 0.4, 0, 0.6]]),
        ((0.0, 0.3), [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.15, 0.15, 0, 0.7]]),
    ):
        np.testing.assert_allclose(correlation_matrix(m_NN, n_NN, *given), by_hand, atol=1e-15)


def test_the_graph_is_directed_and_its_rows_sum_to_one():
    labels_RN = np.random.default_rng(1).integers(-1, 2, (500, 12)).astype(np.int8)
    labels_RN[:, 11] = -1  # a node without neighbours
    c_NN = correlation_matrix(*cooccurrence(labels_RN), 0.5, 0.2)
    assert not np.allclose(c_NN, c_NN.T)
    np.testing.assert_allclose(c_NN.sum(1), 1)
    assert c_NN[11, 11] == 1


def every_relation():
    for count in (2, 3, 4):
        names = tuple("abcd"[:count])
        for kind in ("exclusive", "exactly_one", "at_least_one"):
            yield Relation(kind=kind, names=names)
        for kind in ("excludes", "implies"):
            yield Relation(kind=kind, given="a", names=names[1:])


def holds(relation, true):
    names, given = sum(true[name] for name in relation.names), true.get(relation.given)
    held = {"exclusive": names <= 1, "exactly_one": names == 1, "at_least_one": names >= 1}
    return (held | {"excludes": not (given and names), "implies": not given or names >= 1})[relation.kind]


@pytest.mark.parametrize("relation", every_relation(), ids=str)
def test_a_penalty_is_zero_exactly_where_the_relation_holds(relation):
    corners = list(product((0, 1), repeat=4))
    hold = [holds(relation, dict(zip("abcd", corner, strict=True))) for corner in corners]
    penalty_B = Penalties([relation], "abcd")(torch.tensor(corners).float())[:, 0]
    assert penalty_B.tolist() == [0.0 if held else 1.0 for held in hold]
    true_FA = np.array(corners, dtype=bool)
    known, broken = relation.check({name: place for place, name in enumerate("abcd")}, true_FA, np.ones_like(true_FA))
    assert known.all()
    assert (~broken).tolist() == hold


def test_a_penalty_is_the_probability_that_the_relation_is_broken():
    relations = [*every_relation()]
    p_A = torch.tensor([[0.9, 0.2, 0.5, 0.35]], dtype=torch.float64)
    expected = torch.zeros(len(relations), dtype=torch.float64)
    for corner in product((0, 1), repeat=4):
        chance = torch.where(torch.tensor(corner, dtype=torch.bool), p_A[0], 1 - p_A[0]).prod()
        held = [holds(relation, dict(zip("abcd", corner, strict=True))) for relation in relations]
        expected += chance * ~torch.tensor(held)
    found = Penalties(relations, "abcd")(p_A)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    penalties = Penalties(every_relation(), "abcd")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 4), generator=generator, dtype=torch.float64)
    weights = torch.rand((3, len(penalties.relations)), generator=generator, dtype=torch.float64)
    labels_BA = torch.tensor([[1, 0, -1, 1], [-1, -1, -1, -1], [0, 0, 1, -1]], dtype=torch.int8)

    def loss(logits_BA):
        return (weights * penalties(logits_BA.sigmoid())).sum() + bce(logits_BA, labels_BA)[0]

    given = logits.clone().requires_grad_()
    loss(given).backward()
    step = 1e-6
    for place in product(range(3), range(4)):
        moved = torch.zeros_like(logits)
        moved[place] = step
        central = (loss(logits + moved) - loss(logits - moved)) / (2 * step)
        assert given.grad[place].item() == pytest.approx(central.item(), abs=1e-8)
    assert given.grad.abs().min() > 0  # nothing is thresholded away


def test_relations_of_what_is_no_node_drop_out():
    relations = [
        Relation(kind="exclusive", names=("a", "x", "b")),
        Relation(kind="implies", given="a", names=("x",)),
        Relation(kind="excludes", given="y", names=("a",)),
    ]
    penalties = Penalties(relations, "ab")
    assert [str(relation) for relation in penalties.relations] == ["at most one of a, b"]
    assert penalties(torch.tensor([[1.0, 1.0]])).tolist() == [[1.0]]
    assert Penalties(relations, "a")(torch.rand(5, 1)).shape == (5, 0)
    assert Penalties(relations, "ab").state_dict() == {}


def test_half_precision_is_raised_before_it_is_summed():
    logits = torch.linspace(-4, 4, 4000, dtype=torch.bfloat16).reshape(1000, 4)
    labels_BA = (logits > 1).to(torch.int8)
    assert bce(logits, labels_BA)[0].item() == bce(logits.float(), labels_BA)[0].item()
    penalties = Penalties(every_relation(), "abcd")
    assert (penalties(logits.sigmoid()) == penalties(logits.sigmoid().float())).all()


def test_cross_entropy_leaves_unknown_labels_out():
    logits = torch.tensor([[2.0, -1.0, 50.0], [0.5, 3.0, -50.0]], requires_grad=True)
    labels_BA = torch.tensor([[1, 0, -1], [-1, 1, -1]], dtype=torch.int8)
    total, known = bce(logits, labels_BA)
    probability = logits.detach().sigmoid()
    by_hand = -(probability[0, 0].log() + (1 - probability[0, 1]).log() + probability[1, 1].log())
    assert known.item() == 3
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-6)
    total.backward()
    assert (logits.grad[labels_BA == -1] == 0).all()
    nothing, none = bce(logits, torch.full_like(labels_BA, -1))
    assert (nothing.item(), none.item()) == (0.0, 0)


def test_the_audit_finds_planted_violations_and_unknown_labels_break_nothing():
    relations = [
        Relation(kind="excludes", given="Bald", names=("Bangs",)),
        Relation(kind="implies", given="Bald", names=("Hat", "Wig")),
        Relation(kind="exactly_one", names=("Hat", "Wig")),
        Relation(kind="exclusive", names=("Hat", "Scarf")),
        Relation(kind="at_least_one", names=("Bald", "Elsewhere")),
    ]
    labels = [
        [1, 1, 1, 0, -1],  # bald with bangs
        [1, 0, 0, 0, -1],  # neither hat nor wig
        [0, 1, 1, 1, -1],  # both
        [1, -1, -1, 0, -1],
        [-1, 1, 0, 1, -1],
    ]
    found = audit(relations, of(("Bald", "Bangs", "Hat", "Wig", "Scarf"), labels))
    assert [(str(one.relation), one.spoken, one.broken, one.rate) for one in found] == [
        ("Bald excludes Bangs", 3, 1, 1 / 3),
        ("Bald implies Hat or Wig", 3, 1, 1 / 3),
        ("exactly one of Hat, Wig", 4, 2, 1 / 2),
        ("at most one of Hat, Scarf", 0, 0, None),
    ]
    assert enforced(found, 0.4) == relations[:2]
    assert enforced(found, 0.3) == []
    assert enforced(found, 1.0) == relations[:3]  # what was never measured is not enforced
