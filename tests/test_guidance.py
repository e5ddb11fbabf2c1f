"""Landmarks: they arrive, nothing else moves, the transform stays one to one, and contradictions are named."""

import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_programs import refused, run

import register as program
from drivenmorph_jax import demons
from drivenmorph_jax.demons import guidance
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.warp import compose, warp
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


def head(path, stretch):
    x = (np.moveaxis(np.indices((28, 28, 28)), 0, -1) - 14) / [stretch, 1.1, 1]
    data = np.select([(radius := np.linalg.norm(x, axis=-1)) < 4, radius < 7, radius < 10], [300, 900, 600], 0)
    nib.save(nib.Nifti1Image(data.astype(np.int16), np.array([[-5.0, 0, 0, 70], [0, 5, 0, -70], [0, 0, 5, -70],
                                                             [0, 0, 0, 1]])), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of two images and a table: two landmarks that agree, one that contradicts them, one out of reach."""
    folder = tmp_path_factory.mktemp("guided")
    head(folder / "fixed.nii.gz", 1.1)
    head(folder / "moving.nii.gz", 0.95)
    rows = [f"name,{HEADER},radius", "first,10,0,0,16,4,0,15", "second,-10,0,0,-7,4,0,", "wrong,12,3,0,-20,3,0,15",
            "far,0,-30,10,0,-10,10,8"]
    (folder / "landmarks.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_register_obeys_landmarks_and_names_those_that_it_leaves_out(files, monkeypatch, capsys):
    out = files / "out"
    status, said = run(program, ["--fixed", files / "fixed.nii.gz", "--moving", files / "moving.nii.gz", "--out", out,
                                 "--method", "demons", "--force", "intensity", "--affine", "none", "--landmarks",
                                 files / "landmarks.csv"], monkeypatch, capsys)
    summary = json.loads((out / "summary.json").read_text())
    first, second, wrong, far = summary["landmarks"]
    assert not status and max(first["after_mm"], second["after_mm"]) < 0.5 < first["before_mm"]
    assert first["left_out"] is second["left_out"] is None
    assert wrong["left_out"] == "contradicts landmark first" and "too far for its radius of 8.0 mm" in far["left_out"]
    assert "warning: landmark wrong contradicts landmark first, and is left out" in said
    checks = {one["name"]: one for one in summary["checks"]}
    assert checks["landmarks"]["status"] == "ok" and checks["landmarks left out"]["value"] == 2
    assert summary["fold_pct"] == 0 and "landmarks" in summary["seconds"]


def test_landmarks_may_be_an_array():
    found = read_landmarks([[10, 0, 0, 16, 4, 0], [-10, 0, 0, -7, 4, 0]])
    assert found.names == ("number 1", "number 2") and np.isnan(found.radius).all()
    np.testing.assert_array_equal(found.moving, [[16, 4, 0], [-7, 4, 0]])


@pytest.mark.parametrize("text, sentence", [
    ("x,y,z\n1,2,3\n", "is not a table of landmarks; give a CSV"),
    (f"{HEADER}\n", "holds no landmarks"),
    (f"{HEADER}\n1,2,3,4,5\n", "has no finite numbers .* in line 2"),
    (f"{HEADER}\n1,2,3,4,5,nan\n", "has no finite numbers .* in line 2"),
    (f"{HEADER},radius\n\n1,2,3,4,5,6,-1\n", "radius that is no number above 0 in line 3")])
def test_tables_that_are_none_are_refused(tmp_path, text, sentence):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_landmarks(tmp_path / "l.csv")
    with pytest.raises(InputError, match=r"array of \(2, 3\)"):
        read_landmarks(np.zeros((2, 3)))


def test_a_table_is_read_with_names_and_radii(tmp_path):
    (tmp_path / "l.csv").write_text(f'radius,"name",{HEADER},note\n5,"a, b",1,2,3,4,5,6,x\n,,1,2,3,4,5,7,\n')
    found = read_landmarks(str(tmp_path / "l.csv"))
    assert found.names == ("a, b", "line 3")
    np.testing.assert_array_equal(found.fixed, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(found.moving, [[4, 5, 6], [4, 5, 7]])
    np.testing.assert_array_equal(found.radius, [5, np.nan])


def test_a_point_outside_its_image_is_refused(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.csv").write_text(f"{HEADER}\n0,0,0,0,0,0\n0,0,0,0,300,0\n")
    status, said = run(program, ["--fixed", files / "fixed.nii.gz", "--moving", files / "moving.nii.gz", "--out",
                                 tmp_path / "out", "--landmarks", tmp_path / "l.csv", "--method", "demons"],
                       monkeypatch, capsys)
    refused(status, said, "the moving point of landmark line 3 lies outside")
    assert not (tmp_path / "out").exists()
