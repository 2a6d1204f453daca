"""The body without its bones: the measures that differ between patients, the surfaces that follow from them (chest
wall, diaphragm, mediastinum, lungs), and the soft tissues that are painted between these. Positions are fractions of
the lungs' height and the chest's width, so that organs keep their places in patients of every size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lungddpm.core.volume import Box
from lungddpm.sources.phantom.scanner import HU, Grid, paint
from lungddpm.sources.phantom.shapes import curve, ellipsoid, oval, smooth_min, tube


@dataclass(frozen=True)
class Physique:
    """Measures that differ between patients."""

    size: float
    """Of the whole body, relative to the mean."""
    half_width_mm: tuple[float, float]
    """Midline to the inner chest wall, right and left."""
    half_depth_mm: float
    """Half the inner depth of the chest."""
    height_mm: float
    """Lung base to apex."""
    dome_mm: tuple[float, float]
    """Height of the diaphragm, right and left."""
    fat_mm: float
    """Thickness of the fat under the skin."""
    muscle_mm: float
    """Thickness of the chest wall's muscle."""
    heart_scale: float
    """Size of the heart and the mediastinum's vessels, relative to the mean."""
    breast_scale: float
    """Size of the breasts, 0 for none."""
    lung_hu: float
    gravity_hu: float
    """Difference in lung attenuation from front to back."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Physique:
        """A random patient."""
        size = float(np.clip(rng.normal(1, 0.035), 0.93, 1.05))
        width = 132 * size * rng.uniform(0.97, 1.03)
        lean = rng.uniform(-0.02, 0.02)
        dome = 62 * size * rng.uniform(0.8, 1.2)
        return cls(
            size=size,
            half_width_mm=(width * (1.01 + lean), width * (0.99 - lean)),
            half_depth_mm=90 * size * rng.uniform(0.93, 1.07),
            height_mm=248 * size * rng.uniform(0.93, 1.07),
            dome_mm=(dome, dome - rng.uniform(5, 18)),
            fat_mm=rng.uniform(5, 14),
            muscle_mm=rng.uniform(15, 20),
            heart_scale=size * rng.uniform(0.92, 1.1),
            breast_scale=rng.uniform(0.7, 1.1) if rng.random() < 0.4 else 0.0,
            lung_hu=HU["lung"] + rng.normal(0, 12),
            gravity_hu=rng.uniform(40, 80),
        )

    def taper(self, z: ArrayLike) -> np.ndarray:
        """Width of the chest at a height, relative to its widest."""
        t = np.asarray(z) / self.height_mm
        above, below = np.clip((t - 0.2) / 0.8, 0, 1), np.clip((0.2 - t) / 0.4, 0, 1)
        return (1 - above**3) ** 0.55 - 0.05 * below**2

    def middle_y(self, z: ArrayLike) -> np.ndarray:
        """Where half the depth of the chest is: further back near the apex, because the sternum slants."""
        return 16 * np.clip(np.asarray(z) / self.height_mm - 0.35, 0, 1)

    def spine_y(self, z: ArrayLike) -> np.ndarray:
        """Centre of the vertebral bodies, with the thoracic kyphosis."""
        return self.half_depth_mm * 0.68 - 14 * (np.asarray(z) / self.height_mm - 0.5) ** 2 * 2

    def wall_half_axes(self, z: ArrayLike, side: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Half width and half depth of the inner chest wall at a height; `side` is negative on the right."""
        apart = self.lung_axis_x
        width = np.where(side < 0, *self.half_width_mm)
        taper = self.taper(z)
        return apart + (width - apart) * taper, self.half_depth_mm * np.maximum(taper, 0.05) ** 0.5

    @property
    def lung_axis_x(self) -> float:
        """Distance in mm of each lung's long axis from the midline."""
        return 0.36 * self.half_width_mm[0]


@dataclass(frozen=True)
class Surfaces:
    """Signed distances in mm (negative inside) on the whole grid, float32."""

    torso: np.ndarray
    body: np.ndarray
    """Torso and breasts."""
    chest_wall: np.ndarray
    """Inside of the ribs."""
    diaphragm: np.ndarray
    mediastinum: np.ndarray
    lung: np.ndarray
    costal: np.ndarray
    """Chest wall and diaphragm only: where the lung's surface is nearest to this, it is not mediastinal."""


