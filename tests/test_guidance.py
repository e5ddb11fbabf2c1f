"""Landmarks, curves and labels arrive, nothing else moves, J > 0, and what contradicts is named."""

import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_programs import refused, run

import register as program
from drivenmorph_jax import demons
from drivenmorph_jax.demons import curves, guidance
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.warp import compose, warp
from drivenmorph_jax.registration.guide import labels_left_out
from drivenmorph_jax.registration.read import Request, read
from drivenmorph_jax.transforms.points import read_landmarks

SIDE = 40
GRID = np.moveaxis(np.indices((SIDE,) * 3), 0, -1)
POINTS, TARGETS = np.array([[15.0, 18, 22], [23, 18, 21]]), np.array([[17.5, 19, 20], [25, 19.5, 20]])
HEADER = "fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z"


def onion(stretch=1.0):
    """An image (D, H, W, 1) of shells around the middle, stretched along the first axis."""
    r = np.linalg.norm((GRID - (SIDE - 1) / 2) / [stretch, 1, 1], axis=-1)
    return jnp.asarray(np.where(r < 16, 0.6 + 0.4 * np.sin(r), 0), jnp.float32)[..., None]


def distance(points):
    return np.min([np.linalg.norm(GRID - point, axis=-1) for point in points], 0)


def test_the_force_of_one_landmark_is_the_function_of_wendland():
    v = np.asarray(demons.landmark_force((SIDE,) * 3, POINTS[:1], jnp.array([[0.5, 0, -0.2]]), jnp.array([8.0]), 1.0))
    q = np.minimum(distance(POINTS[:1]) / 8, 1)
    weight = (1 - q) ** 4 * (4 * q + 1) / (1 + guidance.DAMPING)
    np.testing.assert_allclose(v, weight[..., None] * np.array([0.5, 0, -0.2]), atol=1e-5)


def test_the_force_has_its_bound_and_its_values_at_the_points():
    wanted, reach = jnp.array([[0.6, 0, 0], [-0.3, 0.5, 0]]), jnp.array([12.0, 9.0])
    v = np.asarray(demons.landmark_force((SIDE,) * 3, POINTS, wanted, reach, 1.0))
    np.testing.assert_allclose(v[tuple(POINTS.astype(int).T)], wanted, atol=2e-3)
    bounded = np.linalg.norm(demons.landmark_force((SIDE,) * 3, POINTS, 100 * wanted, reach, 1.0), axis=-1)
    assert 0.99 < bounded.max() <= 1 + 1e-5


@pytest.fixture(scope="module", params=[0, 10], ids=["alone", "with images"])
def led(request):
    """(displacement before, after two landmarks of 4 voxels): `guided` alone, and with a force of the images."""
    before = jnp.asarray(np.where(distance([[5, 5, 5]]) < 4, 0.3, 0)[..., None] * np.ones(3), jnp.float32)
    return before, demons.guided(onion(), onion(1.1), before, POINTS, TARGETS, np.array([4.0, 4.0]),
                                 iterations=request.param)


def test_landmarks_arrive_and_nothing_moves_beyond_three_radii(led):
    before, u = led
    assert np.asarray(demons.remaining(u, POINTS, TARGETS)).max() < 0.1
    moved = np.linalg.norm(u - before, axis=-1)
    assert moved[distance(POINTS) > 3 * 4].max() < 1e-5 < 1 < moved.max()


def test_the_transform_has_an_inverse(led):
    u = led[1]
    assert float(jacobian_determinant(u).min()) > 0
    assert float(jnp.linalg.norm(compose(inverse(u), u), axis=-1).mean()) < 0.05


