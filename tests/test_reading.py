"""Transforms of other tools: read as those tools apply them, or refused in one sentence."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from test_apply import made
from test_programs import run
from test_transforms import T, points_of

import apply as program
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import load_grid
from drivenmorph_jax.images.volume import on_grid
from drivenmorph_jax.transforms.files import learn2reg_name
from drivenmorph_jax.transforms.itk import to_itk, write_affine
from drivenmorph_jax.transforms.maps import faded
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import linear_part

FLIP = np.array([-1, -1, 1])
PAIRS = [("anisotropic", "flipped"), ("oblique", "isotropic"), ("isotropic", "oblique")]


@pytest.fixture(params=PAIRS, ids=" to ".join, scope="module")
def transform(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"), *request.param)


def fsl_frame(volume):
    """By the words of FSL's FAQ: mm from the first voxel, and from the last along i if the determinant is positive."""
    matrix = np.diag([*volume.spacing, 1])
    if np.linalg.det(volume.affine[:3, :3]) > 0:
        matrix = matrix @ np.array([[-1, 0, 0, volume.data.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return matrix @ np.linalg.inv(volume.affine)


def nifti(path, data, grid, code=0, name="", p1=0.0, extension=None):
    image = nib.Nifti1Image(data.astype(np.float32), grid.affine)
    image.header["intent_code"], image.header["intent_name"], image.header["intent_p1"] = code, name.encode(), p1
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(*extension))
    nib.save(image, path)


def fields(transform):
    """{what: (name of a file, what `nifti` writes to it, the convention if the file does not tell it)}"""
    x = points_of(transform.grid.data.shape, transform.grid.affine)
    d, y = transform.displacement, x + transform.displacement
    i = np.moveaxis(np.indices(transform.grid.data.shape), 0, -1)
    to_moving, to_fixed = fsl_frame(transform.other), fsl_frame(transform.grid)
    lps, five = d * FLIP, (slice(None),) * 3 + (None,)
    absolute = apply_affine(to_moving, y)
    return {
        "ITK": ("a.nii", (lps[five], 1007), None),
        "RAS": ("a.nii", (d[five], 1006), None),
        "SPM": ("y_a.nii", (y[five], 1007, "Mapping"), None),
        "NiftyReg's deformation": ("a.nii", (y[five], 1007, "NREG_TRANS", 0), None),
        "NiftyReg's displacement": ("a.nii", (d[five], 1007, "NREG_TRANS", 1), None),
        "AFNI": ("a.nii", (lps[five], 0, "", 0, (4, b"<AFNI_attributes/>")), None),
        "FSL, absolute": ("a.nii.gz", (absolute, 2006), None),
        "FSL, relative": ("a.nii.gz", (absolute - apply_affine(to_fixed, x), 2006), None),
        "Learn2Reg": ("disp_0001_0002.nii.gz", (apply_affine(np.linalg.inv(transform.other.affine), y) - i,), None),
        "by its user": ("a.nii", (d[five],), "ras"),
    }


@pytest.mark.parametrize("what", ["ITK", "RAS", "SPM", "NiftyReg's deformation", "NiftyReg's displacement", "AFNI",
                                  "FSL, absolute", "FSL, relative", "Learn2Reg", "by its user"])
def test_a_field_is_read_by_its_convention(transform, what, tmp_path):
    name, written, convention = fields(transform)[what]
    data, *header = written
    nifti(tmp_path / name, data, transform.grid, *header)
    found = Transform.load(tmp_path / name, convention=convention, fixed=transform.grid, moving=transform.other)
    np.testing.assert_allclose(found.displacement, transform.displacement, atol=2e-4)
    np.testing.assert_allclose(found.grid.affine, transform.grid.affine, atol=1e-5)


@pytest.mark.parametrize(("fixed", "moving", "name"), [
    ("OASIS_0438_0000", "OASIS_0439_0000", "disp_0438_0000_0439_0000"), ("OASIS_0438", "OASIS_0439_0000",
                                                                         "disp_0438_0000_0439_0000"),
    ("ThoraxCBCT_0011_0000", "ThoraxCBCT_0011_0001", "disp_0011_0011"), ("a_0001", "b", "disp_a_0001_b"),
    ("sub-12345", "sub-0001", "disp_sub-12345_sub-0001")])
def test_names_of_fields_are_those_that_learn2reg_looks_for(fixed, moving, name):
    assert learn2reg_name(fixed, moving) == f"{name}.nii.gz"


def test_a_field_that_does_not_tell_its_convention_is_refused(transform, tmp_path):
    for shape in ((5, 5, 5, 1, 3), (5, 5, 5, 3)):
        nifti(tmp_path / "a.nii", np.zeros(shape), transform.grid)
        with pytest.raises(InputError, match="a.nii does not tell what its vectors are; give --convention"):
            Transform.load(tmp_path / "a.nii")
    for code, name, p1, said in ((2009, "", 0, "fnirtfileutils"), (1007, "NREG_TRANS", 2, "reg_transform"),
                                 (1007, "NREG_TRANS", 5, "reg_transform")):
        nifti(tmp_path / "a.nii", np.zeros((5, 5, 5, 1, 3)), transform.grid, code, name, p1)
        with pytest.raises(InputError, match=said):
            Transform.load(tmp_path / "a.nii")
    nifti(tmp_path / "a.nii", np.zeros((5, 5, 5, 3)), transform.grid, 2006)
    with pytest.raises(InputError, match="the moving image is missing"):
        Transform.load(tmp_path / "a.nii")
    with pytest.raises(InputError, match="convention is 'elastix'"):
        Transform.load(tmp_path / "a.nii", convention="elastix")
    nifti(tmp_path / "disp_1_2.nii", np.zeros((5, 5, 5, 3)), transform.grid)
    with pytest.raises(InputError, match="a field of Learn2Reg, .* the moving image is missing"):
        Transform.load(tmp_path / "disp_1_2.nii")
    transform.save(tmp_path / "ours.nii")
    with pytest.raises(InputError, match="convention is ras, but .*ours.nii tell their own: leave it out"):
        Transform.load(tmp_path / "ours.nii", convention="ras")
    nifti(tmp_path / "a.nii", np.zeros((*transform.grid.data.shape, 1, 3)), transform.grid)
    chain = Transform.load([tmp_path / "a.nii", tmp_path / "ours.nii"], convention="spm")  # of the first file alone
    y = points_of(transform.grid.data.shape, transform.grid.affine)[10, 10, 8]
    np.testing.assert_allclose(chain.points(y[None]), transform.points([[0, 0, 0]]), atol=1e-3)


def test_matrices_of_greedy_and_of_flirt(transform, tmp_path):
    np.savetxt(tmp_path / "greedy.mat", T)
    flirt = np.linalg.inv(fsl_frame(transform.other) @ T @ np.linalg.inv(fsl_frame(transform.grid)))
    np.savetxt(tmp_path / "flirt.mat", flirt)
    points = np.random.default_rng(0).uniform(-50, 50, (20, 3))
    for name in ("greedy", "flirt"):
        with pytest.raises(InputError, match=f"{name}.mat is a matrix .* --convention greedy .* --convention flirt"):
            Transform.load(tmp_path / f"{name}.mat", fixed=transform.grid)
        found = Transform.load(tmp_path / f"{name}.mat", convention=name, fixed=transform.grid, moving=transform.other)
        np.testing.assert_allclose(found.points(points), apply_affine(T, points), atol=1e-6)
        np.testing.assert_allclose(found.inverse.points(found.points(points)), points, atol=1e-6)
    with pytest.raises(InputError, match="the fixed and moving image is missing|the fixed image is missing"):
        Transform.load(tmp_path / "flirt.mat", convention="flirt", moving=transform.other)


@pytest.mark.parametrize("ending", [".tfm", ".txt", ".mat", ".h5", ".hdf5"])
def test_an_itk_transform_is_read_from_every_kind_of_file(transform, tmp_path, ending):
    """A rigid transform about a centre, a field, and both as a composite, as ITK itself maps points."""
    rigid = sitk.Euler3DTransform((10, 20, 30), 0.1, 0.2, 0.3, (4, 5, 6))
    transform.save(tmp_path / "field.h5")
    field = sitk.CompositeTransform(sitk.ReadTransform(tmp_path / "field.h5")).GetNthTransform(1)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((np.eye(3) + np.random.default_rng(0).normal(0, 0.1, (3, 3))).ravel().tolist())
    affine.SetCenter((7.0, -3.0, 2.0))
    kinds = [rigid, affine]
    if ending in (".h5", ".hdf5"):
        kinds += [field, sitk.CompositeTransform([rigid, field, affine])]
    points = np.random.default_rng(0).uniform(-40, 40, (50, 3))  # also beyond the grid of the field
    for itk in kinds:
        sitk.WriteTransform(itk, tmp_path / f"a{ending}")
        found = Transform.load(tmp_path / f"a{ending}", fixed=transform.grid)
        theirs = np.array([itk.TransformPoint(p) for p in (points * FLIP).tolist()]) * FLIP
        np.testing.assert_allclose(found.points(points), theirs, atol=2e-3)


def test_a_spline_of_itk_alone_and_after_an_affine(transform, tmp_path):
    lps = np.diag([-1, -1, 1, 1]) @ transform.grid.affine
    image = sitk.Image(transform.grid.data.shape, sitk.sitkFloat32)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(transform.grid.spacing.tolist())
    image.SetDirection((lps[:3, :3] / transform.grid.spacing).ravel().tolist())
    spline = sitk.BSplineTransformInitializer(image, (4, 4, 4))
    spline.SetParameters(np.random.default_rng(0).normal(0, 2, len(spline.GetParameters())).tolist())
    shift = sitk.TranslationTransform(3, (60.0, -40.0, 5.0))
    points = apply_affine(transform.grid.affine, np.random.default_rng(1).uniform(
        2, np.array(transform.grid.data.shape) - 3, (50, 3)))
    # ITK applies the shift first, which leads into the domain of the spline from far away.
    for name, itk, at in (("a.tfm", spline, points * FLIP),
                          ("b.h5", sitk.CompositeTransform([spline, shift]), points * FLIP - (60, -40, 5))):
        sitk.WriteTransform(itk, tmp_path / name)
        found = Transform.load(tmp_path / name, fixed=transform.grid)
        theirs = np.array([itk.TransformPoint(p) for p in at.tolist()]) * FLIP
        np.testing.assert_allclose(found.points(at * FLIP), theirs, atol=0.03)


def test_files_that_are_cut_short_are_refused(transform, tmp_path):
    """ITK takes a text that is cut short for the identity, and prints pages of a cut HDF5 file."""
    for name in ("a.tfm", "a.txt", "a.h5", "a.lta", "a.mgz", "a.nii.gz"):
        transform.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        Transform.load(tmp_path / name, fixed=transform.grid)
        for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            (tmp_path / name).write_bytes(whole[:int(share * len(whole))])
            with pytest.raises(InputError, match=name):
                Transform.load(tmp_path / name, fixed=transform.grid)
    for name in ("summary.json", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "summary.json").write_text("{}")
        with pytest.raises(InputError, match="is no file of a transform|is a folder"):
            Transform.load(tmp_path / name)


@pytest.mark.parametrize("shape", [(20, 20, 3), (20, 20, 1), (20, 4, 20), (1, 1, 1)])
def test_the_affine_part_of_a_thin_field(tmp_path, shape):
    displacement = np.broadcast_to(np.float32([5, -3, 2]), (*shape, 3))
    found = linear_part(displacement, np.diag([2.0, 1, 3, 1]))
    np.testing.assert_allclose(found, nib.affines.from_matvec(np.eye(3), (5, -3, 2)), atol=1e-6)


def test_a_field_of_a_large_shift_takes_little_memory():
    field = faded(np.full((20, 20, 20, 3), 500, np.float32), np.diag([3.0, 3, 3, 1]), np.eye(4))
    assert max(field.near.shape) < 60
    np.testing.assert_allclose(field([[30, 30, 30], [200, 30, 30]]), [[530, 530, 530], [200, 30, 30]], atol=1e-3)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_field_in_an_image_file_of_itk(transform, tmp_path, ending):
    transform.save(tmp_path / "a.nii")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "a.nii"), tmp_path / f"a{ending}")
    found, wanted = (Transform.load(tmp_path / name) for name in (f"a{ending}", "a.nii"))
    points = apply_affine(transform.grid.affine, np.random.default_rng(0).uniform(2, 12, (50, 3)))
    np.testing.assert_allclose(found.points(points), wanted.points(points), atol=1e-3)


