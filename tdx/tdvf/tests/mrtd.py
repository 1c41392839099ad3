"""Prints both MRTDs of an image, by default of the image that mrtd.rs composes: python3 mrtd.py [IMAGE]"""

import hashlib, struct, sys, uuid

METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le


def composed():
    x, image = 7, bytearray()
    for _ in range(0x4000):
        x = (x * 1664525 + 1013904223) % 2**32
        image.append(x >> 24)
    sections = [
        (0, 0x400, 0xFFFE0000, 0x1000, 0, 1),
        (0, 0x4000, 0xFFFFC000, 0x4000, 0, 1),
        (0, 0, 0x809000, 0x2000, 2, 0),
        (0, 0, 0x1000000, 0x3000, 5, 1),
        (0, 0, 0x100000000, 0x40000000, 4, 2),
    ]
    end = struct.pack("<4sIII", b"TDVF", 16 + 32 * len(sections), 1, len(sections))
    end += b"".join(struct.pack("<IIQQII", *section) for section in sections)
    end += struct.pack("<IH", len(end) + 72, 22) + METADATA + struct.pack("<H", 40) + FOOTER
    image[-len(end) - 32 : -32] = end
    return bytes(image)


def sections(image):
    pointer = image.rindex(METADATA) - 6
    at = len(image) - struct.unpack_from("<I", image, pointer)[0]
    signature, _, _, count = struct.unpack_from("<4sIII", image, at)
    assert signature == b"TDVF"
    return [struct.unpack_from("<IIQQII", image, at + 16 + 32 * i) for i in range(count)]


def record(name, gpa):
    return name.ljust(16, b"\0") + struct.pack("<Q", gpa).ljust(112, b"\0")


def mrtd(image, two_pass):
    digest = hashlib.sha384()
    for offset, raw, address, size, _, attributes in sections(image):
        if attributes & 2:
            continue
        memory = image[offset : offset + raw].ljust(size, b"\0")
        steps = [("add", page) for page in range(0, size, 4096)]
        if attributes & 1:
            measured = [("extend", page) for page in range(0, size, 4096)]
            steps = steps + measured if two_pass else [s for pair in zip(steps, measured) for s in pair]
        for step, page in steps:
            if step == "add":
                digest.update(record(b"MEM.PAGE.ADD", address + page))
                continue
            for at in range(page, page + 4096, 256):
                digest.update(record(b"MR.EXTEND", address + at) + memory[at : at + 256])
    return digest.hexdigest()


image = open(sys.argv[1], "rb").read() if sys.argv[1:] else composed()
print(mrtd(image, False))
print(mrtd(image, True))
