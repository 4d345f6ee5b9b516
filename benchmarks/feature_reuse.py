"""Measures how the stages of a channel-cut ResNet-50 should hand features to later stages.

ResNet-50 (random weights, batch norm folded) is cut into three stages that own 4, 2 and 2 eighths
of every layer's channels. With full reuse, every convolution of a stage reads the channels of all
stages up to its own. The candidates below differ only in how those channels are brought together;
all compute the same numbers, which is checked first against a dense network with masked weights.

    python benchmarks/feature_reuse.py                          # eager, batch 1 and 16
    python benchmarks/feature_reuse.py --backend inductor --batch 1
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_settings

SPLIT = (4, 6)
GROUPS = 8
STAGES = len(SPLIT) + 1
CLASSES = 1000
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True, slots=True)
class Convolution:
    """One folded convolution of the bottleneck network, and where its result goes."""

    source: str
    target: str
    channels_in: int
    channels_out: int
    kernel: int
    stride: int = 1
    relu: bool = True
    residual: str | None = None


def bottleneck_network() -> list[Convolution]:
    """The convolutions of ResNet-50 (stride on the 3x3) in order; the stem comes first."""
    network = [Convolution("image", "stem", 3, 64, 7, 2)]
    source, width_in = "stem", 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            stride = 2 if layer > 1 and block == 0 else 1
            a, b, out = (f"layer{layer}.{block}.{part}" for part in ("a", "b", "out"))
            identity = source
            network.append(Convolution(source, a, width_in, width, 1))
            network.append(Convolution(a, b, width, width, 3, stride))
            if block == 0:
                identity = f"layer{layer}.{block}.shortcut"
                network.append(
                    Convolution(source, identity, width_in, 4 * width, 1, stride, relu=False)
                )
            network.append(Convolution(b, out, width, 4 * width, 1, residual=identity))
            source, width_in = out, 4 * width
    return network


NETWORK = bottleneck_network()
LAST = NETWORK[-1].target
# What later stages read: the inputs of convolutions, without the image.
SHARED = list(dict.fromkeys(conv.source for conv in NETWORK[1:]))


def bounds(channels: int, stage: int) -> tuple[int, int]:
    """First and one-past-last channel that `stage` (from 0) owns."""
    edges = (0, *SPLIT, GROUPS)
    return channels * edges[stage] // GROUPS, channels * edges[stage + 1] // GROUPS


def random_weights() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Dense folded (weight, bias) of every convolution, and of one head per stage."""
    generator = torch.Generator().manual_seed(0)
    convolutions = []
    for conv in NETWORK:
        fan_in = conv.channels_in * conv.kernel**2
        gain = 0.5 if conv.residual else 1.0
        shape = (conv.channels_out, conv.channels_in, conv.kernel, conv.kernel)
        weight = torch.randn(shape, generator=generator) * gain * (2 / fan_in) ** 0.5
        convolutions.append((weight, torch.randn(shape[0], generator=generator) * 0.1))
    width = NETWORK[-1].channels_out
    heads = []
    for stage in range(STAGES):
        shape = (CLASSES, bounds(width, stage)[1])
        heads.append(
            (
                torch.randn(shape, generator=generator) * shape[1] ** -0.5,
                torch.randn(CLASSES, generator=generator),
            )
        )
    return convolutions, heads


def random_images(count: int, side: int, seed: int) -> Tensor:
    """Smooth noise; on white noise the outputs of a random network hardly depend on the input."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn((count, 3, 7, 7), generator=generator)
    return F.interpolate(coarse, (side, side), mode="bicubic")


def masked_weights(weights: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Dense weights in which no stage reads a later one."""
    masked = []
    for conv, (weight, bias) in zip(NETWORK, weights, strict=True):
        alive = weight.clone()
        if conv.source != "image":
            for stage in range(STAGES):
                start, end = bounds(conv.channels_out, stage)
                alive[start:end, bounds(conv.channels_in, stage)[1] :] = 0
        masked.append((alive, bias))
    return masked


