"""Procedural video clips: a moving camera and moving cut-outs over scikit-image's own photographs.

Everything is drawn on the device that asks for it, from a seed, so that no data set is stored or
downloaded. A clip shows one photograph (its label) through a camera that pans, zooms and rotates
at constant rates (its camera vector); in some clips a round or square cut-out of another photograph
swings across the picture.
"""

import math
from dataclasses import dataclass
from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from skimage.io import imread

TRAIN_SHAPE = (27, 96, 96)
"""Frames, height and width of a training clip: 27 x 16 x 16 = 6,912 tokens with 6 x 6 patches."""

DEMO_SHAPE = (9, 96, 96)
"""Frames, height and width of a demo clip: 9 x 16 x 16 = 2,304 tokens with 6 x 6 patches."""

CAMERA_FIELDS = ("pan_x", "pan_y", "zoom", "rotation", "sprite")
"""What the camera vector holds: four rates in [-1, 1], and 1 where a cut-out moves."""


@dataclass(frozen=True)
class PhotoCrop:
    """A square region of one file in scikit-image's wheel, in pixels, and a tint for grey files."""

    name: str
    file: str
    left: int
    top: int
    side: int
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)


PHOTOS = (
    PhotoCrop("astronaut", "astronaut.png", 30, 0, 430),
    PhotoCrop("cat", "chelsea.png", 75, 0, 300),
    PhotoCrop("coffee", "coffee.png", 90, 0, 400),
    PhotoCrop("motorcycle", "motorcycle_left.png", 130, 0, 500),
    PhotoCrop("rocket", "rocket.jpg", 110, 0, 427),
    PhotoCrop("tissue", "ihc.png", 0, 0, 512),
    PhotoCrop("cameraman", "camera.png", 0, 0, 512, (1.0, 0.94, 0.84)),
    PhotoCrop("coins", "coins.png", 40, 0, 303, (1.0, 0.86, 0.55)),
    PhotoCrop("brick", "brick.png", 100, 100, 312, (1.0, 0.66, 0.52)),
    PhotoCrop("turtle", "logo.png", 0, 0, 500),
)
"""The photographs; a clip's label is an index into this tuple."""

SPRITES = (
    PhotoCrop("astronaut", "astronaut.png", 146, 5, 160),
    PhotoCrop("cat", "chelsea.png", 133, 40, 220),
    PhotoCrop("coffee", "coffee.png", 166, 5, 230),
    PhotoCrop("turtle", "logo.png", 145, 95, 170),
)
"""The pictures that moving cut-outs carry."""

LABELS = tuple(photo.name for photo in PHOTOS)
"""The photographs' names, in label order."""

# Per frame, in units of half the photograph's width (pan), of the logarithm (zoom), in radians.
_MAX_PAN = 0.025
_MAX_ZOOM = 0.02
_MAX_ROTATION = 0.03


@dataclass(frozen=True)
class PhotoBank:
    """The photographs and cut-outs as textures in [-1, 1].

    ``photos`` is ``(len(PHOTOS), 3, S, S)``, ``sprites`` ``(len(SPRITES), 3, s, s)``; float32.
    """

    photos: torch.Tensor
    sprites: torch.Tensor


@dataclass(frozen=True)
class Clips:
    """A batch of clips.

    ``video`` is ``(B, 3, T, H, W)`` float32 in [-1, 1], ``label`` ``(B,)`` int64, ``camera``
    ``(B, len(CAMERA_FIELDS))`` float32.
    """

    video: torch.Tensor
    label: torch.Tensor
    camera: torch.Tensor


def photo_prompt(seed: int) -> tuple[int, list[float]]:
    """Label and camera of a seed's clip: every clip shows and does something else."""
    rates = [math.cos(seed), math.sin(seed), math.cos(3 * seed), math.sin(2 * seed)]
    return seed % len(LABELS), [*rates, float(seed % 2)]


def load_photo_bank(width: int, device: torch.device | str = "cpu") -> PhotoBank:
    """Read the photographs at the texture size that suits clips ``width`` pixels wide."""
    # A view covers about 0.7 of a photograph: this side makes one texel about one pixel, so that
    # plain bilinear sampling neither blurs nor aliases. A cut-out covers about a third of a view.
    photos = torch.stack([_read_crop(crop, round(width / 0.7)) for crop in PHOTOS])
    sprites = torch.stack([_read_crop(crop, round(width / 3)) for crop in SPRITES])
    return PhotoBank(photos.to(device), sprites.to(device))