@pytest.mark.parametrize("kind", [0, 1])
def test_an_lta_maps_its_source_to_its_destination(transform, tmp_path, kind):
    from drivenmorph_jax.transforms.freesurfer import write_lta
    write_lta(tmp_path / "a.lta", T, transform.grid, transform.other)
    if kind == 0:  # voxels of the moving image to voxels of the fixed one
        matrix = np.linalg.inv(transform.grid.affine) @ np.linalg.inv(T) @ transform.other.affine
        lines = (tmp_path / "a.lta").read_text().splitlines()
        lines[0] = "type      = 0 # LINEAR_VOX_TO_VOX"
        lines[5:9] = [" ".join(f"{value:.15e}" for value in row) for row in matrix]
        (tmp_path / "a.lta").write_text("# made by a test\n" + "\n".join(lines) + "\n")
    found = Transform.load(tmp_path / "a.lta", fixed=transform.grid)
    np.testing.assert_allclose(found.linear, T, atol=1e-6)
    np.testing.assert_allclose(found.other.affine, transform.other.affine, atol=1e-6)


def test_surfa_reads_our_lta_and_we_read_its(transform, tmp_path):
    sf = pytest.importorskip("surfa", reason="needs surfa")
    from drivenmorph_jax.transforms.freesurfer import write_lta
    write_lta(tmp_path / "ours.lta", T, transform.grid, transform.other)
    theirs = sf.load_affine(str(tmp_path / "ours.lta"))
    np.testing.assert_allclose(theirs.convert(space="world").matrix, np.linalg.inv(T), atol=1e-6)
    theirs.convert(space="voxel").save(str(tmp_path / "theirs.lta"))
    np.testing.assert_allclose(Transform.load(tmp_path / "theirs.lta", fixed=transform.grid).linear, T, atol=1e-5)