def rows(features: Tensor) -> Tensor:
    """A channels-last (N, C, H, W), or a range of its channels, as (N*H*W, C) without a copy."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class Static(nn.Module):
    """The uncut network; returns the pooled features if it has no head."""

    pointwise_as_matmul = False

    def __init__(self, weights, head, memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        self.weights = nn.ParameterList(
            nn.Parameter(w.clone(memory_format=memory_format), requires_grad=False)
            for w, _ in weights
        )
        self.biases = nn.ParameterList(nn.Parameter(b.clone(), False) for _, b in weights)
        self.head = None if head is None else nn.ParameterList(nn.Parameter(t, False) for t in head)

    def apply_convolution(self, conv: Convolution, index: int, features: Tensor) -> Tensor:
        weight, bias = self.weights[index], self.biases[index]
        if not self.pointwise_as_matmul or conv.kernel > 1:
            return F.conv2d(features, weight, bias, conv.stride, conv.kernel // 2)
        features = features[:, :, :: conv.stride, :: conv.stride]
        n, _, h, w = features.shape
        flat = torch.addmm(bias, rows(features), weight.flatten(1).t())
        return flat.view(n, h, w, -1).permute(0, 3, 1, 2)

    def forward(self, image: Tensor) -> Tensor:
        values = {"image": image}
        for index, conv in enumerate(NETWORK):
            result = self.apply_convolution(conv, index, values[conv.source])
            if conv.residual:
                result = result.add_(values[conv.residual])
            if conv.relu:
                result = result.relu_()
            if conv.target == "stem":
                result = F.max_pool2d(result, 3, 2, 1)
            values[conv.target] = result
        pooled = values[LAST].mean((2, 3))
        return pooled if self.head is None else F.linear(pooled, *self.head)


class StaticMatmul(Static):
    """The uncut network with its 1x1 convolutions as matrix products over channels-last rows."""

    pointwise_as_matmul = True


class Stage(nn.Module):
    """One stage. `forward(image, *handed)` returns the logits, then what is handed on.

    A candidate overrides how a value is `put`, `read` by a thin convolution, and handed on;
    `memory` is what the stage holds: name of a value -> the candidate's form of it. The pooled
    features of every stage so far travel as the last handed tensors.
    """

    by_part: Callable[[Convolution], bool] = staticmethod(lambda conv: False)

    def __init__(self, weights, heads, stage, memory_format) -> None:
        super().__init__()
        self.stage, self.memory_format = stage, memory_format
        self.biases, self.weights = nn.ParameterList(), nn.ModuleList()
        for conv, (weight, bias) in zip(NETWORK, weights, strict=True):
            start, end = bounds(conv.channels_out, stage)
            own = weight[start:end]
            if conv.source == "image":
                parts = [own]
            elif self.by_part(conv):
                parts = [own[:, slice(*bounds(conv.channels_in, s))] for s in range(stage + 1)]
            else:
                parts = [own[:, : bounds(conv.channels_in, stage)[1]]]
            self.weights.append(
                nn.ParameterList(
                    nn.Parameter(p.clone(memory_format=memory_format), False) for p in parts
                )
            )
            self.biases.append(nn.Parameter(bias[start:end].clone(), False))
        self.head = nn.ParameterList(nn.Parameter(t.clone(), False) for t in heads[stage])

    def forward(self, image: Tensor, *handed: Tensor) -> tuple[Tensor, ...]:
        pooled = list(handed[len(handed) - self.stage :])
        memory = self.open(image, handed[: len(handed) - self.stage])
        own: dict[str, Tensor] = {}
        for index, conv in enumerate(NETWORK):
            weights, bias = self.weights[index], self.biases[index]
            residual = own[conv.residual] if conv.residual else None
            if conv.source == "image":
                result = F.conv2d(image, weights[0], bias, conv.stride, conv.kernel // 2).relu_()
                result = F.max_pool2d(result, 3, 2, 1)
            else:
                result = self.read(memory, conv, weights, bias)
            own[conv.target] = self.put(memory, conv, result, residual)
        pooled.append(own[LAST].mean((2, 3)))
        logits = F.linear(torch.cat(pooled, 1), *self.head)
        if self.stage == STAGES - 1:
            return (logits,)
        return (logits, *self.hand_on(memory), *pooled)

    def finish(self, conv: Convolution, result: Tensor, residual: Tensor | None) -> Tensor:
        """Residual and activation, in place."""
        if residual is not None:
            result = result.add_(residual)
        return result.relu_() if conv.relu else result

    def finish_into(self, target: Tensor, conv, result: Tensor, residual: Tensor | None) -> Tensor:
        """Residual and activation, the last of them written straight into `target`."""
        if residual is not None:
            result = result.add_(residual)
        if torch.compiler.is_compiling():  # it fuses this, and stops at an `out` that is a view
            return target.copy_(result.relu())
        return torch.clamp_min(result, 0, out=target)

    def convolve(self, conv: Convolution, features: Tensor, weight: Tensor, bias=None) -> Tensor:
        return F.conv2d(features, weight, bias, conv.stride, conv.kernel // 2)


class Cat(Stage):
    """Hands on each stage's own part; a reader concatenates all parts, once per value."""

    def open(self, image, handed):
        parts = {name: list(handed[i :: len(SHARED)]) for i, name in enumerate(SHARED)}
        return {"parts": parts, "whole": {}}

    def put(self, memory, conv, result, residual):
        result = self.finish(conv, result, residual)
        if conv.target in memory["parts"]:
            memory["parts"][conv.target].append(result)
        return result

    def whole(self, memory, name):
        if name not in memory["whole"]:
            memory["whole"][name] = torch.cat(memory["parts"][name], 1)
        return memory["whole"][name]

    def read(self, memory, conv, weights, bias):
        if not self.by_part(conv):
            return self.convolve(conv, self.whole(memory, conv.source), weights[0], bias)
        first, *others = zip(memory["parts"][conv.source], weights, strict=True)
        result = self.convolve(conv, *first, bias)
        for part, weight in others:
            result = self.accumulate(conv, result, part, weight)
        return result

    def accumulate(self, conv, result, part, weight):
        return result.add_(self.convolve(conv, part, weight))

    def hand_on(self, memory):
        return [memory["parts"][name][s] for s in range(self.stage + 1) for name in SHARED]


