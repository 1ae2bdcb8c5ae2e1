"""A tiny model, a tokenizer that cuts characters in two, and a model that says what it is told to."""

from __future__ import annotations

import secrets
import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["the patient has a fever and a cough", "the doctor asks how long the cough has lasted", "naïve café"]


class Parrot(torch.nn.Module):
    """Says `script` token by token whatever the prompt, then the end token. Looks like a causal model."""

    def __init__(self, script: list[int], *, num_vocabulary: int, end: int, context: int = 4096) -> None:
        super().__init__()
        self.script, self.end, self.num_forwards = script, end, 0
        self.embedding = torch.nn.Embedding(num_vocabulary, 1)
        self.config = LlamaConfig(vocab_size=num_vocabulary, max_position_embeddings=context)
        self.generation_config = GenerationConfig(eos_token_id=end)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        self.num_forwards += 1
        said = past_key_values or 0
        scores = torch.zeros(1, input_ids.shape[1], self.embedding.num_embeddings)
        scores[0, -1, self.script[said] if said < len(self.script) else self.end] = 100.0
        return SimpleNamespace(logits=scores, past_key_values=said + 1)


@pytest.fixture(scope="session")
def bytes_tokenizer():
    """A byte-level BPE tokenizer with a chat template; characters beyond its few texts take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def spread_llama(bytes_tokenizer):
    """A random llama whose weights are large enough that it does not repeat one token."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(bytes_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        eos_token_id=bytes_tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def parrot(bytes_tokenizer):
    """Return a maker of models that say a text."""

    def make(text: str, *, context: int = 4096) -> Parrot:
        ids = bytes_tokenizer(text)["input_ids"]
        return Parrot(ids, num_vocabulary=len(bytes_tokenizer), end=bytes_tokenizer.eos_token_id, context=context)

    return make


@pytest.fixture(scope="session")
def make_bundle():
    """Write a bundle of an adapter that no training made: its start, shaken so that every tensor matters."""
    from adapters.kinds import attach, declared
    from offsite.bundle import AdapterSpec, write_bundle

    def make(out, package, *, seed=0, shake=0.05, tensors=None, **spec):
        spec = AdapterSpec(**{"dtype": "float32", **spec})
        names = declared(spec, package.layout, package.block_tensors())
        if tensors is None:
            attached = attach(package.load_model(), spec, package.layout.blocks, names)
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                name: tensor + shake * torch.randn(tensor.shape, generator=generator)
                for name, tensor in attached.tensors().items()
            }
        return write_bundle(out, package=package, spec=spec, tensors=tensors, expected=names)

    return make


@pytest.fixture(scope="session")
def save_model(letters_tokenizer):
    """Write a model and the letters' tokenizer as a checkpoint folder."""

    def save(model, out):
        model.save_pretrained(out)
        letters_tokenizer.save_pretrained(out)
        return out

    return save


@pytest.fixture(scope="session")
def llama_folder(full_llama, save_model, tmp_path_factory):
    """The checkpoint folder of `full_llama`; read only."""
    return save_model(full_llama, tmp_path_factory.mktemp("base") / "llama")