@pytest.mark.parametrize("ending", [".mgz", ".nii.gz"])
@pytest.mark.parametrize("kind", ["abs_crs", "disp_crs", "abs_ras", "disp_ras"])
def test_surfa_reads_our_warp_and_we_read_its(transform, tmp_path, kind, ending):
    sf = pytest.importorskip("surfa", reason="needs surfa")
    if np.lib.NumpyVersion(np.__version__) >= "2.3.0":
        pytest.skip("surfa 0.6.3 reads no file with this NumPy")
    source, target = (sf.ImageGeometry(volume.data.shape, vox2world=volume.affine)
                      for volume in (transform.other, transform.grid))
    theirs = sf.Warp(transform.displacement, source, target, format=sf.Warp.Format.disp_ras)
    theirs.convert(getattr(sf.Warp.Format, kind)).save(str(tmp_path / f"theirs{ending}"))
    found = Transform.load(tmp_path / f"theirs{ending}")
    np.testing.assert_allclose(found.displacement, transform.displacement, atol=2e-3)
    np.testing.assert_allclose(found.grid.affine, transform.grid.affine, atol=1e-4)
    np.testing.assert_allclose(found.other.affine, transform.other.affine, atol=1e-4)
    if ending == ".mgz":
        transform.save(tmp_path / "ours.mgz")
        again = sf.load_warp(str(tmp_path / "ours.mgz")).convert(sf.Warp.Format.disp_ras)
        np.testing.assert_allclose(again.data, transform.displacement, atol=1e-5)
        np.testing.assert_allclose(again.source.vox2world.matrix, transform.other.affine, atol=1e-4)
        moving = sf.load_volume(transform.other.path)
        applied = sf.load_warp(str(tmp_path / "ours.mgz")).transform(moving).data.squeeze()
        ours = np.asarray(transform.apply(transform.other.path).dataobj)
        inside = ours > 0.05 * ours.max()
        assert np.abs(applied - ours)[inside].mean() < 0.01 * np.ptp(ours)