class Sum(Cat):
    """Hands on own parts; one convolution per part, results added; nothing is concatenated."""

    by_part = staticmethod(lambda conv: True)


class SumPointwise(Cat):
    """Sums over parts for 1x1 convolutions, concatenation for the (narrower) 3x3 inputs."""

    by_part = staticmethod(lambda conv: conv.kernel == 1)


class MatmulSum(SumPointwise):
    """As sum-1x1, each 1x1 convolution a matrix product that accumulates in place."""

    def convolve(self, conv, features, weight, bias=None):
        if conv.kernel > 1:
            return super().convolve(conv, features, weight, bias)
        features = features[:, :, :: conv.stride, :: conv.stride]
        n, _, h, w = features.shape
        flat = torch.addmm(bias, rows(features), weight.flatten(1).t())
        return flat.view(n, h, w, -1).permute(0, 3, 1, 2)

    def accumulate(self, conv, result, part, weight):
        if conv.kernel > 1:
            return super().accumulate(conv, result, part, weight)
        part = part[:, :, :: conv.stride, :: conv.stride]
        rows(result).addmm_(rows(part), weight.flatten(1).t())
        return result


class PrefixCat(Stage):
    """Hands on the concatenation of all stages so far; the next stage appends its own part."""

    def open(self, image, handed):
        return {"before": dict(zip(SHARED, handed, strict=False)), "whole": {}}

    def put(self, memory, conv, result, residual):
        result = self.finish(conv, result, residual)
        if conv.target in SHARED:
            before = memory["before"].get(conv.target)
            whole = result if before is None else torch.cat((before, result), 1)
            memory["whole"][conv.target] = whole
        return result

    def read(self, memory, conv, weights, bias):
        return self.convolve(conv, memory["whole"][conv.source], weights[0], bias)

    def hand_on(self, memory):
        return [memory["whole"][name] for name in SHARED]


class PrefixWrite(PrefixCat):
    """As prefix-cat, but the activation writes the own part straight into the new prefix."""

    def put(self, memory, conv, result, residual):
        before = memory["before"].get(conv.target)
        if before is None:
            return super().put(memory, conv, result, residual)
        n, _, h, w = result.shape
        start, end = bounds(conv.channels_out, self.stage)
        whole = torch.empty((n, end, h, w), memory_format=self.memory_format)
        whole[:, :start] = before
        memory["whole"][conv.target] = whole
        return self.finish_into(whole[:, start:], conv, result, residual)


