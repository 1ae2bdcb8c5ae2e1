"""What it takes to make a package of a large model: the most memory, seconds, bytes read and written.

    python benchmarks/factory/run.py --shape 7b --work FOLDER -o benchmarks/factory/results/NAME.json -- --method width

A checkpoint of that shape is made of random weights (in FOLDER, unless it is there; ``--clean`` removes it afterwards)
with a tokenizer of single bytes, and ``offsite distill --steps 0`` runs on it as a process of its own, with the words
after ``--``. ``--code`` runs the verb of another checkout, to compare with. ``--show FILE ...`` prints a table.

With ``--verb plug-in`` the words are those of ``offsite plug-in``: a random LoRA of rank 8 on the linears of both ends,
whose package has eight blocks of the middle, is put into the checkpoint's model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import ROOT, environment, write

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "0.2b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
}
VOCABULARY = 32_000
SHARD_BLOCKS = 4
POLL_SECONDS = 0.2
SETTLED_SECONDS = 3.0  # files written later than two seconds before they are hashed are not remembered


def make_checkpoint(folder: Path, shape: str) -> None:
    """A llama of that shape stands in `folder`, bfloat16, in shards of four blocks; only one of them is in memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offsite.tensors import write_tensors

    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPES[shape])
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups: dict[int, list[str]] = {}
    for name in shapes:
        number = int(name.split(".")[2]) // SHARD_BLOCKS + 1 if ".layers." in name else 0
        groups.setdefault(number, []).append(name)
    pool = torch.empty(2**26).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    folder.mkdir(parents=True)
    weight_map = {}
    for place, names in sorted(groups.items()):
        file = f"model-{place + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _drawn(pool, shapes[name], 1_000 * place + i) for i, name in enumerate(names)}
        write_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _drawn(pool: Any, shape: tuple[int, ...], seed: int) -> Any:
    """Return a tensor of that shape out of a pool of normal numbers, turned by another way for each; norms are ones."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    num = shape[0] * shape[1]
    turned = pool.roll(7_919 * seed)
    return turned.repeat(-(-num // len(turned)))[:num].reshape(shape).clone()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def measured(words: list[str], code: Path, folder: Path) -> dict[str, Any]:
    """Run ``offsite`` with these words as a process; return what it took and what it printed.

    Memory is the kernel's own high-water mark. ``disk_read_bytes`` are those that came from the disk, mapped or not;
    the files in `folder` are not in the kernel's cache when it begins.
    """
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "offsite", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(code)},
    )
    io: dict[str, int] = {}
    most = {"RssAnon": 0, "RssFile": 0}
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        io = _counters(process.pid) or io
        for name, kilobytes in _memory(process.pid).items():
            most[name] = max(most[name], 1024 * kilobytes)
        time.sleep(POLL_SECONDS)
    said = process.stdout.read() if process.stdout is not None else ""
    if status:
        raise SystemExit(f"offsite {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "peak_rss_bytes": 1024 * used.ru_maxrss,
        "peak_anonymous_bytes": most["RssAnon"],
        "peak_mapped_bytes": most["RssFile"],
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "disk_read_bytes": io["read_bytes"],
        "disk_written_bytes": io["write_bytes"],
        "told": json.loads(said.strip().splitlines()[-1]),
    }


def opened(package: Path, hashed: Path) -> dict[str, dict[str, float]]:
    """Return what it takes to open the package before a bundle is looked at: when it was never hashed, and again."""
    from offsite.artefacts.known import KnownFiles
    from offsite.artefacts.package import open_package

    time.sleep(SETTLED_SECONDS)
    hashed.unlink(missing_ok=True)
    found = {}
    for name in ("first", "again"):
        began, before = time.monotonic(), _counters(os.getpid())["rchar"]
        known = KnownFiles(hashed)
        open_package(package, known)
        known.save()
        read = _counters(os.getpid())["rchar"] - before
        found[name] = {"read_bytes": read, "seconds": round(time.monotonic() - began, 3)}
    return found


def _counters(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))}


def show(paths: list[Path]) -> None:
    """Print the results as a table of a README."""
    print(
        "| shape | checkpoint | words | code | tokens | peak memory | of it not of files | seconds | read | written |"
    )
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for path in paths:
        one = json.loads(path.read_text(encoding="utf-8"))
        found = one["measured"]
        figures = [
            _gigabytes(found["peak_rss_bytes"]),
            _gigabytes(found["peak_anonymous_bytes"]),
            f"{found['seconds']:,.0f}",
            _gigabytes(found["disk_read_bytes"]),
            _gigabytes(found["disk_written_bytes"]),
        ]
        verb = one["config"].get("verb", "distill")
        name, code = " ".join([verb, *one["config"]["words"]]), (one["code_commit"] or "")[:7]
        first = [one["config"]["shape"], _gigabytes(one["checkpoint_bytes"]), f"`{name}`", code]
        print("| " + " | ".join([*first, f"{one['config'].get('tokens', 0):,}", *figures]) + " |")


def show_opened(paths: list[Path]) -> None:
    """Print what it took to open the packages as a table of a README."""
    print("| package | read at first | seconds | read again | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for path in paths:
        one = json.loads(path.read_text(encoding="utf-8"))
        if "opened" in one:
            first, again = one["opened"]["first"], one["opened"]["again"]
            figures = [f"{first['read_bytes']:,}", f"{first['seconds']:.2f}"]
            figures += [f"{again['read_bytes']:,}", f"{again['seconds']:.2f}"]
            print("| " + " | ".join([_gigabytes(one["measured"]["told"]["package_bytes"]), *figures]) + " |")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def accepted(package: Path, folder: Path) -> list[str]:
    """A bundle with a random adapter for `package` is accepted in a registry in `folder`; return the words for it."""
    import secrets
    from types import SimpleNamespace

    import torch

    from adapters.kinds import declared
    from offsite.artefacts.bundle import AdapterSpec, write_bundle
    from offsite.artefacts.job import Job
    from offsite.artefacts.package import open_package
    from offsite.tensors import torch_dtype
    from server.registry.registry import Registry
    from server.registry.rows import short_id

    opened_package = open_package(package)
    spec = AdapterSpec(kind="lora", rank=8, dtype="float32")
    expected = declared(spec, opened_package.layout, opened_package.block_tensors())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(one.shape, dtype=torch_dtype(one.dtype)).normal_(0, 0.01, generator=generator)
        for name, one in expected.items()
    }
    bundle = write_bundle(folder / "bundle", package=opened_package, spec=spec, tensors=tensors, expected=expected)
    parties = {"owner": "-".join(["a" * 4] * 13), "client": "-".join(["b" * 4] * 13)}
    bound = {"package_digest": opened_package.digest, "base_digest": opened_package.manifest.base_digest}
    job = Job(job_id=secrets.token_hex(16), adapter=spec, created=1, expires=2**39, **parties, **bound)
    digest = "sha256:" + secrets.token_hex(32)
    (folder / "keys").mkdir(mode=0o700)
    with Registry.open(folder / "registry", folder / "keys", create=True) as registry:
        registry.add_job(job, package=package, client_name="client")
        registry.receive(SimpleNamespace(job_id=job.job_id, issuer=job.client, round=1, sequence=1), digest)
        shutil.copytree(bundle.path, registry.bundle_folder(short_id(digest)))
        tensors_sha256 = bundle.manifest.files["adapter.safetensors"].sha256
        registry.verified(digest, bundle_digest=bundle.digest, tensors_sha256=tensors_sha256, figures={})
        registry.advance(short_id(digest), "accepted")
    return [short_id(digest), "--registry", str(folder / "registry"), "--keys", str(folder / "keys")]


def plugged_in(given: argparse.Namespace, checkpoint: Path, package: Path) -> dict[str, Any]:
    """Return what plugging a random adapter into the checkpoint's model takes."""
    folder = given.work.resolve() / "package.plugging"
    folder.mkdir()
    made = ["distill", str(checkpoint), "--method", "drop", "--blocks", "8", "--steps", "0", "-o", str(package)]
    measured(made, ROOT, checkpoint)
    words = accepted(package, folder)
    return measured(
        ["plug-in", str(checkpoint), *words, *given.words, "-o", str(folder / "adapted")],
        given.code.resolve(),
        checkpoint,
    )