def test_fslpy_applies_our_warp_and_reads_a_flirt_matrix_as_we_do(transform, tmp_path):
    pytest.importorskip("fsl.transform", reason="needs fslpy")
    from fsl.data.image import Image
    from fsl.transform import flirt, fnirt
    fixed, moving = Image(transform.grid.path), Image(transform.other.path)
    transform.save(tmp_path / "fsl.nii.gz", "fsl")
    warp = fnirt.readFnirt(str(tmp_path / "fsl.nii.gz"), moving, fixed)
    assert warp.deformationType == "relative"
    voxels = np.random.default_rng(0).integers(3, np.array(transform.grid.data.shape) - 3, (50, 3))
    theirs = warp.transform(voxels, "voxel", "world")
    np.testing.assert_allclose(theirs, apply_affine(transform.grid.affine, voxels) + transform.displacement[
        tuple(voxels.T)], atol=1e-3)
    matrix = flirt.toFlirt(np.linalg.inv(T), moving, fixed, "world", "world")
    np.savetxt(tmp_path / "flirt.mat", matrix)
    found = Transform.load(tmp_path / "flirt.mat", convention="flirt", fixed=transform.grid, moving=transform.other)
    np.testing.assert_allclose(found.linear, T, atol=1e-5)


@pytest.mark.parametrize("form", ["displacements", "deformations"])
def test_x5_holds_a_matrix_or_a_field(transform, tmp_path, form):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    x = points_of(transform.grid.data.shape, transform.grid.affine)
    for name, kind, data in (("a.x5", "linear", T),
                             ("b.x5", "nonlinear", transform.displacement + x * (form == "deformations"))):
        with h5py.File(tmp_path / name, "w") as file:
            file.attrs["Format"] = "X5"
            node = file.create_group("TransformGroup/0")
            node.attrs["Type"], node.attrs["Representation"] = kind, form
            node["Transform"], node["Domain/Mapping"] = data, transform.grid.affine
    np.testing.assert_allclose(Transform.load(tmp_path / "a.x5", fixed=transform.grid).linear, T)
    found = Transform.load(tmp_path / "b.x5")
    np.testing.assert_allclose(found.displacement, transform.displacement, atol=1e-4)
    np.testing.assert_allclose(found.grid.affine, transform.grid.affine)
    with h5py.File(tmp_path / "b.x5", "a") as file:
        file.copy("TransformGroup/0", "TransformGroup/1")
    with pytest.raises(InputError, match="b.x5 holds 2 transforms"):
        Transform.load(tmp_path / "b.x5")