def _checkpoint_logits(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.fixture(scope="session")
def logits_of():
    """Logits of a model on fixed tokens that are not those of plug-in's own probe."""
    return _checkpoint_logits


# --- two parties, a job and a registry


class Exchange:
    """An owner with a registry and a job, and the client of that job; both in folders of their own."""

    def __init__(self, folder, package, owner, client, now):
        folder.mkdir()
        from offsite.job import Job
        from offsite.trust import TrustStore
        from server.registry import Registry

        self.folder, self.package, self.owner, self.client, self.now = folder, package, owner, client, now
        self.keys, self.registry_folder = folder / "keys", folder / "registry"
        self.keys.mkdir(mode=0o700)
        self.trust = TrustStore(self.keys)
        self.trust.add(client.public.card, client.public.fingerprint, now=now)
        self._job, self._registry_class, self._opened = Job, Registry, []
        self.registry = self.opened(create=True)

    def opened(self, *, create=False):
        """Return the registry, opened anew, as after a restart."""
        self._opened.append(self._registry_class.open(self.registry_folder, self.keys, create=create))
        return self._opened[-1]

    def close(self):
        for registry in self._opened:
            registry.close()

    def job(self, *, register=True, **changes):
        from offsite.bundle import AdapterSpec

        stated = {
            "job_id": secrets.token_hex(16),
            "owner": self.owner.public.fingerprint,
            "client": self.client.public.fingerprint,
            "package_digest": self.package.digest,
            "base_digest": self.package.manifest.base_digest,
            "adapter": AdapterSpec(kind="lora", dtype="float32", rank=2, placement="1+1"),
            "rounds": 3,
            "created": self.now,
            "expires": self.now + 86400,
        }
        job = self._job(**{**stated, **changes})
        if register:
            self.registry.add_job(job, package=self.package.path, client_name="client", now=self.now)
        return job

    def seal(self, bundle, job, out, *, identity=None, recipients=None, **changes):
        """Seal a bundle folder as the client does, or with changes as nobody should."""
        from offsite.seal import seal_files

        stated = {
            "kind": "bundle",
            "job_id": job.job_id,
            "created": self.now,
            "expires": self.now + 3600,
            "sequence": 1,
            "round": 1,
            "previous": None,
            "base_digest": job.base_digest,
            "package_digest": job.package_digest,
            "identity": identity or self.client,
            "recipients": recipients or [self.owner.public],
        }
        files = changes.pop("files", None) or {path.name: path for path in bundle.iterdir()}
        seal_files(files, out, **{**stated, **changes})
        return out

    def take_in(self, sealed, *, registry=None, now=None):
        return (registry or self.registry).intake(sealed, self.owner, self.trust, now=now or self.now)


@pytest.fixture(scope="session")
def identities():
    """Owner, client and a stranger; their keys live in memory alone."""
    from offsite.keys import generate

    return {name: generate(name, days=30) for name in ("owner", "client", "stranger")}


@pytest.fixture
def exchange(tmp_path, dropped_package, identities):
    """A registry without jobs, and who takes part."""
    made = Exchange(
        tmp_path / "owner-side", dropped_package, identities["owner"], identities["client"], int(time.time())
    )
    yield made
    made.close()


@pytest.fixture(scope="session")
def small_bundle(make_bundle, dropped_package, tmp_path_factory):
    """A sound bundle of the adapter that the exchange's jobs ask for; read only."""
    out = tmp_path_factory.mktemp("small") / "bundle"
    return make_bundle(out, dropped_package, kind="lora", rank=2, placement="1+1", shake=0.02)


@pytest.fixture(scope="session")
def shelve():
    """Put a bundle into a registry of its own as accepted, without sealing it; return the settings that name it."""
    import shutil

    from offsite.bundle import open_bundle
    from offsite.job import Job
    from server.registry import Registry
    from server.registryrows import short_id

    def put(bundle, package, folder, *, state="accepted"):
        keys = folder / "keys"
        keys.mkdir(parents=True, mode=0o700)
        parties = {name: "-".join([letter * 4] * 13) for name, letter in (("owner", "a"), ("client", "b"))}
        digest = "sha256:" + secrets.token_hex(32)
        manifest = open_bundle(bundle).manifest
        bound = {"package_digest": manifest.package_digest, "base_digest": manifest.base_digest}
        job = Job(job_id=secrets.token_hex(16), adapter=manifest.adapter, created=1, expires=2**39, **parties, **bound)
        envelope = SimpleNamespace(job_id=job.job_id, issuer=job.client, round=1, sequence=1)
        with Registry.open(folder / "registry", keys, create=True) as registry:
            registry.add_job(job, package=package, client_name="client")
            registry.receive(envelope, digest)
            shutil.copytree(bundle, registry.bundle_folder(short_id(digest)))
            registry.verified(
                digest,
                bundle_digest=open_bundle(bundle).digest,
                tensors_sha256=manifest.files["adapter.safetensors"].sha256,
                figures={},
            )
            if state == "accepted":
                registry.advance(short_id(digest), "accepted")
        return {"id": short_id(digest), "registry": folder / "registry", "keys": keys}

    return put


@pytest.fixture
def plug_in(shelve, tmp_path):
    """Run the verb on a bundle that was accepted; `package` is where its job says it is."""
    from server.config import PlugConfig
    from server.plug import run

    def put_in(model, bundle, out, *, package, **settings):
        named = shelve(bundle.path, package, tmp_path / f"shelf-{secrets.token_hex(4)}")
        return run(PlugConfig(model=str(model), output=out, **named, **settings))

    return put_in