def test_images_drive_what_lies_around_a_landmark():
    """The landmarks say nothing new, so that all change is that of the images."""
    fixed, moving, u = onion(1.1), onion(), jnp.zeros((*(SIDE,) * 3, 3))
    places = np.array([[26.0, 20, 20], [13, 20, 20]])
    led = demons.guided(fixed, moving, u, places, places, np.array([4.0, 4.0]), iterations=10)
    near = distance(places) < 6
    before, after = (float(jnp.square(fixed - warp(moving, x))[near].mean()) for x in (u, led))
    assert after < 0.8 * before and np.asarray(demons.remaining(led, places, places)).max() < 0.1


def test_contradictory_landmarks_are_found_and_consistent_ones_are_not():
    points = np.array([[0.0, 0, 0], [4, 0, 0], [30, 0, 0], [8, 0, 0]])
    shift = np.array([3.0, 1, 0])
    assert demons.contradictory(points, points + shift, np.zeros(4), 0.5) == {}
    targets = points + shift
    targets[1] = targets[0] - (2, 0, 0)  # before the first: the order is reversed
    assert demons.contradictory(points, targets, np.zeros(4), 0.5) == {1: 0}  # it contradicts the last one as well
    twice = points[[0, 0, 2]], points[[0, 0, 2]] + [[3, 0, 0], [-3, 0, 0], [3, 0, 0]]
    assert demons.contradictory(*twice, [1.0, 0, 0], 0.5) == {0: 1}
    assert demons.contradictory(*twice, [0.0, 1, 0], 0.5) == {1: 0}


def test_a_landmark_that_is_too_far_for_its_radius_is_known():
    far = demons.out_of_reach(jnp.zeros((*(SIDE,) * 3, 3)), POINTS, POINTS + (7, 0, 0), np.array([4.0, 5.0]))
    np.testing.assert_array_equal(far, [True, False])


def test_pairs_of_labels_that_are_out_of_reach_or_contradict_others_are_named():
    """Two neighbours that are to change their places; shells around each other, which do not; and one far away."""
    balls = [distance([place]) - size for place, size in (([12, 20, 20], 4), ([20, 20, 20], 4), ([14, 20, 20], 4),
                                                         ([22, 20, 20], 4), ([12, 20, 34], 4), ([12, 20, 20], 7))]
    left, right, left_moved, right_moved, far, around = balls
    pairs = [(17, 17), (53, 53)]

    def left_out(fixed, moved):
        return labels_left_out(pairs, np.stack(fixed, -1), np.stack(moved, -1), 1.0, 1.0)

    assert left_out([left, right], [left_moved, right_moved]) == {}
    found = left_out([left, right], [right, left_moved])
    assert list(found) == [0] and found[0].startswith("contradicts label 53")  # it is the one that lacks more
    assert left_out([left, around], [left_moved, around]) == {}
    found = left_out([left, right], [left_moved, far])
    assert list(found) == [1] and "mm from its partner, too far to be brought there" in found[1]
    twice = labels_left_out(pairs, np.stack([left, right], -1), np.stack([right, left_moved], -1), 2.0, 0.5)
    assert list(twice) == [0]  # lengths are those of the files


def test_a_weight_lets_the_images_decide_partly():
    """The images agree where they are, and pull back what is to move by 3 voxels."""
    image, places, zero = onion(), np.array([[13.0, 20, 20], [28, 20, 20]]), jnp.zeros((*(SIDE,) * 3, 3))

    def lacks(weight, iterations):
        led = demons.guided(image, image, zero, places, places + (3, 0, 0), np.array([4.0, 4.0]),
                            iterations=iterations, trust=np.array([weight, 1]))
        assert float(jacobian_determinant(led).min()) > 0
        first, second = np.asarray(demons.remaining(led, places, places + (3, 0, 0)))
        assert second < 0.1
        return first

    assert lacks(1.0, 10) < 0.1
    assert lacks(0.25, 0) == pytest.approx(0.75 * 3, abs=0.1)  # a quarter of its way
    assert 0.2 < lacks(0.5, 10) < lacks(0.1, 10) < 3.1


