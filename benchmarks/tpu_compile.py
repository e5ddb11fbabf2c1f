"""The network and its parts, compiled ahead of time for a TPU slice, without a TPU: traffic, arithmetic, memory.

python -m benchmarks.tpu_compile [--topology v5e:2x4] [--space 1] [--shape 160 192 224] [--only "training step" ...]
  [--config configs/default.py] [--config.KEY=VALUE ...]

It needs libtpu (`pip install "jax[tpu]"`), on any Linux machine. The parts are compiled for one chip. Inference and the
training step are compiled for the whole slice, with one volume for each `space` chips; the exchanges between the chips
are counted. Traffic and arithmetic are estimates. The seconds are the time that the traffic takes at the bandwidth of a
chip's memory: nothing here has run on a TPU.

XLA counts the body of a loop once. `traffic` counts the bytes of all iterations.
"""

import argparse
import os
import re
import time
from collections import Counter
from functools import partial

# The host's backend is the CPU. Only the compiler of libtpu is used, so libtpu need not search for the chips.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.traffic import traffic
from drivenmorph_jax.backends import compiling_for, programs
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.network import losses, networks
from drivenmorph_jax.network.attention import neighbourhood_attention
from drivenmorph_jax.network.convolution import conv3d
from drivenmorph_jax.runtime import configuration, sharding
from drivenmorph_jax.training.step import make_optimizer, make_train_step

BANDWIDTH = {"v5e": 0.82e12, "v5p": 2.77e12, "v6e": 1.64e12, "v4": 1.23e12}  # bytes a second, as Google publishes
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SLOW = ("gather", "scatter", "while")


def gradient(f):
    """The gradient of the sum of squares of `f`, with respect to all arguments."""
    return lambda *x: jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=tuple(range(len(x))))(*x)


def parts(shape):
    """{name: (function, shapes of its arguments)} of the parts of the network, at their largest size."""
    half = tuple(n // 2 for n in shape)
    image, field, features, heads = ((1, *space, *last) for space, last in (
        (shape, (1,)), (half, (3,)), (half, (16,)), (half, (2, 8))))
    return {
        "warp of an image": (warp, (image, (1, *shape, 3))),
        "warp of 16 features": (warp, (features, field)),
        "composition": (warp, (field, field)),
        "composition with a short field": (partial(warp, reach=1), (field, field)),
        "exponential of a short field": (partial(exponential, steps=2, reach=1), (field,)),
        "convolution, 16 to 16": (conv3d, (features, (3, 3, 3, 16, 16))),
        "convolution, 4 to 4": (conv3d, ((1, *shape, 4), (3, 3, 3, 4, 4))),
        "attention, 27 neighbours": (lambda q, k, v: neighbourhood_attention(q, k, v, 1)[0], (heads,) * 3),
        "Gaussian": (partial(gaussian_smooth, sigma=0.7), (field,)),
        "local correlation": (partial(losses.lncc, window=9), (image, image)),
    }


def compiled_parts(config, mesh, shape):
    """{name: (jitted function, shapes of its arguments)}: inference and the training step, over the mesh."""
    model, optimizer = networks.make_network(config.model), make_optimizer(config)
    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    image = jnp.zeros((1, *(2 * networks.multiple(config.model),) * 3, 1))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image, image)["params"])
    placed = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole))
    params, state = placed(params), placed(jax.eval_shape(optimizer.init, params))
    volume = jax.ShapeDtypeStruct((mesh.shape["data"], *shape, 1), jnp.float32, sharding=split)
    infer = jax.jit(lambda params, *images: model.apply({"params": params}, *images).u, out_shardings=split)
    return {"inference": (infer, (params, volume, volume)),
            "training step": (make_train_step(model, optimizer, config, mesh),
                              (params, state, {"fixed": volume, "moving": volume}))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--space", type=int, default=1, help="chips to a volume")
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 192, 224))
    parser.add_argument("--only", nargs="*", help="rows, as the table names them")
    parser.add_argument("--config", default="configs/default.py")
    flags, settings = parser.parse_known_args()
    config = configuration.override(configuration.load(flags.config), settings)
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology).devices
    except Exception as error:  # libtpu raises many types
        raise InputError(f"cannot compile for {flags.topology}: install jax[tpu], or name another slice "
                                f"({str(error).splitlines()[0]})") from error
    mesh = sharding.device_mesh(flags.space, chips)
    rate = BANDWIDTH[flags.topology.split(":")[0]]
    one = SingleDeviceSharding(chips[0])
    rows = {}
    for name, (f, shapes) in parts(tuple(flags.shape)).items():
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=one) for s in shapes]
        rows |= {name: (jax.jit(f), arguments), f"{name}, gradient": (jax.jit(gradient(f)), arguments)}
    rows |= compiled_parts(config, mesh, tuple(flags.shape))
    print(f"{flags.topology}, {flags.space} chips to a volume of {'x'.join(map(str, flags.shape))}, "
          f"jax {jax.__version__}\n")
    print(f"| | GB accessed | s at {rate / 1e12:.2f} TB/s | GFLOP, loops once | GB of a chip | compiled in s | "
          "operations |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    for name in flags.only or rows:
        f, arguments = rows[name]
        start = time.perf_counter()
        try:
            compiled = f.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            print(f"| {name} | {str(error).splitlines()[0][:160]} |", flush=True)
            continue
        seconds, text = time.perf_counter() - start, compiled.as_text()
        moved, flops, used = traffic(text), compiled.cost_analysis()["flops"], programs.device_memory(compiled)
        found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES + SLOW)})(?:-start)?\(", text))
        print(f"| {name} | {moved / 1e9:.1f} | {moved / rate:.3f} | {flops / 1e9:.1f} | "
              f"{used / 1e9:.2f} | {seconds:.0f} | "
              f"{', '.join(f'{n} {op}' for op, n in sorted(found.items()))} |", flush=True)


if __name__ == "__main__":
    with compiling_for("tpu"):
        run(main)