def draw_clips(
    bank: PhotoBank, batch: int, shape: tuple[int, int, int], generator: torch.Generator
) -> Clips:
    """Draw ``batch`` clips of ``shape`` (frames, height, width) on the bank's device.

    The generator must live on that device; the same generator state gives the same clips. Camera
    and cut-out paths are centred on the middle frame: a short clip looks like the middle of a long
    one.
    """
    frames, height, width = shape
    device = bank.photos.device

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        unit = torch.rand(batch, *size, device=device, generator=generator)
        return low + (high - low) * unit

    label = torch.randint(len(PHOTOS), (batch,), device=device, generator=generator)
    # Each motion is absent in half of the clips, so that pure pans, zooms and rests occur too.
    rates = uniform(-1, 1, 4) * (uniform(0, 1, 4) < 0.5)
    has_sprite = (uniform(0, 1) < 0.5).float()

    time = torch.arange(frames, device=device, dtype=torch.float32) - (frames - 1) / 2  # (T,)
    x, y = _pixel_grid(height, width, device)  # (H, W), in half widths of the frame
    scale_at_middle = uniform(0.65, 0.8, 1)
    scale = scale_at_middle * torch.exp(-_MAX_ZOOM * rates[:, 2:3] * time)  # (B, T)
    angle = uniform(-0.1, 0.1, 1) + _MAX_ROTATION * rates[:, 3:4] * time
    centre = (1 - scale_at_middle) * 0.5 * uniform(-1, 1, 2)  # the middle view stays inside
    centre_x = centre[:, 0:1] + _MAX_PAN * rates[:, 0:1] * time
    centre_y = centre[:, 1:2] + _MAX_PAN * rates[:, 1:2] * time

    cos, sin = (scale * angle.cos())[..., None, None], (scale * angle.sin())[..., None, None]
    photo_x = centre_x[..., None, None] + cos * x - sin * y  # (B, T, H, W)
    photo_y = centre_y[..., None, None] + sin * x + cos * y
    video = _sample(bank.photos[label], photo_x, photo_y, "reflection")

    # A cut-out swings on an ellipse or a line around the middle of the frame.
    picture = torch.randint(len(SPRITES), (batch,), device=device, generator=generator)
    radius = uniform(0.3, 0.36, 1, 1, 1)
    pace = uniform(0.09, 0.14, 1) * (uniform(0, 1, 1) < 0.5).float().mul(2).sub(1)
    phase = uniform(0, 2 * torch.pi, 2)
    swing = uniform(0.35, 0.55, 2)
    sprite_x = swing[:, 0:1] * torch.sin(pace * time + phase[:, 0:1])
    sprite_y = swing[:, 1:2] * torch.sin(pace * time + phase[:, 1:2])
    local_x = (x - sprite_x[..., None, None]) / radius  # (B, T, H, W); the cut-out is [-1, 1]
    local_y = (y - sprite_y[..., None, None]) / radius
    cut_out = _sample(bank.sprites[picture], local_x, local_y, "border")

    # The p-norm is a disc for p = 2 and a square with round corners for p = 6.
    is_disc = uniform(0, 1, 1, 1, 1) < 0.5
    square_x, square_y = local_x * local_x, local_y * local_y
    disc = (square_x + square_y).sqrt()
    square = (square_x**3 + square_y**3).pow(1 / 6) * 1.12
    pixels_inside = (1 - torch.where(is_disc, disc, square)) * radius * (width / 2)
    cover = (pixels_inside + 0.5).clamp(0, 1) * has_sprite[:, None, None, None]
    inner = (pixels_inside - 1.0).clamp(0, 1)  # what is left of the cover is a white rim
    cut_out = 1 + (cut_out - 1) * inner[:, None]
    video = video + (cut_out - video) * cover[:, None]

    camera = torch.cat([rates, has_sprite[:, None]], dim=1)
    return Clips(video.clamp(-1, 1), label, camera)


def _read_crop(crop: PhotoCrop, side: int) -> torch.Tensor:
    """One crop as ``(3, side, side)`` float32 in [-1, 1]."""
    with as_file(files("skimage") / "data" / crop.file) as path:
        image = torch.from_numpy(imread(path).copy()).float() / 255
    if image.ndim == 2:
        image = image[..., None].expand(-1, -1, 3)
    if image.shape[-1] == 4:  # transparent pixels become white
        image = 1 + (image[..., :3] - 1) * image[..., 3:]
    bottom, right = crop.top + crop.side, crop.left + crop.side
    image = image[crop.top : bottom, crop.left : right] * torch.tensor(crop.tint)
    if image.shape[:2] != (crop.side, crop.side):
        raise ValueError(f"{crop.file} is smaller than the crop {crop}")
    image = image.permute(2, 0, 1)[None]
    image = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
    return image[0].clamp(0, 1) * 2 - 1


def _pixel_grid(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of every pixel centre, ``(H, W)``, in units of half the frame's width."""
    columns = (torch.arange(width, device=device) + 0.5) * (2 / width) - 1
    rows = ((torch.arange(height, device=device) + 0.5) * (2 / height) - 1) * (height / width)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y


def _sample(texture: torch.Tensor, x: torch.Tensor, y: torch.Tensor, padding: str) -> torch.Tensor:
    """Sample ``(B, 3, S, S)`` at ``(B, T, H, W)`` coordinates: ``(B, 3, T, H, W)``."""
    batch, frames, height, width = x.shape
    # Frames are stacked along the height: one texture per clip serves all of its frames.
    grid = torch.stack([x, y], dim=-1).view(batch, frames * height, width, 2)
    pixels = F.grid_sample(texture, grid, "bilinear", padding, align_corners=False)
    return pixels.view(batch, 3, frames, height, width)
