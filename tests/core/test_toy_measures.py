"""The toy's measures on cases whose answer is known."""

import pytest
import torch
from turbodiffusion_pack.turbo_core.training.batches import Batch
from turbodiffusion_pack.turbo_core.training.toy import evaluate, measures, reader, world
from turbodiffusion_pack.turbo_core.training.toy.vae import frames_of, pictures

FRAMES, PIXELS = 5, 48


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


def test_energy_distance_to_uniform():
    apart = [measures.energy_distance(uniform(400, seed)) for seed in range(8)]
    assert max(map(abs, apart)) < 0.005
    half = uniform(400) * torch.tensor([0.5, 1.0])
    assert measures.energy_distance(half) > 0.05
    # All in one corner c: 2 E|c - U| - E|U - U'|, and E|c - U| = (sqrt 2 + asinh 1) / 3.
    corner = 2 * (2**0.5 + 0.881373587) / 3 - measures.UNIFORM_DISTANCE
    assert measures.energy_distance(torch.zeros(50, 2)) == pytest.approx(corner, abs=1e-3)


def test_spread_of_two_videos_of_one_prompt():
    sure = torch.ones(4000, dtype=torch.bool)
    assert measures.spread(uniform(4000), sure) == pytest.approx(1, abs=0.03)
    twice = uniform(2000).repeat_interleave(2, dim=0)
    assert measures.spread(twice, sure) == 0
    half = torch.arange(4000) % 4 < 2  # of which the unsure pairs are alike
    mixed = torch.where(half[:, None], uniform(4000), twice)
    assert measures.spread(mixed, half) == pytest.approx(1, abs=0.05)


