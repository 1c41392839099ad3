//! An archive for the kernel's initial RAM file system (cpio, format "newc": Linux
//! Documentation/driver-api/early-userspace/buffer-format.rst).

/// The mode of a file that can be executed.
const PROGRAM: u32 = 0o100_755;

/// An archive with these files.
pub(crate) fn initramfs(files: &[(impl AsRef<str>, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, contents) in files {
        add(&mut archive, name.as_ref(), PROGRAM, contents);
    }
    add(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn add(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let (named, bytes) = (name.len() as u32 + 1, contents.len() as u32);
    // The numbers of a file, and their places among the thirteen.
    let mut fields = [0; 13];
    for (at, field) in [(0, 1), (1, mode), (4, 1), (6, bytes), (11, named)] {
        fields[at] = field;
    }
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    for part in [[name.as_bytes(), b"\0"].concat().as_slice(), contents] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}
