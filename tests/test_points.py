"""Tables of points, as people and programs write them: moved exactly, or refused in one sentence."""

import numpy as np
import pytest
from nibabel.affines import from_matvec

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.volume import on_grid
from drivenmorph_jax.transforms.points import move_table
from drivenmorph_jax.transforms.transform import Transform

SHIFT = np.array([1.5, -2, 4])
SLICER = """# Markups fiducial file version = {version}
# CoordinateSystem = {frame}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
"""


@pytest.fixture
def moved(tmp_path):
    """The text of a table after a shift by (1.5, -2, 4) mm, RAS."""
    displacement = np.broadcast_to(SHIFT.astype(np.float32), (5, 5, 5, 3))
    transform = Transform(displacement, on_grid((5, 5, 5), np.eye(4)), from_matvec(np.eye(3), SHIFT))

    def move(content):
        source, out = tmp_path / "points.csv", tmp_path / "moved.csv"
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        out.unlink(missing_ok=True)
        move_table(source, out, transform.points)
        found = out.read_bytes()
        return found if isinstance(content, bytes) else found.decode()
    return move


@pytest.mark.parametrize("given, expected", [
    ("x,y,z\n10,-20,30\n0,0,0,\n", "x,y,z\n11.5,-22.0,34.0\n1.5,-2.0,4.0,\n"),
    ("x,y,z\n10,-20,30,\n0,0,0,\n", "x,y,z\n11.5,-22.0,34.0,\n1.5,-2.0,4.0,\n"),
    ("x,y,z,\n10,-20,30,\n", "x,y,z,\n11.5,-22.0,34.0,\n"),
    ("name,x,y,z,note\na,1,2,3\n", "name,x,y,z,note\na,2.5,0.0,7.0\n"),
    ("x, y , z, name\n 1,\t2 , 3, left one\n", "x, y , z, name\n 2.5,\t0.0 , 7.0, left one\n"),
    ("Name,X,Y,Z\na,1,2,3\n", "Name,X,Y,Z\na,2.5,0.0,7.0\n"),
    ("X,x,y,z\n9,1,2,3\n", "X,x,y,z\n9,2.5,0.0,7.0\n"),
    ("z,n,y,x\n3,a,2,1\n", "z,n,y,x\n7.0,a,0.0,2.5\n"),
    ('"x","y","z","name"\n"1","2",3,"b, left"\n', '"x","y","z","name"\n"2.5","0.0",7.0,"b, left"\n'),
    ('x,y,z,name\n1,2,3, "b, ""left"""\n', 'x,y,z,name\n2.5,0.0,7.0, "b, ""left"""\n'),
    ('x,y,z,note\n1,2,3,"two\nlines"\n4,5,6,5" deep\n', 'x,y,z,note\n2.5,0.0,7.0,"two\nlines"\n5.5,3.0,10.0,5" deep\n'),
    ("x,y,z\r\n1,2,3\r\n", "x,y,z\r\n2.5,0.0,7.0\r\n"),
    ("x,y,z\n\n1,2,3\n,,\n\n4,5,6", "x,y,z\n\n2.5,0.0,7.0\n,,\n\n5.5,3.0,10.0"),
    ("#,x,y,z\n1,1,2,3\n", "#,x,y,z\n1,2.5,0.0,7.0\n"),
    ("x,y,z\n1e1,+2,.5\n", "x,y,z\n11.5,0.0,4.5\n")])
def test_values_are_replaced_and_all_else_stays(moved, given, expected):
    assert moved(given) == expected


def test_nothing_is_lost_in_rounding(moved):
    x = [1234.567890123, -0.1, 1 / 3]
    found = moved(f"x,y,z\n{x[0]!r},{x[1]!r},{x[2]!r}\n").splitlines()[1]
    assert [float(value) for value in found.split(",")] == [a + b for a, b in zip(x, SHIFT.tolist(), strict=True)]


def test_other_bytes_stay_and_a_byte_order_mark_is_read(moved):
    assert moved("x,y,z,name\n1,2,3,Vorderh\u00f6rner\n".encode("latin-1")).endswith(b",Vorderh\xf6rner\n")
    assert moved(b"\xef\xbb\xbfx,y,z\n1,2,3\n") == b"x,y,z\n2.5,0.0,7.0\n"


@pytest.mark.parametrize("frame, version, expected", [
    ("LPS", "5.2", "8.5,-18.0,34.0"), ("1", "4.10", "8.5,-18.0,34.0"),
    ("RAS", "4.11", "11.5,-22.0,34.0"), ("0", "4.4", "11.5,-22.0,34.0")])
