"""The programs as a user meets them: help, and one sentence for whatever cannot be used."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import eval as eval_program
import register as register_program
import train as train_program
from drivenmorph_jax.cli import main, register
from drivenmorph_jax.cli.program import run as run_program
from drivenmorph_jax.errors import InputError, InputWarning

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (20, 24, 20)


def write(path, data, affine=None):
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return str(path)


def blob(seed=0, shape=SHAPE):
    x = np.moveaxis(np.indices(shape), 0, -1) - np.array(shape) / 2
    noise = np.random.default_rng(seed).random(shape)
    return (((x**2).sum(-1) < 64) * (500 + 500 * noise)).astype(np.float32)


def run(program, arguments, monkeypatch, capsys):
    """(exit status, what it said) of a program, in this process."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    status = 0
    try:
        program.run(program.main)
    except SystemExit as stop:
        status = stop.code or 0
    return status, capsys.readouterr().err


def refused(status, said, *words):
    assert status not in (0, None)
    assert "Traceback" not in said
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and len(said.strip().splitlines()) == 1
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("program", ["train", "eval", "register", "cohort", "template", "label", "apply"])
def test_help_explains_every_flag_and_shows_an_example(program, capsys):
    done = subprocess.run([sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"  python {program}.py --" in done.stdout
    options = " ".join(done.stdout.split("options:")[1].split())
    source = (ROOT / "drivenmorph_jax" / "cli" / f"{program}.py").read_text()
    flags = re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', source)
    assert flags and len(flags) == source.count("help=")
    for flag in flags:
        assert re.search(rf"{flag}( [A-Z:]+| [\[{{]\S+| \.\.\.\])* [a-zA-Z]", options), f"{flag} is not explained"
    with pytest.raises(SystemExit, match="0"):
        main.main([program, "--help"])
    installed = capsys.readouterr().out
    assert f"  drivenmorph {program} --" in installed and ".py --" not in installed


def test_help_of_prepare_names_every_layout(capsys):
    from drivenmorph_jax.data.prepare import LAYOUTS
    with pytest.raises(SystemExit, match="0"):
        main.main(["prepare", "--help"])
    said = capsys.readouterr().out
    assert "  drivenmorph prepare folder" in said
    assert not {name for name, (layout, _) in LAYOUTS.items() if f"  {name}: {layout.__doc__}" not in said}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["register", "--help"], ["train", "--help"]])
def test_help_does_not_wait_for_jax(arguments):
    code = (f"import sys\nfrom drivenmorph_jax.cli.main import main\ntry: main({arguments})\n"
            "finally: print('jax' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert arguments != ["--help"] or all(f"\n  {name}  " in done.stdout for name in main.COMMANDS)


def test_a_file_that_is_missing_is_refused_before_jax_is_imported(tmp_path):
    image = write(tmp_path / "image.nii", blob())
    code = "import sys\nfrom drivenmorph_jax.cli.main import main\nfrom drivenmorph_jax.errors import InputError\n"
    for flag in ("--moving", "--fixed_labels", "--moving_mask", "--extra_fixed", "--landmarks"):
        arguments = ["register", "--fixed", image, "--moving", image, "--out", str(tmp_path), flag, "nowhere.csv"]
        code += f"try: main({arguments})\nexcept InputError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", code + "print('jax' in sys.modules)"], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    said = done.stdout.splitlines()
    assert len(said) == 6 and said[-1] == "False", done
    assert all("nowhere.csv" in line for line in said[:-1])


@pytest.mark.parametrize(("arguments", "said"), [
    (["registr"], "did you mean register?"),
    (["fly"], "register, cohort, template, label, apply, strip, view, correct, train, eval, prepare")])
def test_an_unknown_command_is_refused(arguments, said):
    with pytest.raises(InputError, match=re.escape(said)):
        main.main(arguments)


