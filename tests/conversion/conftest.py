import pytest
import synthetic

from linmu_hf.commands.convert import main
from linmu_hf.conversion.convert import convert


@pytest.fixture(scope="session")
def processor():
    return synthetic.make_processor()


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that function and command refuse, with the message, and leave nothing behind."""

    def check(folder, message, flags=(), **options):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises((ValueError, OSError), match=message):
            convert(str(folder), str(tmp_path / "out"), **options)
        capsys.readouterr()
        try:
            assert main(["--teacher", str(folder), "--output_dir", str(tmp_path / "out"), *flags]) == 2
        except SystemExit as exit:  # argparse's own way
            assert exit.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("linmu-convert: error: ") and printed.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return printed

    return check