def test_sliced_distance_of_a_shift():
    """Along a direction w of length 1 a shift by a moves all by |a . w|."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    assert measures.sliced_distance(x, x.flip(0)) < 1e-6
    shift = torch.zeros(8)
    shift[0] = 3.0
    mean = 3 * 0.2910  # E|w_1| on the sphere in 8 dimensions: gamma(4) / (sqrt(pi) gamma(4.5))
    assert measures.sliced_distance(x, x + shift) == pytest.approx(mean, rel=0.1)
    assert measures.sliced_distance(x, x + shift, directions=1) <= shift.norm()


def test_velocity_errors_are_relative():
    latents, noise = torch.ones(2, 3), torch.zeros(2, 3)
    errors = measures.velocity_errors(lambda x, s: 1.1 * x, lambda x, s: x, latents, noise)
    assert list(errors) == list(measures.LEVELS)
    assert list(errors.values()) == pytest.approx([0.1] * len(errors))


def clips(prompts: int) -> world.Clips:
    """Each prompt twice in a row."""
    first, second = world.draw(0, 0, prompts), world.draw(0, 99, prompts)
    pairs = zip(first, first._replace(start=second.start), strict=True)
    return world.Clips(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))


def test_shares_count_what_is_right():
    seen = clips(4)
    reading = reader.read(world.render(seen, FRAMES, PIXELS))
    assert set(measures.shares_right(reading, seen, FRAMES).values()) == {1.0}
    wrong = seen._replace(colour=(seen.colour + (torch.arange(8) == 3)) % 7)
    shares = measures.shares_right(reading, wrong, FRAMES)
    assert shares["colour"] == shares["all"] == 7 / 8 and shares["shape"] == 1
    still = seen._replace(motion=torch.full((8,), world.STILL), speed=seen.speed * 0)
    still = still._replace(motion=torch.where(torch.arange(8) < 2, 0, still.motion))
    shares = measures.shares_right(reader.read(world.render(still, FRAMES, PIXELS)), still, FRAMES)
    assert shares["speed"] == 1


def test_a_start_in_another_region_is_wrong():
    """A place that lies in two regions is right for both."""
    seen = clips(8)
    reading = reader.read(world.render(seen, FRAMES, PIXELS))
    assert measures.in_region(reading, seen, FRAMES).all()
    away = seen._replace(start=(seen.start + torch.tensor([1 / 3, 0])) % 1)
    where, _ = measures.starts(reading, seen, FRAMES)
    touches = (where - world.corner_of_region(away.start) - 1 / 6).abs()
    _, count = world.places(seen, FRAMES)
    two = (touches <= 1 / 6 + 0.5 / count).all(-1)
    assert torch.equal(measures.in_region(reading, away, FRAMES), two) and not two.all()
    assert measures.shares_right(reading, away, FRAMES)["region"] < 0.5
    unread = reading._replace(motion=torch.full_like(reading.motion, -1))
    assert not measures.in_region(unread, seen, FRAMES).any()


def test_starts_are_places_in_the_room():
    seen = clips(8)
    where, sure = measures.starts(reader.read(world.render(seen, FRAMES, PIXELS)), seen, FRAMES)
    _, count = world.places(seen, FRAMES)
    assert sure.all() and torch.equal((where * count).floor(), (seen.start * count).floor())
    assert ((where * count) % 1 - 0.5).abs().max() < 0.2  # of a place's width
    centre, _ = world.track(seen, FRAMES)
    assert torch.equal((centre[:, 0] * world.PLACES) % 1, torch.zeros(len(centre), 2))
    low, high = world.room(seen, FRAMES)
    assert (centre[:, 0] >= low).all() and (centre[:, 0] <= high).all() and (count >= 3).all()


@pytest.fixture
def examination():
    """Latents that are videos; the teacher makes what is asked for, at a start of its own."""
    seen = clips(4)
    videos = pictures(world.render(seen, FRAMES, PIXELS))
    batch = Batch(videos, torch.zeros(8, 16, 64))
    return evaluate.Examination(seen, batch, frames_of, FRAMES, at_once=3, seed=0, shown=2)


def test_an_examination_measures_against_the_teacher(examination):
    seen = examination.batch.latents

    def teacher(batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        return batch.latents + 0.05 * noise

    examination.set_teacher(teacher)
    right = examination.add("right", examination.teacher).measures
    assert right["all"] == 1 and right["latent_mse"] == 0 and right["psnr"] > 90
    assert abs(right["distance"]) < 1e-6  # the floor is the teacher's own
    clean = examination.add("clean", seen).measures
    assert clean["latent_mse"] == pytest.approx(0.05**2, rel=0.05)
    wrong = examination.add("of the next prompt", seen.roll(2, 0)).measures
    assert wrong["all"] == 0 and wrong["psnr"] < 30
    brighter = examination.add("brighter", seen + 0.5).measures
    assert brighter["distance"] > 0.002 > right["distance"]


def test_the_table_and_the_pictures_have_all_rows(examination):
    examination.set_teacher(lambda batch, noise: batch.latents + 0.05 * noise)
    for name in ("a", "b", "c"):
        examination.add(name, examination.teacher)
    shown = evaluate.pictures(examination.rows, examination.prompts())
    assert shown.shape == (2 * 4, FRAMES, PIXELS // 2 + evaluate.CAPTION, PIXELS // 2, 3)
    assert len(set(map(str, shown[:4, 0, : evaluate.CAPTION].tolist()))) == 4  # each its caption
    assert torch.equal(shown[1, :, evaluate.CAPTION :], shown[2, :, evaluate.CAPTION :])
    assert not torch.equal(shown[0], shown[4])  # each row its prompt
    assert all((prompt == prompt[0]).all() and prompt.min() < 128 for prompt in shown[::4])
    assert examination.prompts() == world.prompts(clips(4).some(slice(0, 4, 2)))
    table = evaluate.markdown(examination.rows).splitlines()
    assert len(table) == 5 and table[2].startswith("| a | 100.0 | 100.0 |")
    assert all(line.count("|") == table[0].count("|") for line in table)
    rows = evaluate.as_csv(examination.rows).splitlines()
    assert (
        len(rows) == 4 and rows[0].startswith("name,colour,shape") and rows[1].startswith("a,1.0")
    )