@pytest.mark.parametrize("rest", [",0,0,0,1,1,1,0,F-1,,", ',0,0,0,1,1,1,0,"F, 1",,,2,0'])  # Slicer 5 adds two values
def test_a_file_of_slicer_stays_in_its_frame(moved, frame, version, expected, rest):
    header = SLICER.format(frame=frame, version=version)
    assert moved(f"{header}1,10,-20,30{rest}\n") == f"{header}1,{expected}{rest}\n"


def test_a_file_of_slicer_that_a_spreadsheet_has_saved(moved):
    header = SLICER.format(frame="LPS,,,", version="4.11,,,").replace("# columns", "# Columns").replace("\n", "\r\n")
    assert moved(header + "1,10,-20,30,0\r\n") == header + "1,8.5,-18.0,34.0,0\r\n"


@pytest.mark.parametrize("header", [SLICER.format(frame="IJK", version="5.2"), SLICER.format(frame="2", version="4.4"),
                                    "# columns = id,x,y,z\n"])
def test_a_file_of_slicer_without_a_frame_is_refused(moved, header):
    with pytest.raises(InputError, match=r"points.csv does not say whether its points are in RAS or LPS; add the line"):
        moved(header + "1,10,-20,30\n")


@pytest.mark.parametrize("text, words", [
    ("x,y,z,name\n1,2,3,a\n4,5,6,b, left\n", "more values than columns in line 3; put .* in quotes"),
    ("name,x,y,z\nb, left,1,2,3\n", "line 2; put .* in quotes"),
    ("id,name,x,y,z,\n1,b, 5,1,2,3\n", "line 2; put .* in quotes"),
    ('x,y,z,note\n1,2,3,"two\nlines"\n4,5,6,b,c\n', "line 4; put"),
    ("x,y,z\n1,2,3\n4,5\n", "no finite numbers x, y, z in line 3"),
    ("x,y,z\n1,2,three\n", "line 2"), ("x,y,z\n1,,3\n", "line 2"), ("x,y,z\n1,2,nan\n", "line 2"),
    ("x,y,z\n1,2,inf\n", "line 2"), ("x,y,z\n1,2,1e308\n", "line 2"), ('x,y,z\n"1,5","2,5","3,5"\n', "line 2"),
    (SLICER.format(frame="RAS", version="5.2") + "1,10\n", "line 4"),
    ("x,y,z\n", "holds no points"), (SLICER.format(frame="RAS", version="5.2"), "holds no points"),
    ("", "not a table of points"), ("1,2,3\n4,5,6\n", "not a table"), ("x;y;z\n1;2;3\n", "not a table"),
    ("x,x,y,z\n1,2,3,4\n", "not a table"), ("r,a,s\n1,2,3\n", "not a table"),
    ("A text, or two,\nof \"words\", and more, and more.\n", "not a table"),
    ("x,y,z\n1,2,3\n".encode("utf-16"), "not a table"), (bytes(1000), "not a table"),
    (bytes(range(256)) * 40, "not a table"), (b"\x1f\x8b\x08\x00x,y,z\n", "not a table")])
def test_what_is_no_table_of_points_is_refused_in_one_sentence(moved, text, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        moved(text)
    assert str(tmp_path / "points.csv") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "moved.csv").exists()


def test_any_bytes_are_moved_or_refused(moved):
    pieces = [b",", b'"', b"\n", b"\r\n", b"x", b"y", b"z", b"x,y,z\n", b"1,2,3", b"-2.5", b" ", b"\t", b"# ", b" = ",
              b"columns", b"CoordinateSystem", b"LPS", b"\0", b"\xff", b"\xef\xbb\xbf", b"1e999", b"\r"]
    whole = (b'x,y,z,name\n1,2,3,a\n4,5,6,"b, c"\n', SLICER.format(frame="LPS", version="5").encode() + b"1,1,2,3\n")
    rng, counts = np.random.default_rng(0), {"moved": 0, "refused": 0}
    for k in range(500):
        data = bytearray(whole[k % 2] if k % 3 else b"".join(pieces[i] for i in rng.integers(0, len(pieces), 30)))
        for _ in range(rng.integers(1, 3)):
            place = rng.integers(len(data) + 1)
            data[place:place + rng.integers(3)] = pieces[rng.integers(len(pieces))]
        try:
            moved(bytes(data))
            counts["moved"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
    assert min(counts.values()) > 50, counts