def surfaces_of(grid: Grid, p: Physique) -> Surfaces:
    """The surfaces of a patient's chest."""
    x, y, z = grid.coordinates()
    middle = p.middle_y(z).astype(np.float32)
    half_width, half_depth = (a.astype(np.float32) for a in p.wall_half_axes(z, x))
    chest_wall = np.maximum(oval(x, y - middle, half_width, half_depth, 2.5), z - p.height_mm)

    apart = np.float32(p.lung_axis_x)
    taper = p.taper(z).astype(np.float32)
    lateral = np.abs(x) - apart
    half = np.where(lateral > 0, half_width - apart, 1.35 * apart * taper)
    pleura = np.maximum(oval(lateral, y - middle, half, half_depth * taper**0.3, 2.2), chest_wall)

    diaphragm = _diaphragm(grid, p)
    costal = np.maximum(pleura, diaphragm)
    mediastinum = _mediastinum(grid, p)
    torso = _torso(grid, p)
    return Surfaces(
        torso=torso,
        body=_with_breasts(torso, grid, p),
        chest_wall=chest_wall,
        diaphragm=diaphragm,
        mediastinum=mediastinum,
        lung=np.maximum(costal, 1 - mediastinum),
        costal=costal,
    )


def paint_soft_tissue(hu: np.ndarray, grid: Grid, p: Physique, surfaces: Surfaces) -> None:
    """Couch, chest wall, abdomen and mediastinum."""
    _paint_couch(hu, grid, p)
    _paint_chest_wall(hu, grid, p, surfaces)
    _paint_abdomen(hu, grid, p, surfaces)
    _paint_mediastinum(hu, grid, p)