def test_nitransforms_maps_points_as_we_do(transform, tmp_path):
    pytest.importorskip("nitransforms", reason="needs nitransforms")
    from nitransforms.io.x5 import to_filename
    from nitransforms.linear import Affine as Linear
    from nitransforms.nonlinear import DenseFieldTransform
    grid = nib.load(transform.grid.path)
    some = np.random.default_rng(0).integers(2, np.array(transform.grid.data.shape) - 2, (50, 3))
    points = apply_affine(transform.grid.affine, some)
    y = points + transform.displacement[tuple(some.T)]
    theirs = Linear(T, reference=grid)
    to_filename(tmp_path / "a.x5", [theirs.to_x5()])
    np.testing.assert_allclose(Transform.load(tmp_path / "a.x5", fixed=transform.grid).points(points),
                               theirs.map(points), atol=1e-4)
    theirs.to_filename(tmp_path / "a.tfm", fmt="itk")
    np.testing.assert_allclose(Transform.load(tmp_path / "a.tfm", fixed=transform.grid).linear, T, atol=1e-5)
    write_affine(tmp_path / "ours.tfm", T)
    np.testing.assert_allclose(Linear.from_filename(tmp_path / "ours.tfm", fmt="itk").matrix, T, atol=1e-5)
    field = DenseFieldTransform(nib.Nifti1Image(transform.displacement, transform.grid.affine), reference=grid)
    to_filename(tmp_path / "b.x5", [field.to_x5()])
    np.testing.assert_allclose(Transform.load(tmp_path / "b.x5").points(points), field.map(points), atol=1e-3)
    transform.save(tmp_path / "ours.nii.gz")
    np.testing.assert_allclose(DenseFieldTransform.from_filename(tmp_path / "ours.nii.gz", fmt="itk").map(points), y,
                               atol=1e-3)


def test_dipy_applies_its_mapping_as_we_do(tmp_path):
    align = pytest.importorskip("dipy.align", reason="needs dipy")
    pair = made(tmp_path, "anisotropic", "flipped")
    fixed, moving = (nib.load(volume.path) for volume in (pair.grid, pair.other))
    moving = nib.Nifti1Image(moving.get_fdata(), nib.affines.from_matvec(np.eye(3), (3, -2, 1)) @ moving.affine)
    theirs, mapping = align.syn_registration(moving.get_fdata(), fixed.get_fdata(), moving_affine=moving.affine,
                                             static_affine=fixed.affine, level_iters=[10, 5])
    align.write_mapping(mapping, str(tmp_path / "a.nii.gz"))
    found = Transform.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(found.grid.affine, fixed.affine, atol=1e-4)
    assert np.linalg.norm(found.displacement, axis=-1).max() > 1
    ours = np.asarray(found.apply(moving).dataobj)
    inside = ours > 0.05 * ours.max()
    assert np.abs(theirs - ours)[inside].mean() < 0.002 * np.ptp(ours)


def test_elastix_applies_its_field_as_we_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # transformix writes a file of its own where it runs
    itk = pytest.importorskip("itk", reason="needs itk-elastix")
    if not hasattr(itk, "elastix_registration_method"):
        pytest.skip("needs itk-elastix")
    pair = made(tmp_path, "anisotropic", "flipped")
    shifted = nib.load(pair.other.path)
    shifted = nib.Nifti1Image(shifted.get_fdata(dtype=np.float32),
                              nib.affines.from_matvec(np.eye(3), (3, -2, 1)) @ shifted.affine)
    nib.save(shifted, tmp_path / "shifted.nii.gz")
    fixed, moving = (itk.imread(str(path), itk.F) for path in (pair.grid.path, tmp_path / "shifted.nii.gz"))
    parameters = itk.ParameterObject.New()
    settings = itk.ParameterObject.New().GetDefaultParameterMap("bspline", 2, 16.0)
    settings["MaximumNumberOfIterations"], settings["FinalBSplineInterpolationOrder"] = ("40",), ("1",)
    parameters.AddParameterMap(settings)
    theirs, found = itk.elastix_registration_method(fixed, moving, parameter_object=parameters, log_to_console=False)
    itk.imwrite(itk.transformix_deformation_field(moving, found), str(tmp_path / "deformationField.nii.gz"))
    field = Transform.load(tmp_path / "deformationField.nii.gz")
    assert np.linalg.norm(field.displacement, axis=-1).max() > 1
    ours = np.asarray(field.apply(shifted).dataobj)
    inside = ours > 0.05 * ours.max()
    assert np.abs(itk.array_from_image(theirs).transpose(2, 1, 0) - ours)[inside].mean() < 0.002 * np.ptp(ours)