class Buffer(Stage):
    """One full-width buffer per value; stages fill their slice and read a prefix view."""

    def open(self, image, handed):
        return {"buffer": dict(zip(SHARED, handed, strict=False)), "prefix": {}}

    def target(self, memory, conv, n, h, w) -> Tensor:
        """This stage's slice of the buffer of a value; stage 1 allocates the buffer."""
        if conv.target not in memory["buffer"]:
            shape = (n, conv.channels_out, h, w)
            memory["buffer"][conv.target] = torch.empty(shape, memory_format=self.memory_format)
        start, end = bounds(conv.channels_out, self.stage)
        return memory["buffer"][conv.target][:, start:end]

    def put(self, memory, conv, result, residual):
        if conv.target not in SHARED:
            return self.finish(conv, result, residual)
        n, _, h, w = result.shape
        target = self.target(memory, conv, n, h, w)
        return self.finish_into(target, conv, result, residual)

    def prefix(self, memory, conv) -> Tensor:
        """The channels up to this stage, made dense once per value (kernels would copy anyway)."""
        if conv.source not in memory["prefix"]:
            view = memory["buffer"][conv.source][:, : bounds(conv.channels_in, self.stage)[1]]
            memory["prefix"][conv.source] = view.contiguous(memory_format=self.memory_format)
        return memory["prefix"][conv.source]

    def read(self, memory, conv, weights, bias):
        return self.convolve(conv, self.prefix(memory, conv), weights[0], bias)

    def hand_on(self, memory):
        return [memory["buffer"][name] for name in SHARED]


class MatmulBuffer(Buffer):
    """As buffer, with 1x1 convolutions as matrix products that read the prefix view in place."""

    def read(self, memory, conv, weights, bias):
        if conv.kernel > 1:
            return super().read(memory, conv, weights, bias)
        view = memory["buffer"][conv.source][:, : bounds(conv.channels_in, self.stage)[1]]
        view = view[:, :, :: conv.stride, :: conv.stride]
        n, _, h, w = view.shape
        flat = torch.addmm(bias, rows(view), weights[0].flatten(1).t())
        return flat.view(n, h, w, -1).permute(0, 3, 1, 2)


class Floor(Stage):
    """What reuse would cost if it were free: reads ready-made tensors of the right shapes.

    Not a candidate, as its numbers are wrong: its time is that of the thin layers alone.
    """

    def open(self, image, handed):
        if not hasattr(self, "ready"):
            self.ready: dict[str, Tensor] = {}
        return self.ready

    def put(self, memory, conv, result, residual):
        result = self.finish(conv, result, residual)
        if conv.target in SHARED and conv.target not in memory:
            n, _, h, w = result.shape
            shape = (n, bounds(conv.channels_out, self.stage)[1], h, w)
            memory[conv.target] = torch.rand(shape).contiguous(memory_format=self.memory_format)
        return result

    def read(self, memory, conv, weights, bias):
        return self.convolve(conv, memory[conv.source], weights[0], bias)

    def hand_on(self, memory):
        return []


STATIC = {"static": Static, "static-matmul": StaticMatmul}
REUSE = {
    "cat": Cat,
    "prefix-cat": PrefixCat,
    "prefix-write": PrefixWrite,
    "buffer": Buffer,
    "sum": Sum,
    "sum-1x1": SumPointwise,
    "matmul-buffer": MatmulBuffer,
    "matmul-sum": MatmulSum,
    "floor": Floor,
}
CHANNELS_LAST_ONLY = {"static-matmul", "matmul-buffer", "matmul-sum"}


@dataclass(slots=True)
class Candidate:
    """A way of running the network, and what was measured of it."""

    name: str
    memory_format: str
    modules: list[Callable[..., object]]
    times: list[list[float]]  # per round: seconds until each exit
    handed_on: list[int]
    peak: int = 0

    @property
    def is_static(self) -> bool:
        return self.name in STATIC

    def run(self, image: Tensor) -> tuple[list[Tensor], list[float]]:
        """Runs all stages; the logits of every exit and the seconds until each."""
        start = time.perf_counter()
        if self.is_static:
            return [self.modules[0](image)], [time.perf_counter() - start]
        exits, seconds, handed = [], [], ()
        for module in self.modules:
            logits, *handed = module(image, *handed)
            exits.append(logits)
            seconds.append(time.perf_counter() - start)
        return exits, seconds

    def measure_memory(self, image: Tensor) -> None:
        """Bytes that each stage hands on, and the most bytes allocated at any time."""
        if not self.is_static:
            handed: Sequence[Tensor] = ()
            for module in self.modules[:-1]:
                _, *handed = module(image, *handed)
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in handed}
                self.handed_on.append(sum(s.nbytes() for s in storages.values()))
            del handed, storages
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            self.run(image)
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.peak = max(accumulate((e.nbytes() for e in events), initial=0))