def parenchyma(grid: Grid, p: Physique, rng: np.random.Generator) -> np.ndarray:
    """HU of lung tissue without visible vessels: denser towards the back, and slightly uneven."""
    from scipy.ndimage import zoom

    coarse = np.maximum(np.array(grid.shape) * grid.step_mm // 25, 2).astype(int)
    uneven = zoom(rng.normal(0, 10, coarse).astype(np.float32), np.array(grid.shape) / coarse, order=1)
    _, y, _ = grid.coordinates()
    return uneven + (p.lung_hu + p.gravity_hu * y / np.float32(2 * p.half_depth_mm)).astype(np.float32)


def _diaphragm(grid: Grid, p: Physique) -> np.ndarray:
    x, y, z = grid.coordinates()
    apart = np.float32(p.lung_axis_x)
    lateral, right = np.abs(x) - apart, x < 0
    reach = np.where(lateral > 0, np.where(right, *p.half_width_mm) - apart, 1.9 * apart).astype(np.float32)
    q2 = ((lateral - 4) / reach) ** 2 + ((y + 8) / np.float32(1.02 * p.half_depth_mm)) ** 2
    return (np.where(right, *p.dome_mm).astype(np.float32) * np.maximum(1 - q2, -0.3) - z) * np.float32(0.8)


def _torso(grid: Grid, p: Physique) -> np.ndarray:
    x, y, z = grid.coordinates()
    layers = p.fat_mm + p.muscle_mm
    t = z / np.float32(p.height_mm)
    width = (max(p.half_width_mm) + layers) * (1 - 0.04 * np.clip(0.3 - t, 0, 1))
    depth = (p.half_depth_mm + layers + 5) * (1 - 0.25 * np.clip(t - 0.6, 0, 0.6))
    return oval(x, y - 5 - 14 * np.clip(t - 0.5, 0, 1), width, depth, 2.45)


def _breast_centre(p: Physique, side: int) -> tuple[float, float, float]:
    return side * 0.55 * p.half_width_mm[0], -p.half_depth_mm - p.fat_mm - p.muscle_mm + 2, 0.33 * p.height_mm


def _with_breasts(torso: np.ndarray, grid: Grid, p: Physique) -> np.ndarray:
    body = torso.copy()
    if p.breast_scale:
        for side in (-1, 1):
            centre, radii = _breast_centre(p, side), tuple(p.breast_scale * r for r in (58, 36, 54))
            box = grid.box(np.subtract(centre, radii) - 20, np.add(centre, radii) + 20)
            body[box] = smooth_min(body[box], ellipsoid(grid.coordinates(box), centre, radii), 20)
    return body


def _mediastinum(grid: Grid, p: Physique) -> np.ndarray:
    x, y, z = grid.coordinates()
    h = p.height_mm
    spine_y = p.spine_y(z).astype(np.float32)
    spine = np.hypot(x, np.maximum(spine_y + 4 - y, 0)) - 20
    lower = np.clip(0.62 - z / np.float32(h), 0, 0.1) * 10
    centre = oval(
        x - 2 - 5 * lower, y - (spine_y - 34), (25 - 6 * lower) * np.float32(p.heart_scale), np.float32(36), 2
    )
    front = np.clip(-y / np.float32(p.half_depth_mm) - 0.6, 0, 1)
    inlet = np.clip(z / np.float32(h) - 0.72, 0, 1)
    anterior = np.maximum(np.abs(x - 4) - (6 + 55 * front + 60 * inlet), y - 25)
    field = smooth_min(smooth_min(spine, centre, 12), anterior, 12)
    box = _heart_box(grid, p)
    field[box] = smooth_min(field[box], _heart(grid.coordinates(box), p) - 4, 10)
    for points, radius in [*_great_vessels(p).values(), *_airways(p)]:
        box, distance = tube(grid, points, radius + 2.5, margin_mm=10)
        field[box] = smooth_min(field[box], distance, 8)
    return field


def _heart(xyz: tuple[np.ndarray, np.ndarray, np.ndarray], p: Physique) -> np.ndarray:
    """Ventricles along an axis to the left, front and feet; atria behind."""
    h, s = p.height_mm, p.heart_scale
    x, y, z = xyz
    x, y, z = x - 20 * s, y + 27, z - 0.35 * h
    # Orthonormal axes of the ventricles.
    along = 0.78 * x - 0.46 * y - 0.425 * z
    across = 0.508 * x + 0.861 * y
    upright = 0.366 * x - 0.216 * y + 0.905 * z
    ventricles = ellipsoid((along, across, upright), (0, 0, 0), (62 * s, 41 * s, 44 * s))
    right_atrium = ellipsoid(xyz, (-24 * s, -12, 0.36 * h), (24 * s, 31 * s, 36 * s))
    left_atrium = ellipsoid(xyz, (4, 10, 0.41 * h), (32 * s, 20 * s, 22 * s))
    return smooth_min(smooth_min(ventricles, right_atrium, 8), left_atrium, 8)


def _heart_box(grid: Grid, p: Physique) -> Box:
    return grid.box((-110, -110, -20), (130, 60, 0.75 * p.height_mm))


def _great_vessels(p: Physique) -> dict[str, tuple[np.ndarray, float]]:
    """Centre lines and radii of the blood-filled tubes of the mediastinum."""
    h, s = p.height_mm, p.heart_scale
    back = float(p.spine_y(0.5 * h))
    arch = 0.70 * h
    descending = [(19 * s, back - 19, z) for z in (0.6 * h, 0.45 * h, 0.3 * h, 0.15 * h, -40.0)]
    ascending = [(-4 * s, -22, 0.36 * h), (-16 * s, -26, 0.46 * h), (-17 * s, -22, 0.56 * h), (-10 * s, -14, arch - 8)]
    aorta = [*ascending, (4 * s, 2, arch), (17 * s, back - 32, arch - 6), *descending]
    hilum = 0.50 * h
    return {
        "aorta": (curve(aorta), 13.0 * s),
        "superior vena cava": (curve([(-26 * s, -16, z) for z in (0.36 * h, 0.5 * h, 0.7 * h, 0.82 * h)]), 9.0 * s),
        "brachiocephalic vein": (curve([(-26 * s, -16, 0.80 * h), (2, -30, 0.83 * h), (32, -18, 0.96 * h)]), 6.5 * s),
        "brachiocephalic artery": (curve([(-6, -10, arch), (-20, -2, 0.86 * h), (-30, 4, h + 40)]), 6.0 * s),
        "carotid artery": (curve([(6, 0, arch), (13, 2, 0.86 * h), (20, 2, h + 40)]), 4.0 * s),
        "subclavian artery": (curve([(15, 10, arch), (24, 14, 0.86 * h), (38, 12, h + 5)]), 4.5 * s),
        "pulmonary trunk": (curve([(14 * s, -42, 0.36 * h), (14 * s, -36, 0.5 * h), (17 * s, -20, 0.55 * h)]), 12 * s),
        "right pulmonary artery": (
            curve([(15 * s, -22, 0.54 * h), (-8, -4, 0.53 * h), (-34, 4, 0.52 * h), (-54, 10, hilum)]),
            9.5 * s,
        ),
        "left pulmonary artery": (
            curve([(17 * s, -20, 0.55 * h), (34, -2, 0.57 * h), (48, 14, 0.55 * h), (55, 18, hilum)]), 9.0 * s
        ),
        "right pulmonary veins": (curve([(-6, 12, 0.40 * h), (-30, 10, 0.40 * h), (-50, 14, 0.39 * h)]), 6.5 * s),
        "left pulmonary veins": (curve([(10, 12, 0.42 * h), (34, 14, 0.42 * h), (52, 18, 0.41 * h)]), 6.5 * s),
    }  # fmt: skip


def _airways(p: Physique) -> list[tuple[np.ndarray, float]]:
    """Centre lines and lumen radii of trachea and main bronchi."""
    h, s, back = p.height_mm, p.heart_scale, float(p.spine_y(0.5 * p.height_mm))
    carina = (0.0, back - 28, 0.585 * h)
    trachea = [(2.0, float(p.spine_y(h)) - 27, h + 60), (2.0, back - 30, 0.8 * h), carina]
    right = [carina, (-22 * s, back - 33, 0.54 * h), (-47 * s, 20, 0.495 * h)]
    left = [carina, (25 * s, back - 33, 0.53 * h), (49 * s, 24, 0.475 * h)]
    return [(curve(trachea), 8.5 * s), (curve(right), 6.5 * s), (curve(left), 6.0 * s)]


def _paint_couch(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    x, y, _ = grid.coordinates()
    back = p.half_depth_mm + p.fat_mm + p.muscle_mm + 10
    couch = np.maximum(np.abs(y - (back + 14 - 0.0011 * x * x)) - 9, np.abs(x) - 205)
    paint(hu, grid.share(couch), HU["couch"])
    paint(hu, grid.share(couch + 2), HU["foam"])


def _paint_chest_wall(hu: np.ndarray, grid: Grid, p: Physique, surfaces: Surfaces) -> None:
    """Skin, fat, breasts, muscle, and fat between the chest wall and the lungs."""
    x, y, z = grid.coordinates()
    wall, share = surfaces.chest_wall, grid.share
    paint(hu, share(surfaces.body), HU["skin"])
    paint(hu, share(surfaces.body + 2), HU["fat"])
    if p.breast_scale:
        for side in (-1, 1):
            centre = np.add(_breast_centre(p, side), (0, -14, 0))
            radii = (26 * p.breast_scale, 14 * p.breast_scale, 24 * p.breast_scale)
            box = grid.box(np.subtract(centre, radii), np.add(centre, radii))
            paint(hu[box], share(ellipsoid(grid.coordinates(box), centre, radii)), HU["gland"])
    # A sheet of fat separates the chest wall's own muscles from those of the shoulder girdle, up to the armpits.
    inlet = np.clip((z / np.float32(p.height_mm) - 0.8) / 0.15, 0, 1)
    angle = np.arctan2(np.abs(x), -y)
    under_skin = surfaces.torso + p.fat_mm * (1 + 0.4 * np.cos(4 * angle))
    sheet = 1.6 * (1 - inlet) * (1 + np.cos(2 * angle - 1)) - np.abs(wall - 12) - 3 * inlet
    paint(hu, share(np.maximum(under_skin, sheet)), HU["muscle"])
    paint(hu, share(np.maximum(wall - 9, surfaces.torso + 3)), HU["muscle"])
    paint(hu, share(wall + 1), HU["fat"] + inlet * (HU["muscle"] - HU["fat"]))


def _paint_abdomen(hu: np.ndarray, grid: Grid, p: Physique, surfaces: Surfaces) -> None:
    box = grid.box((-400, -400, -400), (400, 400, max(p.dome_mm) + 5))
    x, y, z = grid.coordinates(box)
    under = np.maximum(surfaces.chest_wall[box] + 1, -surfaces.diaphragm[box])
    paint(hu[box], grid.share(under), HU["muscle"])
    paint(hu[box], grid.share(under + 4), HU["fat"])
    # Away from the spine and, to the left, ending before the stomach.
    beside_spine = 36 - np.hypot(x, 0.8 * (y - p.spine_y(z).astype(np.float32)))
    liver = np.maximum(np.maximum(under + 3, x - 40 - 0.4 * y - 0.3 * z), beside_spine)
    paint(hu[box], grid.share(liver), HU["liver"])
    spleen = np.maximum(ellipsoid((x, y, z), (p.half_width_mm[1] - 36, 32, 5), (30, 45, 42)), under + 4)
    paint(hu[box], grid.share(spleen), HU["spleen"])
    stomach = np.maximum(ellipsoid((x, y, z), (62, -22, 0), (36, 42, 46)), under + 5)
    stomach = np.maximum(stomach, 5 - liver)
    paint(hu[box], grid.share(stomach), HU["fluid"])
    paint(hu[box], grid.share(np.maximum(stomach + 3, y + 34)), HU["air"])


def _paint_mediastinum(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    box = _heart_box(grid, p)
    paint(hu[box], grid.share(_heart(grid.coordinates(box), p)), HU["blood"])
    tubes = _great_vessels(p)
    tubes["inferior vena cava"] = (curve([(-22, -2, 0.3 * p.height_mm), (-20, 12, -60)]), 11.0 * p.heart_scale)
    before_the_spine = [(6.0, float(p.spine_y(z)) - 22, z) for z in np.linspace(-60, p.height_mm + 60, 6)]
    tubes["oesophagus"] = (curve(before_the_spine), 6.5)
    for points, radius in tubes.values():
        box, distance = tube(grid, points, radius, margin_mm=5)
        paint(hu[box], grid.share(distance), HU["blood"])
    airways = [tube(grid, points, radius, margin_mm=6) for points, radius in _airways(p)]
    # All walls first: the bronchi open into the trachea.
    for box, distance in airways:
        paint(hu[box], grid.share(distance - 1.5), HU["airway_wall"])
    for box, distance in airways:
        paint(hu[box], grid.share(distance), HU["air"])