def test_affines_about_centres_as_unigradicon_writes_them(transform, tmp_path):
    """SimpleITK's own ReadTransform refuses these. The composite leads to the network's grid, by a field, and back."""
    from SimpleITK import _SimpleITK
    points = np.random.default_rng(0).uniform(-8, 8, (30, 3))
    steps = []
    for name, matrix in (("to", np.diag([1.1, 0.9, 1.05])), ("from", np.eye(3) + 0.1 * np.arange(9).reshape(3, 3) / 9)):
        path = tmp_path / f"{name}.tfm"
        numbers = " ".join(f"{x:.17g}" for x in (*matrix.ravel(), 3, -4, 5, 1, 2, -1))
        path.write_text("#Insight Transform File V1.0\n#Transform 0\nTransform: CenteredAffineTransform_double_3_3\n"
                        f"Parameters: {numbers}\nFixedParameters: 3 -4 5\n")
        moved = ((points * FLIP - (3, -4, 5)) @ matrix.T + (3, -4, 5) + (1, 2, -1)) * FLIP
        np.testing.assert_allclose(Transform.load(path, fixed=transform.grid).points(points), moved, atol=1e-9)
        steps.append(_SimpleITK.ReadTransform(str(path)))
    transform.save(tmp_path / "d.h5")
    composite = sitk.CompositeTransform(3)  # the last one is applied first
    for one in (steps[1], sitk.ReadTransform(tmp_path / "d.h5").GetNthTransform(1), steps[0]):
        composite.AddTransform(one)
    sitk.WriteTransform(composite, tmp_path / "a.hdf5")
    theirs = np.array([composite.TransformPoint(p) for p in (points * FLIP).tolist()]) * FLIP
    np.testing.assert_allclose(Transform.load(tmp_path / "a.hdf5", fixed=transform.grid).points(points), theirs,
                               atol=2e-3)


def test_greedy_applies_its_matrix_as_we_do(tmp_path):
    pytest.importorskip("picsl_greedy", reason="needs picsl-greedy")
    transform = made(tmp_path, "isotropic", "oblique")
    np.savetxt(tmp_path / "affine.mat", T)
    command = (f"-d 3 -rf {transform.grid.path} -rm {transform.other.path} {tmp_path}/theirs.nii.gz "
               f"-r {tmp_path}/affine.mat")
    # In a process of its own: it reads no file where ITK's Python package has been imported before.
    subprocess.run([sys.executable, "-c", f"import picsl_greedy; picsl_greedy.Greedy3D().execute({command!r})"],
                   check=True)
    theirs = nib.load(tmp_path / "theirs.nii.gz").get_fdata()
    found = Transform.load(tmp_path / "affine.mat", convention="greedy", fixed=transform.grid)
    ours = np.asarray(found.apply(transform.other.path).dataobj)
    inside = ours > 0.05 * ours.max()
    assert np.abs(theirs - ours)[inside].mean() < 0.005 * np.ptp(ours)


def test_ants_applies_a_chain_as_we_do(tmp_path):
    ants = pytest.importorskip("ants", reason="needs ANTsPy")
    transform = made(tmp_path, "anisotropic", "oblique")
    Transform(transform.displacement - points_of_affine(transform), transform.grid, np.eye(4)).save(
        tmp_path / "1Warp.nii.gz")
    write_affine(tmp_path / "0GenericAffine.mat", T)
    names = [str(tmp_path / name) for name in ("1Warp.nii.gz", "0GenericAffine.mat")]
    fixed, moving = (ants.image_read(volume.path) for volume in (transform.grid, transform.other))
    theirs = ants.apply_transforms(fixed, moving, names).numpy()
    found = Transform.load(names)
    ours = np.asarray(found.apply(transform.other.path).dataobj)
    inside = ours > 0.05 * ours.max()
    assert np.abs(theirs - ours)[inside].mean() < 0.002 * np.ptp(ours)
    theirs = ants.apply_transforms(fixed, moving, names[1:], whichtoinvert=[True]).numpy()
    back = Transform.load(f"{names[1]}:inverse", fixed=transform.grid)
    ours = np.asarray(back.apply(transform.other.path).dataobj)
    inside = ours > 0.05 * ours.max()
    assert np.abs(theirs - ours)[inside].mean() < 0.002 * np.ptp(ours)


