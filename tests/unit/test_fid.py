"""Frechet distances: the formula, the features with their names, and MJHQ's layout with what is missing from it."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.fid import ColorAndEdges, Inception, feature_extractor, features, frechet_distance


def sample(seed: int, count: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


def test_the_distance_of_gaussians_in_one_dimension():
    a, b = sample(0, 50, 1), sample(1, 70, 1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_shift_adds_its_square_and_nothing_else():
    a = sample(0, 40, 6)
    shift = np.arange(6.0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.cov(a, rowvar=False).trace())


def test_covariances_need_not_have_full_rank():
    # Fewer images than features, as in every small trial: against the eigenvalues of the plain product.
    a, b = sample(0, 8, 30), sample(1, 9, 30)
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + c.trace() + d.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_the_formula_is_that_of_torchmetrics():
    a, b = sample(0, 400, 64), sample(1, 300, 64)
    library = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(64, 1, 1)).set_dtype(torch.float64)
    library.update(torch.from_numpy(a)[..., None, None], real=True)
    library.update(torch.from_numpy(b)[..., None, None], real=False)
    assert frechet_distance(a, b) == pytest.approx(float(library.compute()), rel=1e-6)


def test_one_image_is_not_a_distribution():
    with pytest.raises(UserError, match="two images or more"):
        frechet_distance(sample(0, 1, 3), sample(1, 5, 3))


def picture(seed: int, size=(32, 32)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(size)


def save_all(folder, count, change=lambda image: image, sizes=((32, 32),)):
    folder.mkdir(parents=True)
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        change(picture(i, sizes[i % len(sizes)])).save(file)
    return files


def test_built_in_features_grow_apart_with_the_images_and_say_what_they_are(tmp_path):
    built_in = feature_extractor(None)
    assert "not Inception" in built_in.name
    originals = features(save_all(tmp_path / "a", 40), built_in)
    assert originals.rows.shape == (40, 80)
    darker = [
        frechet_distance(originals.rows, features(save_all(tmp_path / f"{share}", 40, darken(share)), built_in).rows)
        for share in (1.0, 0.9, 0.6)
    ]
    assert darker[0] == pytest.approx(0, abs=1e-9) and darker[0] < darker[1] < darker[2]


def darken(share: float):
    return lambda image: image.point(lambda value: value * share)


def test_images_of_several_sizes_and_unreadable_ones(tmp_path):
    files = save_all(tmp_path / "a", 70, sizes=[(32, 32)] * 40 + [(48, 24)] * 5)
    files[3].write_bytes(files[3].read_bytes()[:60])
    extracted = features([*files, tmp_path / "absent.png"], ColorAndEdges())
    assert extracted.unreadable == [files[3], tmp_path / "absent.png"]
    assert extracted.files == [f for f in files if f != files[3]] and len(extracted.rows) == 69
    # One at a time or in batches, a file has the same features.
    alone = features([files[41]], ColorAndEdges()).rows[0]
    assert np.allclose(extracted.rows[extracted.files.index(files[41])], alone)


def test_absent_weights_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="absent.pth: no such file.*not downloaded") as caught:
        feature_extractor(tmp_path / "absent.pth")
    assert "\n" not in str(caught.value)


class FeatureExtractor(torch.nn.Module):
    """A small network with the interface of Inception's file."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = torch.nn.Linear(3, width)

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        result = self.layer(images.float().mean((2, 3)))
        return result if return_features else result.softmax(1)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_network_is_loaded_from_its_file_and_named_with_its_fingerprint(tmp_path):
    file = tmp_path / "inception-2015-12-05.pt"
    small = FeatureExtractor(2048)
    torch.jit.script(small).save(file)
    inception = feature_extractor(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert inception.name == f"Inception-v3, 2048 features ({file.name}, SHA-256 {digest[:16]})"
    extracted = features(save_all(tmp_path / "a", 3), inception)
    mean = torch.from_numpy(np.asarray(picture(0), dtype=np.float32)).mean((0, 1))
    assert np.allclose(extracted.rows[0], small.layer(mean).detach().numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_files_with_something_else_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    for name in ("text.pt", "weights.pth"):
        with pytest.raises(UserError, match=f"{name}: not a TorchScript file") as caught:
            Inception(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "identity.pt")
    with pytest.raises(UserError, match="identity.pt: does not give features"):
        Inception(tmp_path / "identity.pt")
    torch.jit.script(FeatureExtractor(5)).save(tmp_path / "small.pt")
    with pytest.raises(UserError, match="small.pt: does not give 2048 features"):
        Inception(tmp_path / "small.pt")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.fixture
def release(tmp_path):
    """MJHQ's layout with two categories of six images."""
    folder = tmp_path / "release"
    entries = {}
    for number in range(12):
        category = ("animals", "food")[number % 2]
        entries[f"{number:04x}"] = {"category": category, "prompt": f"picture {number}"}
        (folder / category).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / category / f"{number:04x}.jpg")
    (folder / "meta_data.json").write_text(json.dumps(entries))
    return folder


def scored(prompts, reference, generated):
    """Distances by category, and the side of the generated images."""
    sides = [mjhq.collect(prompts, folder, ColorAndEdges()) for folder in (reference, generated)]
    assert not sides[0].missing and not sides[0].unreadable
    return mjhq.distances(*sides), sides[1]


def test_the_reference_images_themselves_are_at_distance_zero(release):
    prompts = mjhq.read(release)
    assert [p.prompt for p in prompts] == [f"picture {n}" for n in range(12)]
    distances, side = scored(prompts, release, release)
    assert side.extractor == ColorAndEdges.name
    assert distances[None]["fid"] == pytest.approx(0, abs=1e-9)
    assert distances[None]["images"] == {"reference": 12, "generated": 12}
    assert set(distances) == {None, "animals", "food"}
    assert distances["food"]["images"] == {"reference": 6, "generated": 6}


def test_categories_are_apart_and_what_is_missing_or_unreadable_is_named(release, tmp_path):
    prompts = mjhq.read(release)
    generated = tmp_path / "generated"
    generated.mkdir()
    for number, prompt in enumerate(prompts):
        # Food is generated badly, animals as they are; one image is missing and one is cut off.
        image = picture(number) if prompt.category == "animals" else picture(100)
        if number != 4:
            image.save(generated / f"{prompt.id}.png")
    broken = generated / f"{prompts[6].id}.png"
    broken.write_bytes(broken.read_bytes()[:50])
    distances, side = scored(prompts, release, generated)
    assert side.missing == [prompts[4].id] and side.unreadable == [prompts[6].id]
    assert distances[None]["images"] == {"reference": 12, "generated": 10}
    animals, food = distances["animals"], distances["food"]
    assert animals["images"]["generated"] == 4 and food["images"]["generated"] == 6
    assert animals["fid"] < food["fid"] and distances[None]["fid"] < food["fid"]


def test_a_category_with_one_image_has_no_distance(release, tmp_path):
    prompts = mjhq.read(release)
    generated = tmp_path / "generated" / "food"
    generated.mkdir(parents=True)
    picture(1).save(generated / f"{prompts[1].id}.jpg")
    distances, side = scored(prompts, release, generated.parent)
    assert distances[None]["fid"] is None and distances["animals"]["fid"] is None
    assert len(side.missing) == 11


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "must be an object"),
        ('{"a": {"category": "x"}}', "entry 'a'"),
        ('{"../a": {"category": "x", "prompt": "y"}}', "name of a file"),
    ],
)
def test_a_malformed_list_of_prompts_is_refused(tmp_path, content, complaint):
    (tmp_path / "meta_data.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        mjhq.read(tmp_path)


def test_absent_folders_are_refused(release, tmp_path):
    with pytest.raises(UserError, match="meta_data.json"):
        mjhq.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        mjhq.collect(mjhq.read(release), tmp_path / "nowhere", ColorAndEdges())
