//! A Linux kernel boots as a normal VM on the software platform, to a program in user space.
//!
//! `KVM_OPS_LINUX` names the kernel, a bzImage with a serial console; without it the test says that it
//! is skipped. `KVM_OPS_LINUX=vmlinuz cargo test --release -p kvm-ops-cli --test linux -- --nocapture`
//! prints the figures of docs/machine-code.md.

mod common;

use std::path::Path;

use common::run;

/// The kernel that the environment names.
fn kernel() -> Option<String> {
    let named = std::env::var("KVM_OPS_LINUX").ok();
    let found = named.filter(|path| Path::new(path).is_file());
    if found.is_none() {
        println!("skipped: KVM_OPS_LINUX names no kernel");
    }
    found
}

/// The text that `init` writes before the release of the kernel that runs it.
const HELLO: &[u8] = b"init: user space of Linux ";

/// The address at which `init` is loaded, with its headers.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// A static program for x86-64: writes `HELLO` and the release that uname(2) tells, waits until the
/// console has printed it, and restarts the machine.
fn init() -> Vec<u8> {
    let code = [
        // sub rsp, 512; mov rdi, rsp; mov eax, 63 (uname); syscall
        &b"\x48\x81\xec\x00\x02\x00\x00\x48\x89\xe7\xb8\x3f\x00\x00\x00\x0f\x05"[..],
        // mov edi, 1; mov rsi, <the text>; mov edx, <its length>; mov eax, 1 (write); syscall
        b"\xbf\x01\x00\x00\x00\x48\xbeTEXT----\xbaLEN-\xb8\x01\x00\x00\x00\x0f\x05",
        // lea rsi, [rsp + 130] (the release); xor edx, edx; its length: cmp byte [rsi + rdx], 0; je +4;
        // inc edx; jmp back
        b"\x48\x8d\xb4\x24\x82\x00\x00\x00\x31\xd2\x80\x3c\x16\x00\x74\x04\xff\xc2\xeb\xf6",
        // mov byte [rsi + rdx], 10; inc edx; mov edi, 1; mov eax, 1; syscall
        b"\xc6\x04\x16\x0a\xff\xc2\xbf\x01\x00\x00\x00\xb8\x01\x00\x00\x00\x0f\x05",
        // mov edi, 1; mov esi, 0x5409 (TCSBRK: drain); mov edx, 1; mov eax, 16 (ioctl); syscall
        b"\xbf\x01\x00\x00\x00\xbe\x09\x54\x00\x00\xba\x01\x00\x00\x00\xb8\x10\x00\x00\x00\x0f\x05",
        // mov edi, 0xfee1dead; mov esi, 672274793; mov edx, 0x1234567 (restart); mov eax, 169 (reboot);
        // syscall; jmp $
        b"\xbf\xad\xde\xe1\xfe\xbe\x69\x19\x12\x28\xba\x67\x45\x23\x01\xb8\xa9\x00\x00\x00\x0f\x05\xeb\xfe",
    ]
    .concat();
    let start = BASE + ELF_HEADER + PROGRAM_HEADER;
    let text = start + code.len() as u64;
    let mut code = code;
    patch(&mut code, b"TEXT----", &text.to_le_bytes());
    patch(&mut code, b"LEN-", &(HELLO.len() as u32).to_le_bytes());
    let size = ELF_HEADER + PROGRAM_HEADER + (code.len() + HELLO.len()) as u64;

    // ELF64, little-endian, version 1; an executable for x86-64.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [start, ELF_HEADER, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0; 4]);
    for half in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // One segment: loaded, and readable and executable.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file.extend(HELLO);
    file
}

fn patch(code: &mut [u8], mark: &[u8], value: &[u8]) {
    let at = code.windows(mark.len()).position(|bytes| bytes == mark);
    let at = at.expect("the mark");
    code[at..at + mark.len()].copy_from_slice(value);
}

/// An archive for the kernel's initial RAM file system with one file (cpio, format "newc": Linux
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn initramfs(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, contents: &[u8]| {
        let named = name.len() as u32 + 1;
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            contents.len() as u32,
            0,
            0,
            0,
            0,
            named,
            0,
        ];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        for part in [[name.as_bytes(), b"\0"].concat().as_slice(), contents] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    };
    add(name, 0o100_755, contents);
    add("TRAILER!!!", 0, &[]);
    archive
}

#[test]
fn a_kernel_boots_to_user_space_and_restarts_with_the_same_instructions_each_time() {
    let Some(kernel) = kernel() else { return };
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), initramfs("init", &init())).unwrap();
    let args = [
        "run",
        &kernel,
        "--host",
        "sim",
        "--initrd",
        archive.path().to_str().unwrap(),
        "--cmdline",
        // The keyboard controller answers no command, and the driver would wait half a second, in
        // instructions, for each answer.
        "console=ttyS0 reboot=k panic=-1 initcall_blacklist=i8042_init",
        "--memory",
        "512M",
        "--timeout",
        "20m",
        "--clock",
        "1795219200",
        "--json",
    ];
    let boot = || {
        let ran = run(&args);
        assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(report["outcome"], "reset", "{report}");
        report
    };
    let first = boot();
    let console = first["console"]["text"].as_str().unwrap();
    let hello = std::str::from_utf8(HELLO).unwrap();
    let (_, release) = console.split_once(hello).expect("user space");
    let release = release.lines().next().unwrap().trim();
    assert!(
        console.contains(&format!("Linux version {release} ")),
        "{console}"
    );
    let instructions = first["instructions"].as_u64().unwrap();
    let seconds = first["seconds"].as_f64().unwrap();
    println!(
        "Linux {release}: {instructions} instructions in {seconds:.1} s, {:.0} M/s",
        instructions as f64 / 1e6 / seconds
    );
    let second = boot();
    assert_eq!(second["instructions"], first["instructions"]);
    assert_eq!(second["console"]["text"], first["console"]["text"]);
}
