"""The audit says yes to planted memory and no where there is none."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from dejavu_utils import parameters
from dejavu_utils.attack import one_model
from dejavu_utils.audit import audit, checks, conclusion, estimate, evidence, membership
from dejavu_utils.audit.settings import Settings
from dejavu_utils.models import encoders, external, train
from dejavu_utils.models.encoders import Encoder


@pytest.mark.parametrize("held_out", ["control", ""])
def test_it_says_memorizes_on_a_and_no_on_b(audits, held_out):
    yes = audits.examined(audits.sets("a", held_out))
    assert yes.case.source == ("held-out" if held_out else "public")
    assert yes.controls["passed"].all(), yes.controls
    assert yes.verdict.word == "memorizes" and 0.15 < yes.verdict.score < 0.4
    assert yes.status == 3

    no = audits.examined(audits.sets("b", held_out))
    assert no.verdict.word != "memorizes"
    assert no.verdict.low <= 0 <= no.verdict.high
    if held_out:
        assert no.verdict.word == "no evidence" and no.status == 0


def test_with_a_second_model(audits):
    other = audits.planted("b")
    assert audits.examined(audits.sets("a"), reference=other).verdict.word == "memorizes"
    nobody = audits.planted("a", share=0)
    assert audits.examined(audits.sets("b"), reference=nobody).verdict.word == "no evidence"

    same = audits.examined(audits.sets("a"), reference=audits.encoder)  # the same encoder twice
    plain = same.scores.set_index(["reading", "p"]).loc[("members", 100), "score"]
    assert plain == 0 and same.verdict.word != "memorizes"


def test_the_door_takes_pictures_and_encoders_and_gives_the_same(audits, remembered):
    sets = audits.sets("a")
    found = audit.run(
        audits.encoder, sets["images"], sets["public"], sets["held_out"], k=10, size=16, limit=0
    )
    assert found.verdict == remembered.verdict and found.name == remembered.name
    pd.testing.assert_frame_equal(found.scores, remembered.scores)


def test_another_audit_has_another_name(audits, remembered):
    names = {remembered.name, audits.examined(audits.sets("b")).name}
    other = dataclasses.replace(audits.settings, margin=0.1)
    names.add(audit.file_name(remembered.case, other))
    assert len(names) == 3 and all(name.startswith("planted-") for name in names)


def test_progress_ends_with_all_pictures(audits):
    case = audits.prepared(audits.sets("a"))
    steps = []
    evidence.infer(case, 10, progress=lambda *step: steps.append(step))
    done, total, what = steps[-1]
    counts = [len(images) for images in case.attacked.values()]
    assert done == total == len(case.public) + 2 * sum(counts) + case.boxed
    assert "held-out pictures" in [each for _, _, each in steps] and len(steps) > 4


# -- settings ---------------------------------------------------------------------------------


def test_the_notebook_s_settings_are_those_of_the_door():
    declared = parameters.declared("05_audit")
    assert Settings.of(declared) == Settings(dataset="scenes")
    declared["encoder"]["target"] = "torchvision:resnet18"
    assert Settings.of(declared) == Settings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "audit: k = 0; expected 1 or more neighbours"),
        ({"margin": 5}, "margin = 5; expected a share between 0 and 1, such as 0.05"),
        ({"limit": -1}, "limit = -1; expected a number of pictures, or 0 for all"),
        ({"classifier": "resnet"}, "classifier = 'resnet'; expected one of .'naive_bayes'"),
        ({"crop": {"min": 3}}, "crop = .*; expected only the keys kind, min_side"),
        ({"crop": {"kind": "centre"}}, "expected a kind of .'periphery', 'corner'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


# -- the verdict ------------------------------------------------------------------------------


def test_a_failed_control_takes_the_verdict_away(remembered):
    controls = remembered.controls.copy()
    controls.loc[1, "passed"] = False
    found = conclusion.verdict(remembered.case, remembered.scores, controls)
    assert (found.word, found.why, found.status) == ("undecided", "control", 4)
    assert found.sentence.startswith("Undecided, because")
    assert controls["control"][1] in found.sentence


def made(low, high, difference=None, n=100):
    row = {"layer": "backbone", "reading": "members", "p": 100, "n": n, "held_out": np.nan}
    rows = [row | {"score": (low + high) / 2, "low": low, "high": high}]
    if difference:
        ends = {"low": difference[0], "high": difference[1]}
        rows.append(rows[0] | {"reading": estimate.DIFFERENCE, "held_out": n} | ends)
    return pd.DataFrame(rows)


class Case:
    layers = ("backbone",)
    labelled = True

    def __init__(self, source, second, crop="periphery"):
        self.source = source
        self.crop = {"kind": crop}
        self.held_out = source or None
        self.reference = second or None


FINE = pd.DataFrame({"control": ["x"], "passed": [True]})


@pytest.mark.parametrize(
    ("source", "second", "plain", "difference", "word", "why"),
    [
        ("held-out", False, (0.2, 0.3), (0.01, 0.2), "memorizes", "memorizes"),
        ("held-out", False, (0.2, 0.3), (-0.03, 0.04), "no evidence", "no evidence"),
        ("held-out", False, (0.2, 0.3), (-0.03, 0.06), "undecided", "undecided"),
        ("held-out", False, (0.2, 0.3), (-0.3, -0.1), "no evidence", "no evidence"),
        ("public", False, (0.2, 0.3), (0.1, 0.2), "memorizes", "memorizes"),
        ("public", False, (0.2, 0.3), (-0.03, 0.04), "undecided", "disagree"),
        ("public", True, (0.2, 0.3), (-0.03, 0.04), "memorizes", "memorizes"),
        ("", False, (0.2, 0.3), None, "undecided", "offset"),
        ("", True, (0.2, 0.3), None, "memorizes", "memorizes"),
        ("held-out", False, (0.2, 0.3), (np.nan, np.nan), "undecided", "few"),
        ("", True, (np.nan, np.nan), None, "undecided", "few"),
    ],
)
def test_rules_of_the_verdict(source, second, plain, difference, word, why):
    found = conclusion.verdict(Case(source, second), made(*plain, difference), FINE)
    assert (found.word, found.why) == (word, why)
    assert "{" not in found.sentence and "nan" not in found.sentence
    start = {"undecided": "Undecided, because"}.get(word, word.capitalize())
    assert found.sentence.startswith(start)


@pytest.mark.parametrize("interval", [(0.01, 0.2), (-0.03, 0.04)])
def test_the_verdict_on_corners_does_not_speak_of_background(interval):
    corner = Case("held-out", False, "corner")
    found = conclusion.verdict(corner, made(0.2, 0.3, interval), FINE)
    assert "shown only a corner, which may hold a part of the object" in found.sentence
    assert "background" not in found.sentence

    outside = conclusion.verdict(Case("held-out", False), made(0.2, 0.3, interval), FINE)
    assert "shown nothing but background" in outside.sentence


@pytest.mark.parametrize(("members", "held_out"), [(45, 200), (200, 45)])
def test_too_few_images_are_said_to_be_too_few(audits, members, held_out):
    few = audits.sets(
        images=audits.parts["a"].subset(range(members)),
        held_out=audits.parts["control"].subset(range(held_out)),
    )
    found = audits.examined(few)
    fewest = min(map(len, found.case.attacked.values()))
    assert (found.verdict.word, found.verdict.why) == ("undecided", "few")
    assert f"{fewest} images are too few" in found.verdict.sentence
    page = found.html()
    assert f"too few (n = {fewest})" in page
    assert not re.search(r"\bnan\b", page)
    rows = found.scores.to_dict("records")
    texts = [estimate.interval_text(row) for row in rows if row["p"] == 100]
    assert any(f"too few (n = {fewest})" in text for text in texts)
    assert found.summary()["low"] is None


# -- the score --------------------------------------------------------------------------------


def rows_of(right, probability, labels=None):
    n = len(right)
    base = {
        "id": [f"{i:05d}" for i in range(n)],
        "label": np.zeros(n, int) if labels is None else labels,
    }
    target = pd.DataFrame(base | {"role": "target", "correct": right, "probability": 0.0})
    reference = {"role": "reference", "correct": False, "probability": probability}
    return pd.concat([target, pd.DataFrame(base | reference)])


def test_the_difference_is_the_residual_of_a_line_through_the_held_out_images():
    random = np.random.default_rng(0)
    t, b = random.random(50) < 0.4, random.random(50)
    s, c = random.random(70) < 0.4, random.random(70)
    slope, intercept = np.polyfit(c, s.astype(float), 1)
    found = estimate.members_minus_held_out(rows_of(t, b), rows_of(s, c), resamples=50)
    assert found["score"] == pytest.approx(t.mean() - intercept - slope * b.mean(), abs=1e-12)
    assert found["target"] - found["reference"] == pytest.approx(found["score"])
    assert (found["n"], found["held_out"]) == (50, 70)


def test_with_a_constant_reference_it_is_members_minus_held_out():
    random = np.random.default_rng(0)
    t, s = random.random(50) < 0.4, random.random(70) < 0.4
    members, held_out = rows_of(t, np.full(50, 0.3)), rows_of(s, np.full(70, 0.3))
    found = estimate.members_minus_held_out(members, held_out, resamples=50)
    assert found["score"] == pytest.approx(t.mean() - s.mean())


@pytest.mark.parametrize("classes", [10, 60])
def test_the_interval_misses_no_memory_one_time_in_twenty(classes):
    """The reference tells how often the encoder is right, and the two sets differ in it; the
    offset is large.
    """
    misses = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        both = []
        for n, easy in ((240, 2.0), (360, 1.0)):
            b = random.random(n) ** (1 / easy)
            both.append(rows_of(random.random(n) < 0.3 + 0.5 * b, b, np.arange(n) % classes))
        found = estimate.members_minus_held_out(*both, resamples=300)
        misses += not found["low"] <= 0 <= found["high"]
    assert 2 <= misses <= 22  # 10 expected; binomial, five in a million outside


# -- the controls -----------------------------------------------------------------------------


def stored(images, how):
    """Return pictures as another way of storing them leaves them."""
    pixels = images.pixels.float()
    if how == "blurred":
        pixels = nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    elif how == "dark":
        pixels = 0.8 * pixels
    elif how == "noisy":
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        pixels = pixels + 12 * noise
    elif how == "16 levels":
        pixels = (pixels / 16).floor() * 16
    return dataclasses.replace(images, pixels=pixels.round().clamp(0, 255).byte())


def random_encoder():
    torch.manual_seed(3)
    trunk = Encoder("small8", "16-16", 16).trunk
    return external.External(trunk, name="random")


@pytest.mark.parametrize("how", ["blurred", "dark", "noisy", "16 levels"])
def test_pictures_that_were_stored_otherwise_break_the_instrument(audits, how):
    """Members and held-out pictures differ in how they were stored, and an encoder with random
    weights is audited: there is no verdict, and the sentence says why.
    """
    sets = audits.sets("a", held_out=stored(audits.parts["control"], how))
    found = audits.examined(sets, encoder=random_encoder())
    assert found.verdict.word == "undecided" and found.verdict.why == "control"
    assert checks.PICTURES in found.verdict.sentence
    assert "may be the pictures and not membership" in found.html()


def test_pictures_that_were_stored_alike_do_not(audits):
    found = audits.examined(audits.sets("a"), encoder=random_encoder())
    assert found.controls["passed"].all(), found.controls
    assert found.verdict.word == "no evidence"
    assert "may be the pictures and not membership" not in found.html()
    names = [checks.PERMUTED, checks.UNTRAINED, checks.HALVES, checks.PICTURES]
    assert list(found.controls["control"]) == names


def test_another_mix_of_classes_is_no_difference_of_pictures(audits):
    members = audits.parts["a"]
    fewer = members.subset((members.labels < 5) | (np.arange(len(members)) % 3 == 0))
    found = audits.examined(audits.sets(fewer), encoder=random_encoder())
    row = found.controls.set_index("control").loc[checks.PICTURES]
    assert row["passed"], row


def test_without_held_out_images_only_permuted_labels_are_a_control(audits):
    public = audits.parts["public"]
    place = pd.Series(public.labels).groupby(public.labels).cumcount().to_numpy()
    bare = public.subset(place < 3)  # too few to stand in
    sets = audits.sets("a", held_out="", public=bare)
    found = audits.examined(sets)
    assert found.case.source == "" and found.membership is None
    assert list(found.controls["control"]) == [checks.PERMUTED]
    assert found.verdict.why == "offset"
    assert "Without held-out images this cannot be asked" in found.html()


# -- the reference ----------------------------------------------------------------------------


def test_no_image_is_judged_by_a_classifier_that_saw_it():
    labels, learn = np.arange(40) % 2, np.arange(40) < 30
    fold = one_model.assign([str(i) for i in range(40)], labels, 5)
    seen = []

    def fit(x, y, classes, name):
        assert set(x.tolist()) <= set(range(30))  # held-out images are never learned from

        def predict(other):
            seen.append((set(x.tolist()), set(other.tolist())))
            return np.full((len(other), classes), 0.5)

        return predict

    found = one_model.cross_fit(fit, np.arange(40), labels, fold, 2, learn)
    assert np.isfinite(found).all() and sum(len(judged) for _, judged in seen) == 40
    assert all(not learned & judged for learned, judged in seen)


def test_the_network_can_be_the_reference(audits, monkeypatch):
    small = train.Recipe(encoder="small4", projector="8-8", batch=32, threads=1)
    network = one_model.network
    monkeypatch.setattr(one_model, "network", lambda device: network(small, 1, device))
    settings = dataclasses.replace(audits.settings, limit=80)
    case = audits.prepared(audits.sets("a"), settings=settings)
    classified = evidence.classify(case, {}, "network")
    assert len(classified["members"][0]) == len(case.members) == 80
    probability = classified["held-out"][2]
    assert ((0 <= probability) & (probability <= 1)).all()


def test_the_untrained_twin_has_other_weights_and_leaves_everything_as_it_was():
    encoder, state = Encoder("small4", "8-8", 16), torch.get_rng_state()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fresh = encoders.untrained(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(fresh.trunk[0].weight, encoder.trunk[0].weight)
    assert torch.equal(encoders.untrained(encoder).trunk[0].weight, fresh.trunk[0].weight)
    assert torch.isfinite(fresh(torch.randn(2, 3, 16, 16))).all()


# -- owners -----------------------------------------------------------------------------------


def test_the_owner_whose_pictures_are_remembered_stands_out(audits):
    members = audits.parts["a"]
    known = audits.prepared(audits.sets("a")).members.ids
    remembered = set(known[: int(0.3 * len(known))])  # as `planted` learned them
    owners = [
        "eve" if name in remembered else f"owner {i % 5}" for i, name in enumerate(members.ids)
    ]
    owners[-1] = ""
    with_owners = dataclasses.replace(members, attributes={"owner": np.array(owners)})

    found = audits.examined(audits.sets(with_owners))
    table = found.owners.set_index("owner")
    assert set(table.index) == set(owners) - {""}
    assert table["n"].sum() == (found.case.members.attributes["owner"] != "").sum()
    assert table.loc["eve", "low"] > 0.5
    others = table.drop("eve")
    assert (others["low"] < 0.02).all() and (others["score"].abs() < 0.15).all()
    assert found.summary()["owners"][0].keys() >= {"owner", "score", "low", "high", "n"}
    assert "Owner by owner" in found.html() and "owner 3" in found.html()
    count = len(set(found.case.owners(found.case.members)))  # the one of nobody counts
    assert found.verdict.why == "owners" and f"because {count} owners are too few" in found.html()
    counts = f"{count} of members and {len(found.case.held_out)} of held-out, 0 in both"
    assert any(counts in limit for limit in found.case.limits)
    assert found.name != audits.examined(audits.sets("a")).name


def test_few_pictures_of_an_owner_have_no_interval(audits, remembered):
    members = remembered.case.members
    owners = pd.Series(np.where(np.arange(len(members)) < 9, "few", "many"), members.ids)
    layer = remembered.case.layers[0]
    rows = [
        evidence.part(remembered.guesses, layer, which=name) for name in ("members", "held-out")
    ]
    table = estimate.by_owner(*rows, owners).set_index("owner")
    assert table.loc["few", "n"] == 9 and np.isnan(table.loc["few", "low"])
    assert table.loc["many", "low"] < table.loc["many", "score"] < table.loc["many", "high"]
    assert remembered.owners is None and "Owner by owner" not in remembered.html()


OWNED = {"owners": 60, "pictures": 4}  # a set


def owned(seed, alike):
    """Return rows of owners, and whether an owner's pictures are `alike` or only have its name;
    nothing was trained on them.
    """
    random = np.random.default_rng(seed)
    count = OWNED["owners"] if alike else OWNED["owners"] * OWNED["pictures"]
    right = random.random(count) < 0.4
    probability = random.random(count)
    if alike:
        right = np.repeat(right, OWNED["pictures"])
        probability = np.repeat(probability, OWNED["pictures"])
    rows = rows_of(right, probability, np.arange(len(right)) % 10)
    owner = np.repeat(np.arange(OWNED["owners"]).astype(str), OWNED["pictures"])
    return rows.assign(owner=np.concatenate([owner, owner]))


def false_alarms(alike, columns, times=200):
    """Return the ends (95 %, Clopper-Pearson) of the share of audits that find memory."""
    alarms = 0
    for seed in range(times):
        members, held_out = [owned([seed, part], alike)[columns] for part in (0, 1)]
        found = estimate.members_minus_held_out(members, held_out, resamples=300)
        alarms += found["low"] > 0
    return binomtest(alarms, times).proportion_ci(method="exact")


def test_where_owners_send_the_same_picture_four_times_the_interval_knows():
    """The bootstrap of pictures cries wolf, that of owners does not; nor where they differ."""
    known = ["id", "label", "role", "correct", "probability", "owner"]
    assert false_alarms(True, known[:-1]).low > 0.025
    assert false_alarms(True, known).low <= 0.025
    assert false_alarms(False, known).low <= 0.025


def test_an_area_of_owners_is_that_of_their_pictures_with_a_wider_interval():
    random = np.random.default_rng(0)
    members, held_out = random.normal(0.5, 1, 40), random.normal(0, 1, 50)
    plain = membership.auc(members, held_out)
    names = (np.arange(40), np.arange(50))
    found = membership.auc(members, held_out, owners=names)
    assert found["auc"] == plain["auc"]
    assert found["low"] == pytest.approx(plain["low"], abs=0.02)
    assert found["high"] == pytest.approx(plain["high"], abs=0.02)

    four = [np.repeat(each, 4) for each in (members, held_out, *names)]
    found = membership.auc(*four[:2], owners=tuple(four[2:]))
    assert found["auc"] == pytest.approx(plain["auc"])
    assert found["low"] == pytest.approx(plain["low"], abs=0.02)
    assert membership.auc(*four[:2])["low"] > plain["low"] + 0.03


def tinted(images, seed):
    """Return the pictures with an owner for each four, who has a camera of a colour of its own."""
    random = np.random.default_rng(seed)
    mixed = random.permutation(len(images))
    owner = mixed // 4
    colours = torch.from_numpy(random.normal(0, 25, (owner.max() + 1, 3, 1, 1))).float()
    pixels = (images.pixels + colours[owner]).round().clamp(0, 255).byte()
    names = np.array([f"{seed}/{each}" for each in owner])
    return dataclasses.replace(images, pixels=pixels, attributes={"owner": names})


def test_cameras_of_owners_are_no_difference_between_the_sets(audits):
    """No control fires because the owners of members are others than those of held-out pictures,
    and no classifier of crops is judged on a picture whose owner it knows.
    """
    members = tinted(audits.parts["a"].subset(range(400)), 1)
    held_out = tinted(audits.parts["control"].subset(range(400)), 2)
    found = audits.examined(audits.sets(members, held_out), encoder=random_encoder())
    assert found.controls["passed"].all(), found.controls
    assert found.verdict.word != "memorizes" and np.isfinite(found.verdict.low)

    seen = []
    case = found.case

    def spy(x, labels, classes, name):
        learned = {float(each) for each in x[:, -1]}

        def predict(other):
            seen.append((learned, {float(each) for each in other[:, -1]}))
            return np.full((len(other), classes), 1 / classes)

        return predict

    numbers = {name: i for i, name in enumerate({*members.attributes["owner"]})}
    inferred = {}
    for name, images in case.attacked.items():
        column = np.array([numbers.get(each, -1.0) for each in case.owners(images)])
        inferred[name, "backbone", "untrained"] = {"features": column[:, None]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_model, "naive_bayes", spy)
        evidence.classify(case, inferred)
    assert seen and not any((learned & judged) - {-1.0} for learned, judged in seen)


# -- a killed audit goes on -------------------------------------------------------------------


def test_what_is_embedded_is_read_again_and_damage_is_not_served(audits, remembered, tmp_path):
    case = audits.prepared(audits.sets("a"))
    seen = []

    class Counting(type(audits.encoder.trunk)):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    plain = case.encoder.trunk.__class__
    case.encoder.trunk.__class__ = Counting
    try:

        def stop(done, total, what):
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evidence.infer(case, 10, progress=stop, kept=tmp_path)
        first = sum(seen)
        seen.clear()
        again = audit.examine(case, audits.settings, kept=tmp_path)
        assert 0 < sum(seen) < first
        pd.testing.assert_frame_equal(again.guesses, remembered.guesses)
        pd.testing.assert_frame_equal(again.controls, remembered.controls)

        seen.clear()
        files = sorted(tmp_path.glob("*.safetensors"))
        broken = bytearray(files[0].read_bytes())
        broken[-1] ^= 1
        files[0].write_bytes(broken)
        again = audit.examine(case, audits.settings, kept=tmp_path)
        assert 0 < sum(seen) <= 2 * evidence.CHUNK < first  # one chunk, under two models
        pd.testing.assert_frame_equal(again.guesses, remembered.guesses)
    finally:
        case.encoder.trunk.__class__ = plain