def distilled(given: argparse.Namespace, checkpoint: Path, package: Path) -> dict[str, Any]:
    """Return what making a package of the checkpoint's model takes."""
    from offsite.text.records import bundled, read_records

    text = given.work.resolve() / "public.txt"
    documents = "\n\n".join(record.whole_text for record in read_records(bundled("public")))
    text.write_text(documents[: 2 * given.tokens], encoding="utf-8")  # a token is a byte here
    words = ["distill", str(checkpoint), "--public", str(text), "--steps", "0", "--device", "cpu"]
    words += ["--block-tokens", "128", "--batch-size", "4", "--calibration-tokens", str(given.tokens)]
    return measured([*words, *given.words, "-o", str(package)], given.code.resolve(), checkpoint)


def main() -> None:
    """Measure one run and write the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--verb", choices=("distill", "plug-in"), default="distill")
    options.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    options.add_argument("--work", type=Path, default=Path("factory-work"))
    options.add_argument("--tokens", type=int, default=2048, help="calibration tokens, in blocks of 128")
    options.add_argument("--code", type=Path, default=ROOT, help="checkout whose verb runs")
    options.add_argument("--clean", action="store_true", help="remove the checkpoint afterwards")
    options.add_argument("-o", "--out", type=Path)
    options.add_argument("--show", type=Path, nargs="*")
    options.add_argument("words", nargs="*", help="of the verb, behind --")
    given = options.parse_args()
    if given.show:
        show(given.show)
        print()
        show_opened(given.show)
        return
    checkpoint, package = given.work.resolve() / f"llama-{given.shape}", given.work.resolve() / "package"
    needed = (3 if given.shape != "7b" else 24) * (2**30 if given.verb == "distill" else 2**31)
    given.work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(given.work).free < needed:
        raise SystemExit(f"expected {needed:,} bytes of free disk in {given.work.name!r}")
    if not checkpoint.exists():
        make_checkpoint(checkpoint, given.shape)
    try:
        found = (distilled if given.verb == "distill" else plugged_in)(given, checkpoint, package)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=given.code, capture_output=True, text=True, check=False
        ).stdout.strip()
        config = {"shape": given.shape, "words": given.words}
        config |= {"tokens": given.tokens} if given.verb == "distill" else {"verb": given.verb}
        result = {
            "benchmark": "factory",
            **environment(),
            "code_commit": commit or None,
            "config": config,
            "seed": 0,
            "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
            "measured": found,
        }
        if given.verb == "distill":
            result["opened"] = opened(package, given.work / "package.hashed")
        if given.out:
            write(given.out, result)
        print(json.dumps(result, indent=1))
    finally:
        for left in given.work.glob("package*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if given.clean:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