def test_the_force_of_a_border_is_what_the_border_lacks_and_is_bounded():
    x = GRID[..., :1].astype(np.float32)
    fixed, warped = (x - place for place in (20.0, 18.6))  # planes; the border of the moving image is 1.4 further left
    p, near = demons.border_force(fixed, warped, 2.0, 6.0), guidance.kernel(abs(fixed) / 6)
    # d = -1.4 and J = 1: d / (1 + d^2 / (4 L^2))
    np.testing.assert_allclose(p[..., :1], near * -1.4 / (1 + 1.4**2 / 16), atol=1e-3)
    np.testing.assert_array_equal(p[..., 1:], 0)
    two = np.concatenate([50 * np.sin(GRID[..., :1]), 9 * np.cos(GRID[..., 1:2])], -1).astype(np.float32)
    p = demons.border_force(two, np.roll(two, (1, 2), (0, 1)), 1.0, 6.0)
    assert 0.5 < np.linalg.norm(p, axis=-1).max() <= 1 + 1e-5


def test_the_signed_distance_of_a_plane_is_that_to_it():
    x = GRID[..., 0].astype(np.float32)
    np.testing.assert_array_equal(demons.signed_distance(x < 20), x - 19.5)


@pytest.mark.parametrize("iterations", [0, 10])
def test_borders_arrive_and_nothing_moves_beyond_three_radii(iterations):
    """Two balls; the second moves and grows. The images say nothing."""
    radius, flat, zero = 4.0, jnp.full((SIDE,) * 3 + (1,), 0.5), jnp.zeros((*(SIDE,) * 3, 3))
    balls = [((12.0, 20, 20), 4.0), ((24.0, 20, 20), 4.0)], [((12.0, 20, 20), 4.0), ((25.5, 21, 20), 5.0)]
    borders = [np.stack([distance([place]) - size for place, size in some], -1).astype(np.float32) for some in balls]
    u = demons.guided(flat, flat, zero, np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), iterations=iterations,
                      borders=borders, border_radius=radius)
    moved = np.asarray(warp(jnp.asarray(borders[1]), u))
    assert np.abs(moved - borders[0])[np.abs(borders[0]) < 1].max() < 0.5
    size = np.linalg.norm(u, axis=-1)
    assert size[np.abs(borders[0]).min(-1) > 3 * radius].max() < 0.05 < 1 < size.max()
    assert float(jacobian_determinant(u).min()) > 0
    assert float(jnp.linalg.norm(compose(inverse(u), u), axis=-1).mean()) < 0.05


def test_places_along_a_curve_have_equal_distances():
    curve = np.array([[0.0, 0, 0], [3, 0, 0], [3, 4, 0], [3, 4, 1]])
    assert curves.length(curve) == 8
    np.testing.assert_allclose(curves.along(curve, 5), [[0, 0, 0], [2, 0, 0], [3, 1, 0], [3, 3, 0], [3, 4, 1]])


def test_a_line_goes_across_itself_and_slides_where_the_images_say_so():
    places, line = np.linspace([0.0, 0], [20, 0], 6), np.array([[0.0, 5], [7, 5], [20, 5]])
    found, far = curves.matching(places, line)
    np.testing.assert_allclose(found, places + (0, 5), atol=1e-9)
    assert far == pytest.approx(25)
    # The images say: not at equal distances. A sine is an eigenvector of second differences with fixed ends.
    sine = 3 * np.sin(np.pi * np.arange(6) / 5)
    found, _ = curves.matching(places + np.outer(sine, [1, 0]), line)
    wanted = places[:, 0] + sine / (1 + curves.EVEN * (2 - 2 * np.cos(np.pi / 5)))
    np.testing.assert_allclose(found[:, 0], wanted, atol=4 / curves.FINER)
    ends, far = curves.matching(places, line[::-1])
    assert far > 25 and (np.diff(ends[:, 0]) < 0).all() and ends[0, 0] == 20 and ends[-1, 0] == 0


