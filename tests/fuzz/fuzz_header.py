"""Coverage-guided fuzzing of the tensor headers' reader: ``make fuzz``.

An input is two bytes, the size of the tensor data in little-endian order, and then the header. Whatever it is, the
header is refused by an error of offsite's own, or means the same to a JSON parser and to the safetensors library.
"""

from __future__ import annotations

import json
import sys

CODES = {"bool": "BOOL", "uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "bfloat16": "BF16"}
CODES |= {"float32": "F32", "float64": "F64"}


def check(data: bytes) -> bool:
    """Return whether the header was accepted; AssertionError when the reader broke its word."""
    from safetensors import deserialize

    from offsite.errors import BadSchema, TooLarge
    from offsite.tensors import parse_header

    num_data_bytes, raw = int.from_bytes(data[:2], "little"), data[2:]
    try:
        specs = parse_header(raw, num_data_bytes, max_tensors=64)
    except (BadSchema, TooLarge) as error:
        message = str(error)
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 400
        return False
    stated = json.loads(raw)
    assert stated.pop("__metadata__", {"format": "pt"}) == {"format": "pt"}
    assert stated.keys() == specs.keys()
    position = 0
    for name, entry in sorted(stated.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry.keys() == {"dtype", "shape", "data_offsets"}
        assert entry["dtype"] == CODES[specs[name].dtype]
        assert tuple(entry["shape"]) == specs[name].shape
        assert entry["data_offsets"] == [position, position + specs[name].num_bytes]
        position += specs[name].num_bytes
    assert position == num_data_bytes
    read = dict(deserialize(len(raw).to_bytes(8, "little") + raw + bytes(num_data_bytes)))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in read.items()} == {
        name: (CODES[spec.dtype], spec.shape) for name, spec in specs.items()
    }
    return True


def main() -> None:
    """Fuzz with the words of the command line, which are libFuzzer's."""
    import atheris

    with atheris.instrument_imports(include=["offsite"]):
        import offsite.tensors  # noqa: F401
    atheris.Setup(sys.argv, lambda data: bool(check(data)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
