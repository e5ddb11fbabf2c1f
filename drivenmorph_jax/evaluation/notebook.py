"""A result in a notebook: the widget of ipyniivue, three panels with one crosshair, and a choice of maps over them.

The maps have tables of colours that come with NiiVue, because a table that a notebook adds is not there when the images
are drawn first. They are transparent where they say little, as on the page of `drivenmorph view`.
"""

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import layers, metrics
from drivenmorph_jax.images.intensity import anchored
from drivenmorph_jax.images.volume import affine_of_part

INSTALL = "pip install ipyniivue==2.4.4"
PANELS = {"fixed": "Fixed", "warped": "Warped", "moving": "Moving, after the affine"}
HEIGHT = 380  # pixels of a panel
OPACITY = 0.6
LITTLE = 0.05  # share of the range below which a map is transparent
# {table of `layers.COLOURS`: the tables of NiiVue for values above and below 0}
COLOURS = {"lengths": ("inferno", ""), "two sides": ("warm", "winter"), "one colour": ("red", "")}


def widget(images, maps, affine):
    """The widget of a result.

    Args:
      images: {"fixed", "warped", "moving": voxels (X, Y, Z)}, on the grid of the fixed image.
      maps: {name of `layers.OVERLAYS`: function that gives what `layers.overlay` takes}.
      affine: (4, 4) of the grid, from voxels to RAS mm.

    Raises InputError where the package ipyniivue is missing.
    """
    try:
        import ipyniivue
        import ipywidgets
    except ImportError as error:
        raise InputError(f"a result is shown in a notebook by the package ipyniivue: {INSTALL}") from error
    box = layers.box([layers.bounds(x) for x in images.values()], images["fixed"].shape)
    brain = metrics.brain(anchored(images["fixed"]))

    def volume(name, x, low, high, **how):
        file = layers.nifti(x[box], low, high, affine_of_part(affine, box)).to_bytes()
        return ipyniivue.Volume(name=f"{name}.nii", data=file, cal_min=low, cal_max=high, colorbar_visible=False, **how)

    def shown(name):
        x, low, high = layers.overlay(name, maps[name](), brain)
        above, below = COLOURS[layers.OVERLAYS[name].colours]
        low = LITTLE * (high - low)
        return volume(name, x, low, high, opacity=OPACITY, colormap=above, colormap_negative=below)

    views = {}
    for name, x in images.items():
        views[name] = ipyniivue.NiiVue(
            height=HEIGHT, drag_and_drop_enabled=False, show_3d_crosshair=True, crosshair_width=0.7,
            crosshair_width_unit="percent", show_all_orientation_markers=True, multiplanar_force_render=False,
            multiplanar_show_render=ipyniivue.ShowRender.NEVER)
        views[name].load_volumes([volume(name, x, *layers.window(x[box]), colormap="gray")])
    for view in views.values():
        view.broadcast_to([other for other in views.values() if other is not view], {"2d": True, "crosshair": True})
    words = ipywidgets.HTML()
    choice = ipywidgets.Dropdown(description="Map", options=[("none", ""), *(
        (layers.OVERLAYS[name].name, name) for name in maps)])

    def chosen(change):
        name = change["new"]
        for view in (views["fixed"], views["warped"]):
            view.volumes = [*view.volumes[:1], *([shown(name)] if name else [])]
        one = layers.OVERLAYS.get(name)
        words.value = "" if one is None else f"{one.name}{one.unit and f' ({one.unit})'}: {one.words}."

    choice.observe(chosen, "value")
    panels = [ipywidgets.VBox([ipywidgets.Label(PANELS[name]), view], layout=ipywidgets.Layout(width="33%"))
              for name, view in views.items()]
    return ipywidgets.VBox([choice, ipywidgets.HBox(panels), words])