def points_of_affine(transform):
    """The displacement that T adds after another one: T y - y at y = T^-1 (x + d(x))."""
    x = points_of(transform.grid.data.shape, transform.grid.affine)
    y = x + transform.displacement
    return y - apply_affine(np.linalg.inv(T), y)


def test_a_chain_goes_from_the_first_file_to_the_last_and_back(transform, tmp_path, monkeypatch, capsys):
    transform.save(tmp_path / "first.nii.gz")
    second = np.diag([1.1, 0.9, 1, 1])
    sitk.WriteTransform(to_itk(second), tmp_path / "second.tfm")
    points = np.random.default_rng(0).uniform(-6, 6, (50, 3))
    names = [tmp_path / "first.nii.gz", tmp_path / "second.tfm"]
    there = apply_affine(second, transform.points(points))
    chain = Transform.load(names)
    np.testing.assert_allclose(chain.points(points), there, atol=1e-4)
    back = Transform.load([f"{names[1]}:inverse", f"{names[0]}:inverse"], fixed=transform.other)
    np.testing.assert_allclose(back.points(there), points, atol=2e-3)
    np.testing.assert_allclose(Transform.load(names, moving=transform.other).inverse.points(there), points, atol=2e-3)
    for arguments, said in (
            (["--transform", names[0], "--transform", names[1]], "is given twice"),
            (["--transform", names[1]], "give an image with that grid as --reference"),
            (["--transform", *names, "--convention", "ras"], "tell their own: leave it out")):
        status, text = run(program, [*arguments, "--moving", transform.other.path, "--out", tmp_path / "o.nii"],
                           monkeypatch, capsys)
        assert status and said in text and not (tmp_path / "o.nii").exists()
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n")
    status, text = run(program, ["--transform", *names, "--points", tmp_path / "p.csv", "--out", tmp_path / "q.csv"],
                       monkeypatch, capsys)
    moved = [float(x) for x in (tmp_path / "q.csv").read_text().splitlines()[1].split(",")]
    np.testing.assert_allclose(moved, chain.points([[1, 2, 3]])[0], atol=1e-6)
    run(program, ["--transform", names[1], "--inverse", "--points", tmp_path / "p.csv", "--out", tmp_path / "q.csv"],
        monkeypatch, capsys)  # points need no grid
    moved = [float(x) for x in (tmp_path / "q.csv").read_text().splitlines()[1].split(",")]
    np.testing.assert_allclose(moved, [1 / 1.1, 2 / 0.9, 3])


def test_every_format_that_we_write_is_read_back(transform, tmp_path):
    for name, form in (("a.nii.gz", "itk"), ("b.nii", "ras"), ("c.h5", "itk"), ("d.mgz", "itk"), ("y_e.nii", "spm"),
                       ("f.nii.gz", "fsl"), ("g.nii.gz", "afni")):
        transform.save(tmp_path / name, form)
        found = Transform.load(tmp_path / name, fixed=transform.grid, moving=transform.other)
        np.testing.assert_allclose(found.displacement, transform.displacement, atol=1e-3, err_msg=name)
    transform.save(tmp_path / "h.lta")
    np.testing.assert_allclose(Transform.load(tmp_path / "h.lta", fixed=transform.grid).linear, T, atol=1e-9)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.h5"])
def test_beyond_the_grid_the_affine_continues_and_itk_agrees(transform, tmp_path, name):
    transform.save(tmp_path / name)
    shape, affine = np.array(transform.grid.data.shape), transform.grid.affine
    rng = np.random.default_rng(0)
    near = apply_affine(affine, rng.uniform(-1.9, 1, (40, 3)))  # in the margin in which the deformation fades
    far = apply_affine(affine, shape + rng.uniform(60, 80, (40, 3)))
    np.testing.assert_allclose(transform.points(far), apply_affine(T, far), atol=1e-6)
    again = Transform.load(tmp_path / name, fixed=transform.grid)
    for points in (near, far):
        np.testing.assert_allclose(again.points(points), transform.points(points), atol=2e-3)
    if name.endswith("h5"):
        itk, points = sitk.ReadTransform(tmp_path / name), np.concatenate([near, far])
    else:
        itk = sitk.DisplacementFieldTransform(sitk.ReadImage(tmp_path / name, sitk.sitkVectorFloat64))
        points = near
    theirs = np.array([itk.TransformPoint(p) for p in (points * FLIP).tolist()]) * FLIP
    np.testing.assert_allclose(theirs, transform.points(points), atol=0.15)  # the weight is not linear in a cell


