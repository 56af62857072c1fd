"""Where tiles come from, and how they are tuned; times are made up, as no GPU is needed to choose."""

import json

import pytest
import torch

from growkern.backend import has_triton
from growkern.ops.moments import gpu, tiles
from growkern.ops.moments.schedule import Tiles

GPU = ("Some GPU", "capability 9")
MINE = Tiles(64, 32, 16, 4, 2, 4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (tiles._tuned, tiles.choose):
        cached.cache_clear()
    yield
    for cached in (tiles._tuned, tiles.choose):
        cached.cache_clear()


def entry(width, operands="ieee", kinds=("map",), chosen=MINE):
    return {"kinds": list(kinds), "operands": operands, "width": width, "tiles": chosen._asdict()}


@pytest.mark.parametrize("kind", ["map", "matrix"])
@pytest.mark.parametrize("operands", ["ieee", "tf32", "half"])
@pytest.mark.parametrize("where", ["capability 8", "capability 9", "capability 10", "capability 12", "hip"])
def test_there_are_tiles_for_every_gpu(kind, operands, where):
    for width in (1, 3, 16, 48, 1000):
        chosen = tiles.choose(("unheard of", where), kind, operands, width)
        assert chosen.block_k >= 16
        assert max(chosen.block_m, chosen.block_n) <= max(16, 2 * width)


def test_what_was_tuned_goes_first_and_the_nearest_width_is_taken():
    shipped = tiles.choose(GPU, "map", "ieee", 64)
    wide = MINE._replace(block_m=128)
    tiles.write_tuned(GPU[0], [entry(32), entry(256, chosen=wide)])
    assert tiles.choose(GPU, "map", "ieee", 64) == MINE
    assert tiles.choose(GPU, "map", "ieee", 128) == wide
    assert tiles.choose(GPU, "matrix", "ieee", 64) == shipped
    assert tiles.choose(("Another", GPU[1]), "map", "ieee", 64) == shipped


def test_what_was_tuned_for_other_widths_does_not_count():
    shipped = tiles.choose(GPU, "map", "ieee", 16)
    tiles.write_tuned(GPU[0], [entry(512)])
    assert tiles.choose(GPU, "map", "ieee", 16) == shipped
    tiles.write_tuned(GPU[0], [entry(16)])
    assert tiles.choose(GPU, "map", "ieee", 16) == tiles.choose(GPU, "map", "ieee", 512) == MINE


def test_gpus_share_the_file():
    tiles.write_tuned("One", [entry(32)])
    tiles.write_tuned("Other", [entry(64)])
    assert set(json.loads(tiles.tuned_path().read_text())) == {"One", "Other"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Some GPU": [{"tiles": {}}]}', '{"Some GPU": [{"tiles": {"block_m": 1}}]}']
)
def test_a_damaged_file_is_ignored_with_a_word(text, caplog):
    shipped = tiles.choose(GPU, "map", "ieee", 64)
    tiles._tuned.cache_clear()
    tiles.choose.cache_clear()
    tiles.tuned_path().parent.mkdir()
    tiles.tuned_path().write_text(text)
    assert tiles.choose(GPU, "map", "ieee", 64) == shipped
    assert "growkern tune" in caplog.text


def test_tuning_takes_what_is_fastest_and_right(monkeypatch):
    """The made-up time falls with 128 × 64 tiles, 8 warps and 2 stages; what does not compile is passed by."""
    from growkern.ops.moments import tune

    def time(candidate, tensors, right, precision, most):
        if candidate.stages == 4:
            raise ArithmeticError
        wanted = candidate.block_m == 128, candidate.block_n == 64, candidate.warps == 8, candidate.stages == 2
        return 10.0 - sum(wanted)

    monkeypatch.setattr(tune, "_milliseconds", time)
    found = list(tune.tune(torch.device("cpu"), (64,)))
    assert [(e["kinds"], e["operands"]) for e in found] == [
        ([kind], operands) for kind in ("map", "matrix") for operands in ("ieee", "tf32", "half")
    ]
    for each in found:
        chosen = Tiles(**each["tiles"])
        assert (chosen.block_m, chosen.block_n, chosen.warps, chosen.stages) == (128, 64, 8, 2)
        assert each["ms"] == 6 < each["before"]


@pytest.mark.parametrize("kind", ["map", "matrix"])
def test_tuning_refuses_to_time_a_wrong_sum(kind, monkeypatch):
    from growkern.ops.moments import tune

    tensors, right = tune._problem(kind, torch.float32, 4, torch.device("cpu"))
    moments = f"{'linear' if kind == 'matrix' else 'conv2d'}_moments"
    monkeypatch.setattr(gpu, moments, lambda *arguments: [sums * 1.001 for sums in right])
    with pytest.raises(ArithmeticError, match="wrong"):
        tune._milliseconds(MINE, tensors, right, "ieee", 2e-6)


@pytest.mark.skipif(has_triton(), reason="tunes here")
def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    from growkern.training import cli

    monkeypatch.setattr("sys.argv", ["growkern", "tune"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "expected a GPU" in capsys.readouterr().err


def test_the_command_keeps_what_it_found_before_it_was_stopped(monkeypatch, capsys):
    from growkern import backend
    from growkern.ops.moments import tune
    from growkern.training import cli

    def found(device, widths):
        assert widths == (64, 256)
        yield entry(64) | {"ms": 1.5, "before": 2.25}
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(tiles, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(tune, "tune", found)
    monkeypatch.setattr("sys.argv", ["growkern", "tune", "--widths", "64,256"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert "64 channels: 1.500 ms, 2.250 before; 64×32×16, 4 warps" in capsys.readouterr().out
    assert tiles.choose(GPU, "map", "ieee", 64) == MINE