def cumulative_macs(image: int) -> tuple[int, list[int]]:
    """MACs per sample of the static network, and until each exit, heads included."""
    side = {"image": image}
    static, stages = 0, [0] * STAGES
    for conv in NETWORK:
        size = side[conv.source]
        size = (size + 2 * (conv.kernel // 2) - conv.kernel) // conv.stride + 1
        per_pair = size**2 * conv.kernel**2
        static += per_pair * conv.channels_in * conv.channels_out
        for stage in range(STAGES):
            start, end = bounds(conv.channels_out, stage)
            is_image = conv.source == "image"
            read = conv.channels_in if is_image else bounds(conv.channels_in, stage)[1]
            stages[stage] += per_pair * read * (end - start)
        side[conv.target] = (size - 1) // 2 + 1 if conv.target == "stem" else size
    width = NETWORK[-1].channels_out
    for stage in range(STAGES):
        stages[stage] += bounds(width, stage)[1] * CLASSES
    return static + width * CLASSES, list(accumulate(stages))


def build(arguments, weights, heads) -> list[Candidate]:
    """Every selected candidate in every selected format, compiled if asked for."""

    def backend(module: nn.Module) -> Callable[..., object]:
        module.eval()
        if arguments.backend == "eager":
            return module
        return torch.compile(module, dynamic=False, fullgraph=True)

    candidates = []
    for name in [*STATIC, *arguments.candidates]:
        for label in arguments.formats:
            layout = FORMATS[label]
            if name in CHANNELS_LAST_ONLY and label != "nhwc":
                continue
            if name == "floor" and arguments.backend != "eager":
                continue  # a compiler would drop the results that nothing reads
            if name in STATIC:
                modules = [backend(STATIC[name](weights, heads[-1], layout))]
            else:
                modules = [
                    backend(REUSE[name](weights, heads, stage, layout)) for stage in range(STAGES)
                ]
            candidates.append(Candidate(name, label, modules, [], []))
    return candidates


def reference_exits(image: Tensor, weights, heads) -> tuple[list[Tensor], Tensor]:
    """Logits in float64 of every exit, by the dense masked network, and of the static network."""
    double = [(weight.double(), bias.double()) for weight, bias in weights]
    heads = [(weight.double(), bias.double()) for weight, bias in heads]
    pooled = Static(masked_weights(double), None, torch.contiguous_format)(image)
    static = Static(double, heads[-1], torch.contiguous_format)(image)
    width = NETWORK[-1].channels_out
    exits = [F.linear(pooled[:, : bounds(width, s)[1]], *heads[s]) for s in range(STAGES)]
    return exits, static


def check_equal(candidates: list[Candidate], image: Tensor, weights, heads) -> float:
    """Compares every exit with the reference; returns the largest error by spread over inputs."""
    # Enough inputs for a spread; of a large batch, the first and the last sample are compared.
    compared = [0, len(image) - 1]
    inputs = torch.cat((image[compared], random_images(2, image.shape[-1], seed=1)))
    exits, static = reference_exits(inputs.double(), weights, heads)
    worst = 0.0
    for candidate in candidates:
        if candidate.name == "floor":
            continue
        found, _ = candidate.run(image.contiguous(memory_format=FORMATS[candidate.memory_format]))
        wanted = [static] if candidate.is_static else exits
        for stage, (logits, expected) in enumerate(zip(found, wanted, strict=True)):
            spread = expected.std(0).mean().item()
            if spread < 1e-3 * expected.abs().mean().item():
                raise SystemExit(f"exit {stage + 1}: the output hardly depends on the input")
            error = (logits[compared] - expected[:2]).abs().max().item() / spread
            worst = max(worst, error)
            if not error < 1e-3:
                raise SystemExit(
                    f"{candidate.name} ({candidate.memory_format}), exit {stage + 1}: differs from "
                    f"the reference by {error:.1e} of the spread over inputs; at most 1e-3"
                )
    return worst


def measure(candidates: list[Candidate], image: Tensor, rounds: int, seconds: float) -> None:
    """Times the candidates in turn, `rounds` times; a turn lasts `seconds`, or one run.

    A turn counts as its fastest run: other work on the machine only ever adds to a run.
    """
    inputs = {label: image.contiguous(memory_format=layout) for label, layout in FORMATS.items()}
    for _ in range(rounds):
        for candidate in candidates:
            own = inputs[candidate.memory_format]
            runs, stop = [], time.perf_counter() + seconds
            while not runs or time.perf_counter() < stop:
                runs.append(candidate.run(own)[1])
            candidate.times.append(min(runs, key=lambda run: run[-1]))
    for candidate in candidates:
        if candidate.name != "floor":
            candidate.measure_memory(inputs[candidate.memory_format])


def table(candidates: list[Candidate], macs: tuple[int, list[int]]) -> str:
    """Markdown: medians over rounds, as ratios to the best static network's."""
    medians = [
        [statistics.median(column) for column in zip(*c.times, strict=True)] for c in candidates
    ]
    fastest = [min(times[-1] for times in c.times) for c in candidates]
    statics = [i for i, c in enumerate(candidates) if c.is_static]
    best = min(statics, key=lambda i: medians[i][-1])
    seconds = medians[best][-1]
    ratios = [part / macs[0] for part in macs[1]]
    lines = [
        f"Best static: {candidates[best].name}, {candidates[best].memory_format}, "
        f"{seconds * 1e3:.1f} ms ({macs[0] / 1e9:.2f} GMACs per sample). "
        f"MACs at the exits: {', '.join(f'{r:.3f}' for r in ratios)} of it.",
        "",
        "| candidate | format | time at exit 1 / 2 / 3 | efficiency at exit 1 / 2 / 3 "
        "| fastest at exit 3 | handed on by stage 1 / 2, MB | peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for c, median, minimum in zip(candidates, medians, fastest, strict=True):
        times = [t / seconds for t in median]
        work = [1.0] if c.is_static else ratios
        lines.append(
            f"| {c.name} | {c.memory_format} | {' / '.join(f'{t:.2f}' for t in times)} "
            f"| {' / '.join(f'{r / t:.2f}' for r, t in zip(work, times, strict=True))} "
            f"| {minimum / fastest[best]:.2f} "
            f"| {' / '.join(f'{b / 1e6:.0f}' for b in c.handed_on) or '-'} "
            f"| {f'{c.peak / 1e6:.0f}' if c.peak else '-'} |"
        )
    return "\n".join(lines)


def machine(threads: int, backend: str) -> str:
    """One line on what the numbers were measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    models = [value for key, value in fields if key == "model name"]
    return (
        f"{models[0]}, {len(models)} cores, {threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {backend}"
    )


def main() -> None:
    """Measures and prints one table per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a turn, at least")
    parser.add_argument("--image", type=int, default=224, help="side of the input, pixels")
    parser.add_argument("--backend", choices=["eager", "inductor"], default="eager")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidates", nargs="*", choices=list(REUSE), default=list(REUSE))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    if arguments.backend == "inductor":
        inductor_settings.freezing = True
        torch._dynamo.config.recompile_limit = 1000
    print(machine(arguments.threads, arguments.backend), flush=True)
    weights, heads = random_weights()
    macs = cumulative_macs(arguments.image)
    with torch.no_grad():
        for batch in arguments.batch:
            torch._dynamo.reset()
            image = random_images(batch, arguments.image, seed=2)
            start = time.perf_counter()
            candidates = build(arguments, weights, heads)
            worst = check_equal(candidates, image, weights, heads)
            ready = time.perf_counter() - start
            measure(candidates, image, arguments.rounds, arguments.seconds)
            print(f"\nBatch {batch}. Largest difference: {worst:.0e} of the spread over inputs. "
                  f"Built and checked in {ready:.0f} s.\n")  # fmt: skip
            print(table(candidates, macs), flush=True)


if __name__ == "__main__":
    main()