def test_beyond_the_grid_ants_agrees_about_our_composite(tmp_path):
    ants = pytest.importorskip("ants", reason="needs ANTsPy")
    pandas = pytest.importorskip("pandas")
    transform = made(tmp_path, "oblique", "flipped")
    transform.save(tmp_path / "a.h5")
    points = apply_affine(transform.grid.affine, np.array(transform.grid.data.shape) + np.random.default_rng(0).uniform(
        60, 80, (20, 3)))
    theirs = ants.apply_transforms_to_points(3, pandas.DataFrame(points * FLIP, columns=list("xyz")),
                                             [str(tmp_path / "a.h5")])
    np.testing.assert_allclose(theirs[list("xyz")].to_numpy() * FLIP, transform.points(points), atol=1e-3)


def test_an_inverse_that_no_file_holds_is_within_a_twentieth_of_a_voxel(transform, tmp_path):
    transform.save(tmp_path / "a.nii.gz")
    found = Transform.load(tmp_path / "a.nii.gz")
    inside = np.array(transform.other.data.shape)
    y = apply_affine(transform.other.affine, np.random.default_rng(0).integers(0, inside, (500, 3)))
    there = transform.points(found.inverse.exact(y))
    assert np.abs(there - y).max() < 0.05 * transform.other.spacing.min()


def test_an_inverse_is_exact_where_the_deformation_stretches_eightfold():
    x = np.moveaxis(np.indices((40, 30, 30)), 0, -1).astype(float)
    bump = np.exp(-np.square((x[..., 1:] - 14.5) / 6).sum(-1, keepdims=True))
    displacement = np.float32([1, 0.2, 0]) * 7 * np.tanh(x[..., :1] - 19.6) * bump
    field = faded(displacement.astype(np.float32), np.eye(4), np.eye(4))
    y = np.random.default_rng(0).uniform(5, 25, (20000, 3))
    found = field.inverse(y)
    assert np.abs(field(found) - y).max() < 0.01
    assert np.ptp(displacement[..., 0]) > 13 and np.gradient(displacement[..., 0], axis=0).max() > 4  # 7 between voxels


def test_the_majority_of_labels_is_that_of_itk(tmp_path):
    rng = np.random.default_rng(0)
    labels = nib.Nifti1Image(rng.integers(0, 5, (12, 13, 14)).astype(np.int16), np.diag([-1, -1, 1, 1]))
    nib.save(labels, tmp_path / "labels.nii")
    itk = to_itk(np.linalg.inv(np.diag([1.37, 0.83, 1.13, 1])))
    sitk.WriteTransform(itk, tmp_path / "a.tfm")
    grid = on_grid((10, 10, 10), np.diag([-1, -1, 1, 1]))
    nib.save(nib.Nifti1Image(np.zeros((10, 10, 10), np.int16), grid.affine), tmp_path / "grid.nii")
    ours = Transform.load(tmp_path / "a.tfm", fixed=load_grid(tmp_path / "grid.nii")).apply(
        tmp_path / "labels.nii", "label")
    theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(tmp_path / "labels.nii"), sitk.ReadImage(
        tmp_path / "grid.nii"), itk, sitk.sitkLabelLinear)).transpose(2, 1, 0)
    assert ours.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(ours.dataobj), theirs)


def test_cubic_interpolation_is_itks(tmp_path):
    transform = made(tmp_path, "isotropic", "oblique")
    transform.save(tmp_path / "a.nii.gz")
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(tmp_path / "a.nii.gz", sitk.sitkVectorFloat64))
    theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(transform.other.path), sitk.ReadImage(
        transform.grid.path), field, sitk.sitkBSpline)).transpose(2, 1, 0)
    ours = np.asarray(transform.apply(transform.other.path, "cubic").dataobj)
    middle = np.pad(np.ones([n - 12 for n in transform.other.data.shape], np.float32), 6)  # far from the border
    inside = np.asarray(transform.apply(nib.Nifti1Image(middle, transform.other.affine)).dataobj) == 1
    assert inside.sum() > 1000 and np.abs(theirs - ours)[inside].max() < 0.01 * np.ptp(ours)