def head(path, stretch, values=(300, 900, 600)):
    x = (np.moveaxis(np.indices((28, 28, 28)), 0, -1) - 14) / [stretch, 1.1, 1]
    data = np.select([(radius := np.linalg.norm(x, axis=-1)) < 4, radius < 7, radius < 10], values, 0)
    nib.save(nib.Nifti1Image(data.astype(np.int16), np.array([[-5.0, 0, 0, 70], [0, 5, 0, -70], [0, 0, 5, -70],
                                                             [0, 0, 0, 1]])), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of two images, their labels and a table: two landmarks that agree, one that contradicts them, one out of
    reach, and a curve that has three points in one image and two in the other, from the other end."""
    folder = tmp_path_factory.mktemp("guided")
    head(folder / "fixed.nii.gz", 1.1)
    head(folder / "moving.nii.gz", 0.95)
    rows = [f"name,{HEADER},radius", "first,10,0,0,16,4,0,15", "second,-10,0,0,-7,4,0,", "wrong,12,3,0,-20,3,0,15",
            "far,0,-30,10,0,-10,10,8"]
    rows = [f"{row},{end}" for row, end in zip(rows, ["weight,curve", "1,", ",", ",", ","], strict=True)]
    rows += [",0,20,-20,4,24,15,,,ridge", ",0,20,5,,,,,,ridge", ",0,20,15,4,24,-20,,,ridge"]
    head(folder / "fixed_seg.nii.gz", 1.1, (1, 2, 3))
    head(folder / "moving_seg.nii.gz", 0.95, (1, 3, 2))
    (folder / "landmarks.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_register_obeys_landmarks_and_names_those_that_it_leaves_out(files, monkeypatch, capsys):
    out = files / "out"
    status, said = run(program, ["--fixed", files / "fixed.nii.gz", "--moving", files / "moving.nii.gz", "--out", out,
                                 "--method", "demons", "--force", "intensity", "--affine", "none", "--landmarks",
                                 files / "landmarks.csv", "--guide_labels", "2=3", "--fixed_labels",
                                 files / "fixed_seg.nii.gz", "--moving_labels", files / "moving_seg.nii.gz"],
                       monkeypatch, capsys)
    summary = json.loads((out / "summary.json").read_text())
    first, second, wrong, far, *ridge = summary["landmarks"]
    assert not status and max(first["after_mm"], second["after_mm"]) < 0.5 < first["before_mm"]
    assert first["left_out"] is second["left_out"] is None
    assert wrong["left_out"] == "contradicts landmark first" and "too far for its radius of 8.0 mm" in far["left_out"]
    assert [one["name"] for one in ridge] == [f"ridge ({k} of 8)" for k in range(1, 9)]
    np.testing.assert_allclose([one["fixed"] for one in ridge], [[0, 20, 5 * k - 20] for k in range(8)], atol=1e-6)
    assert max(one["after_mm"] for one in ridge) < 0.5
    u = np.asarray(nib.load(out / "displacement.nii.gz").dataobj)[16, 20, 16, 0]  # on the curve, in LPS
    np.testing.assert_allclose(u, [-4, -4, 0], atol=0.5)
    checks = {one["name"]: one for one in summary["checks"]}
    (pair,) = summary["guided_labels"]
    assert (pair["fixed"], pair["moving"], pair["left_out"]) == (2, 3, None)
    assert pair["dice_after"] > max(0.9, pair["dice_before"]) and checks["guided labels"]["status"] == "ok"
    assert "warning: landmark wrong contradicts landmark first, and is left out" in said
    assert checks["landmarks"]["status"] == "ok" and checks["landmarks left out"]["value"] == 2
    assert summary["fold_pct"] == 0 and "guide" in summary["seconds"]


def test_landmarks_may_be_an_array():
    found = read_landmarks([[10, 0, 0, 16, 4, 0], [-10, 0, 0, -7, 4, 0]])
    assert found.names == ("number 1", "number 2") and np.isnan(found.radius).all()
    np.testing.assert_array_equal(found.moving, [[16, 4, 0], [-7, 4, 0]])


@pytest.mark.parametrize("text, sentence", [
    ("x,y,z\n1,2,3\n", "is not a table of landmarks; give a CSV"),
    (f"{HEADER}\n", "holds no landmarks"),
    (f"{HEADER}\n1,2,3,4,5\n", "has no finite numbers .* in line 2"),
    (f"{HEADER}\n1,2,3,4,5,nan\n", "has no finite numbers .* in line 2"),
    (f"{HEADER},radius\n\n1,2,3,4,5,6,-1\n", "radius that is no number above 0 in line 3"),
    (f"{HEADER},weight\n1,2,3,4,5,6,1.5\n", "weight that is no number above 0 and up to 1 in line 2"),
    (f"{HEADER},curve\n1,2,3,4,5,6,a\n1,2,4,,,,a\n", "no two different moving points of the curve a"),
    (f"{HEADER},curve\n1,2,3,4,,6,a\n", "has no finite numbers .* in line 2"),
    (f"{HEADER},curve\n1,2,3,4,5,6,\n1,2,4,,,,\n", "has no finite numbers .* in line 3")])
def test_tables_that_are_none_are_refused(tmp_path, text, sentence):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_landmarks(tmp_path / "l.csv")
    with pytest.raises(InputError, match=r"array of \(2, 3\)"):
        read_landmarks(np.zeros((2, 3)))


def test_a_table_is_read_with_names_and_radii(tmp_path):
    (tmp_path / "l.csv").write_text(f'radius,"name",{HEADER},note,weight,curve\n5,"a, b",1,2,3,4,5,6,x,.5,\n'
                                    ",,1,2,3,4,5,7,,,\n,,,,,4,5,7,,.3,a\n7,,1,2,3,,,,,.4,a\n,,1,2,9,4,5,8,,,a\n")
    found = read_landmarks(str(tmp_path / "l.csv"))
    assert found.names == ("a, b", "line 3")
    np.testing.assert_array_equal(found.fixed, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(found.moving, [[4, 5, 6], [4, 5, 7]])
    np.testing.assert_array_equal(found.radius, [5, np.nan])
    np.testing.assert_array_equal(found.weight, [0.5, 1])
    (curve,) = found.curves
    assert (curve.name, curve.radius, curve.weight) == ("a", 7, 0.3)
    np.testing.assert_array_equal(curve.fixed, [[1, 2, 3], [1, 2, 9]])
    np.testing.assert_array_equal(curve.moving, [[4, 5, 7], [4, 5, 8]])


def test_a_point_outside_its_image_is_refused(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.csv").write_text(f"{HEADER}\n0,0,0,0,0,0\n0,0,0,0,300,0\n")
    status, said = run(program, ["--fixed", files / "fixed.nii.gz", "--moving", files / "moving.nii.gz", "--out",
                                 tmp_path / "out", "--landmarks", tmp_path / "l.csv", "--method", "demons"],
                       monkeypatch, capsys)
    refused(status, said, "the moving point of landmark line 3 lies outside")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels, sentence", [
    (["17", "x"], "'x': give labels above 0"), (["0"], "'0': give labels above 0"), (["1=2=3"], "'1=2=3': give"),
    ([17, "17=18"], "label 17 of the fixed image twice"), (["1=3", "2=3"], "label 3 of the moving image twice"),
    (["2", "4"], r"fixed_seg\.nii\.gz has no label 4"), ([2], "give moving_labels to register, too")])
def test_labels_that_cannot_guide_are_refused(files, labels, sentence):
    maps = {f"{role}_labels": files / f"{role}_seg.nii.gz" for role in ("fixed", "moving")}
    if len(labels) == 1:
        del maps["moving_labels"]
    with pytest.raises(InputError, match=sentence):
        read(Request(fixed=files / "fixed.nii.gz", moving=files / "moving.nii.gz", method="demons",
                     guide_labels=labels, **maps))