@pytest.mark.parametrize("module", [["drivenmorph_jax.cli.main", "prepare"], ["drivenmorph_jax.data.prepare"]])
def test_prepare_has_two_spellings(module, tmp_path):
    done = subprocess.run([sys.executable, "-m", *module, "folder", "nowhere", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    refused(done.returncode, done.stderr, "nowhere", "not a folder")


def test_numbers_that_do_not_exist_are_told_as_none():
    numbers = {"similarity_before": 0.2, "similarity_after": 0.5, "fold_pct": 0.0}
    assert list(register.described(numbers)) == ["similarity 0.2000 before, 0.5000 after", "folding 0.0000 %"]
    lines = list(register.described(numbers | {"dice_before": None, "dice_after": None, "similarity_after": None}))
    assert lines[:2] == ["similarity 0.2000 before, none after", "dice none before, none after"]
    assert lines[2].startswith("warning: ") and len(lines) == 4


def bad_images(folder):
    """(name, path, words of the sentence) of every kind of image that cannot be registered."""
    data = blob()
    nan, infinite = data.copy(), data.copy()
    nan[10, 10, 10], infinite[10, 10, 10] = np.nan, np.inf
    (folder / "text.nii.gz").write_text("hello")
    whole = Path(write(folder / "whole.nii.gz", data)).read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[:len(whole) // 2])
    plain = write(folder / "singular.nii", data)
    header = bytearray(Path(plain).read_bytes())
    header[252:256] = np.array([0, 1], "<i2").tobytes()  # qform_code 0, sform_code 1
    header[280:296] = bytes(16)  # srow_x
    Path(plain).write_bytes(header)
    return {
        "missing": (folder / "nowhere.nii.gz", "does not exist"),
        "folder": (folder, "is a folder"),
        "not an image": (folder / "text.nii.gz", "cannot be read"),
        "cut short": (folder / "cut.nii.gz", "cannot be read"),
        "2-D": (write(folder / "flat.nii.gz", data[..., 10]), "3-D"),
        "4-D": (write(folder / "series.nii.gz", np.stack([data, data], -1)), "3-D"),
        "empty": (write(folder / "zeros.nii.gz", 0 * data), "same value"),
        "constant": (write(folder / "constant.nii.gz", 0 * data + 3), "same value"),
        "NaN": (write(folder / "nan.nii.gz", nan), "NaN"),
        "infinite": (write(folder / "infinite.nii.gz", infinite), "infinite"),
        "singular affine": (plain, "affine"),
    }


KINDS = ["missing", "folder", "not an image", "cut short", "2-D", "4-D", "empty", "constant", "NaN", "infinite",
         "singular affine"]


@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("kind", KINDS)
def test_register_refuses_a_bad_image(kind, side, tmp_path, monkeypatch, capsys):
    bad, word = bad_images(tmp_path)[kind]
    good = write(tmp_path / "good.nii.gz", blob(1))
    pair = {"fixed": good, "moving": good, side: bad}
    out = tmp_path / "out"
    status, said = run(register_program, ["--fixed", pair["fixed"], "--moving", pair["moving"], "--out", out,
                                          "--method", "demons"], monkeypatch, capsys)
    refused(status, said, str(bad), word)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(("flags", "words"), [
    (["--method", "demons", "--moving_labels", "other.nii.gz"], ("other.nii.gz", "grid")),
    (["--method", "demons", "--fixed_labels", "image.nii.gz"], ("image.nii.gz", "whole numbers")),
    (["--checkpoint", "nothing"], ("nothing", "does not exist")),
    (["--checkpoint", "."], ("checkpoint",)),
    (["--checkpoint", ".", "--method", "demons"], ("--checkpoint is for the network", "--method is demons")),
    (["--bids", "sub-01", "T1w", "T1w"], ("names both spaces T1w",)),
])
def test_register_refuses_what_does_not_belong(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = write("a.nii.gz", blob(0)), write("b.nii.gz", blob(1))
    write("other.nii.gz", np.ones((8, 8, 8), np.int16)), write("image.nii.gz", blob(2))
    status, said = run(register_program, ["--fixed", a, "--moving", b, "--out", "out", *flags], monkeypatch, capsys)
    refused(status, said, *words)
    assert not Path("out").exists() or not list(Path("out").iterdir())


@pytest.mark.parametrize(("value", "said"), [(-0.1, "is -0.1, not at least 0: gain"), (2, "is 2, not at most 1: gain"),
                                             (None, "is none, not 0 to 1: gain")])
def test_a_check_tells_which_limit_is_broken(value, said):
    assert register.told({"value": value, "limits": [0, 1], "sentence": "gain"}) == said


@pytest.mark.parametrize("flags", [["--affine", "rigid"], ["--affine", "none"], ["--no-affine"]])
def test_an_affine_and_a_transform_to_start_from_exclude_each_other(flags, tmp_path, monkeypatch, capsys):
    status, said = run(register_program, ["--fixed", "a.nii", "--moving", "b.nii", "--out", tmp_path / "out",
                                          "--initial_transform", "c.tfm", *flags], monkeypatch, capsys)
    assert status == 2 and "--affine and --initial_transform exclude each other" in said


@pytest.mark.parametrize("flags", [["--affine", "none"], ["--no-affine"]])
def test_register_refuses_images_that_do_not_overlap(flags, tmp_path, monkeypatch, capsys):
    far = np.diag([2.0, 2, 2, 1])
    far[:3, 3] = 5000
    a, b = write(tmp_path / "a.nii.gz", blob(0)), write(tmp_path / "b.nii.gz", blob(1), far)
    status, said = run(register_program, ["--fixed", a, "--moving", b, "--out", tmp_path / "out", "--method", "demons",
                                          *flags], monkeypatch, capsys)
    refused(status, said, b, "overlap", "--affine none")


def test_an_output_folder_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a.nii.gz", blob(0)), write(tmp_path / "b.nii.gz", blob(1))
    (tmp_path / "out").write_text("")
    for program, arguments in (
            (register_program, ["--fixed", a, "--moving", b, "--method", "demons", "--out", tmp_path / "out"]),
            (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", tmp_path / "out"])):
        refused(*run(program, arguments, monkeypatch, capsys), "out", "folder")


@pytest.mark.parametrize(("program", "arguments", "words"), [
    (train_program, ["--config", "configs/none.py", "--workdir", "w"], ("configs/none.py", "does not exist")),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.step=3"],
     ("--config.step", "did you mean --config.steps")),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.data.name=moon"],
     ("moon", "embedded")),
    (train_program, ["--config", ROOT / "configs/malf.py", "--workdir", "w", "--config.data.root=none"],
     ("none", "data.root")),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.model.channels=(4,)"],
     ("model.channels", "model.strides")),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.model.heads=3"],
     ("model.heads",)),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.model.update_rule=sum"],
     ("sum", "compositional")),
    (train_program, ["--config", ROOT / "configs/smoke.py", "--workdir", "w", "--config.loss.similarity=mi"],
     ("mi", "lncc")),
    (eval_program, ["--checkpoint", "none", "--out", "o"], ("none", "does not exist")),
    (eval_program, ["--checkpoint", ".", "--out", "o"], ("checkpoint",)),
])
def test_bad_settings_and_checkpoints(program, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(*run(program, arguments, monkeypatch, capsys), *words)
    assert not list(tmp_path.rglob("*.json*"))


@pytest.mark.parametrize(("flag", "word"), [("--config.model.channels=(4, 16)", "model"),
                                            ("--config.nothing=1", "not a setting")])
def test_eval_refuses_settings_and_models_that_do_not_fit(flag, word, smoke, tmp_path):
    # A process of its own: what libraries say when it ends counts too.
    flags = ["--checkpoint", str(smoke[0]), "--out", str(tmp_path / "o"), flag]
    done = subprocess.run([sys.executable, "eval.py", *flags], cwd=ROOT, capture_output=True, text=True)
    refused(done.returncode, done.stderr, word)
    assert not (tmp_path / "o").exists()


def test_warnings_of_others_are_told_and_end_nothing(capsys):
    def main():
        warnings.warn("this image is small", InputWarning, stacklevel=1)
        warnings.warn("divide by zero", RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_program(main)
    said = capsys.readouterr().err
    assert said.startswith("warning: this image is small\n")
    assert re.search(r"test_programs\.py:\d+: RuntimeWarning: divide by zero", said)


def test_a_program_ends_so_from_the_shell_too(tmp_path):
    done = subprocess.run([sys.executable, "register.py", "--fixed", "no.nii", "--moving", "no.nii", "--out",
                           str(tmp_path / "out"), "--method", "demons"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ)
    assert done.returncode == 2 and done.stderr == "error: no.nii does not exist; check the path\n"
    assert not (tmp_path / "out").exists()
