//! Small static programs for x86-64 Linux, assembled here.

use iced_x86::code_asm::*;

use crate::init::End;

/// Numbers of system calls (Linux arch/x86/entry/syscalls/syscall_64.tbl).
pub(crate) mod call {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const OPEN: u32 = 2;
    pub(crate) const CLOSE: u32 = 3;
    pub(crate) const IOCTL: u32 = 16;
    pub(crate) const UNAME: u32 = 63;
    pub(crate) const MKDIR: u32 = 83;
    pub(crate) const MOUNT: u32 = 165;
    pub(crate) const UMOUNT2: u32 = 166;
    pub(crate) const REBOOT: u32 = 169;
    pub(crate) const FINIT_MODULE: u32 = 313;
}

/// The address at which a program is loaded, with its headers.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const START: u64 = BASE + ELF_HEADER + PROGRAM_HEADER;
/// Memory that is zeros at the start.
const BUFFER: u64 = BASE + 0x10_0000;
/// Where hexadecimal digits are made.
const DIGITS: u64 = BUFFER + 0x10_0000;
const BYTES: u64 = 0x40_0000;

const STDOUT: u64 = 1;

/// Flags of open(2).
pub(crate) mod open {
    pub(crate) const READ: u64 = 0;
    pub(crate) const WRITE: u64 = 1;
    pub(crate) const BOTH: u64 = 2;
    /// To be written, and made if it is not there.
    pub(crate) const MAKE: u64 = 0o101;
}

/// An argument of a system call. RBX is kept by all calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    Number(u64),
    /// The address of a text that ends with a zero.
    Text(&'a str),
    /// An offset in the program's memory.
    Buffer(u64),
    Rbx,
    Rdx,
}

/// A program under construction.
pub(crate) struct Program {
    code: CodeAssembler,
    texts: Vec<(CodeLabel, Vec<u8>)>,
}

/// Nothing that is assembled here has an operand that does not exist.
const ENCODES: &str = "the instruction has an encoding";

/// Adds instructions to a program.
macro_rules! asm {
    ($a:expr; $($name:ident $($arg:expr),*;)*) => {{ $($a.$name($($arg),*).expect(ENCODES);)* }};
}

impl Program {
    pub(crate) fn new() -> Self {
        Self {
            code: CodeAssembler::new(64).expect(ENCODES),
            texts: Vec::new(),
        }
    }

    fn text(&mut self, text: &[u8]) -> CodeLabel {
        let label = self.code.create_label();
        self.texts.push((label, text.to_vec()));
        label
    }

    /// Makes a system call. Its result is in RAX.
    pub(crate) fn call(&mut self, nr: u32, args: &[Arg<'_>]) {
        for (place, arg) in [rdi, rsi, rdx, r10, r8].into_iter().zip(args) {
            self.load(place, *arg);
        }
        asm!(self.code; mov eax, nr; syscall;);
    }

    fn load(&mut self, place: AsmRegister64, arg: Arg<'_>) {
        match arg {
            Arg::Number(value) => asm!(self.code; mov place, value;),
            Arg::Text(text) => {
                let label = self.text(&[text.as_bytes(), b"\0"].concat());
                asm!(self.code; lea place, ptr(label););
            }
            Arg::Buffer(offset) => asm!(self.code; mov place, BUFFER + offset;),
            Arg::Rbx => asm!(self.code; mov place, rbx;),
            Arg::Rdx => asm!(self.code; mov place, rdx;),
        }
    }

    /// Writes a text to the file that is open.
    pub(crate) fn write(&mut self, text: &str) {
        let len = Arg::Number(text.len() as u64);
        self.call(call::WRITE, &[Arg::Rbx, Arg::Text(text), len]);
    }

    /// Writes a text to the console.
    pub(crate) fn say(&mut self, text: &str) {
        let len = Arg::Number(text.len() as u64);
        self.call(call::WRITE, &[Arg::Number(STDOUT), Arg::Text(text), len]);
    }

    /// Writes the text at an offset, which ends with a zero, and ends the line.
    pub(crate) fn say_buffer(&mut self, offset: u64) {
        let (mut next, mut end) = (self.code.create_label(), self.code.create_label());
        asm!(self.code; mov rsi, BUFFER + offset; xor edx, edx;);
        self.code.set_label(&mut next).expect(ENCODES);
        asm!(self.code; cmp byte_ptr(rsi + rdx), 0; je end; inc edx; jmp next;);
        self.code.set_label(&mut end).expect(ENCODES);
        asm!(self.code; mov byte_ptr(rsi + rdx), 10; inc edx;);
        self.call(
            call::WRITE,
            &[Arg::Number(STDOUT), Arg::Buffer(offset), Arg::Rdx],
        );
    }

    /// Opens a file. RBX holds it.
    pub(crate) fn open(&mut self, path: &str, how: u64) {
        let mode = Arg::Number(0o644);
        self.call(call::OPEN, &[Arg::Text(path), Arg::Number(how), mode]);
        asm!(self.code; mov rbx, rax;);
    }

    pub(crate) fn close(&mut self) {
        self.call(call::CLOSE, &[Arg::Rbx]);
    }

    /// Writes a file to the console.
    pub(crate) fn cat(&mut self, path: &str) {
        self.open(path, open::READ);
        let (mut next, mut end) = (self.code.create_label(), self.code.create_label());
        self.code.set_label(&mut next).expect(ENCODES);
        let piece = [Arg::Rbx, Arg::Buffer(0), Arg::Number(4096)];
        self.call(call::READ, &piece);
        asm!(self.code; test eax, eax; jle end; mov rdx, rax;);
        self.call(
            call::WRITE,
            &[Arg::Number(STDOUT), Arg::Buffer(0), Arg::Rdx],
        );
        asm!(self.code; jmp next;);
        self.code.set_label(&mut end).expect(ENCODES);
        self.close();
    }

    /// Reads a file up to its end into the memory from an offset on. RBP holds the offset behind it.
    pub(crate) fn read(&mut self, path: &str, offset: u64) {
        self.open(path, open::READ);
        let (mut next, mut end) = (self.code.create_label(), self.code.create_label());
        asm!(self.code; mov rbp, BUFFER + offset;);
        self.code.set_label(&mut next).expect(ENCODES);
        asm!(self.code;
            mov rdi, rbx; mov rsi, rbp; mov edx, 0x1_0000; mov eax, call::READ; syscall;
            test eax, eax; jle end; add rbp, rax; jmp next;
        );
        self.code.set_label(&mut end).expect(ENCODES);
        self.close();
    }

    /// Writes the memory from an offset up to what RBP holds into a new file.
    pub(crate) fn save(&mut self, path: &str, offset: u64) {
        self.open(path, open::MAKE);
        asm!(self.code; mov rdx, rbp; mov rax, BUFFER + offset; sub rdx, rax;);
        self.call(call::WRITE, &[Arg::Rbx, Arg::Buffer(offset), Arg::Rdx]);
        self.close();
    }

    /// Prints the memory from an offset up to what RBP holds, a line of hexadecimal digits behind a title.
    pub(crate) fn print_hex(&mut self, title: &str, offset: u64) {
        self.say(title);
        let (mut next, mut end) = (self.code.create_label(), self.code.create_label());
        let digits = self.text(b"0123456789abcdef");
        asm!(self.code; mov rsi, BUFFER + offset; mov rdi, DIGITS; lea rbx, ptr(digits););
        self.code.set_label(&mut next).expect(ENCODES);
        asm!(self.code;
            cmp rsi, rbp; jae end;
            movzx eax, byte_ptr(rsi); mov edx, eax; shr eax, 4; and edx, 15;
            mov al, byte_ptr(rbx + rax); mov byte_ptr(rdi), al;
            mov dl, byte_ptr(rbx + rdx); mov byte_ptr(rdi + 1), dl;
            inc rsi; add rdi, 2; jmp next;
        );
        self.code.set_label(&mut end).expect(ENCODES);
        asm!(self.code; mov byte_ptr(rdi), 10; lea rdx, rdi + 1; mov rax, DIGITS; sub rdx, rax;);
        let digits = Arg::Buffer(DIGITS - BUFFER);
        self.call(call::WRITE, &[Arg::Number(STDOUT), digits, Arg::Rdx]);
    }

    /// Leaves the bytes at the end of what was read out that equal `byte`.
    pub(crate) fn trim(&mut self, byte: u32, offset: u64) {
        let (mut next, mut end) = (self.code.create_label(), self.code.create_label());
        asm!(self.code; mov rsi, BUFFER + offset;);
        self.code.set_label(&mut next).expect(ENCODES);
        asm!(self.code; cmp rbp, rsi; jbe end; cmp byte_ptr(rbp - 1), byte; jne end; dec rbp; jmp next;);
        self.code.set_label(&mut end).expect(ENCODES);
    }

    /// Fills memory with a byte.
    pub(crate) fn fill(&mut self, offset: u64, byte: u32, bytes: u32) {
        asm!(self.code; mov rdi, BUFFER + offset; mov eax, byte; mov ecx, bytes;);
        self.code.rep().stosb().expect(ENCODES);
    }

    /// Stores 8 bytes at an offset.
    pub(crate) fn put(&mut self, offset: u64, value: Arg<'_>) {
        self.load(rax, value);
        asm!(self.code; mov rdi, BUFFER + offset; mov qword_ptr(rdi), rax;);
    }

    /// RBP holds that offset.
    pub(crate) fn end_at(&mut self, offset: u64) {
        asm!(self.code; mov rbp, BUFFER + offset;);
    }

    /// Mounts a file system without a device. The directory is made.
    pub(crate) fn mount(&mut self, kind: &str, at: &str) {
        self.mount_from(kind, kind, at);
    }

    /// Mounts the file system on a device. The directory is made.
    pub(crate) fn mount_from(&mut self, device: &str, kind: &str, at: &str) {
        self.call(call::MKDIR, &[Arg::Text(at), Arg::Number(0o755)]);
        let (device, at, kind) = (Arg::Text(device), Arg::Text(at), Arg::Text(kind));
        let none = Arg::Number(0);
        self.call(call::MOUNT, &[device, at, kind, none, none]);
    }

    pub(crate) fn unmount(&mut self, at: &str) {
        self.call(call::UMOUNT2, &[Arg::Text(at), Arg::Number(0)]);
    }

    /// Loads modules of the kernel, compressed files, in that order.
    pub(crate) fn load_modules(&mut self, paths: &[String]) {
        for path in paths {
            self.load_module(path);
        }
    }

    fn load_module(&mut self, path: &str) {
        const COMPRESSED: u64 = 4;
        self.open(path, open::READ);
        self.call(
            call::FINIT_MODULE,
            &[Arg::Rbx, Arg::Text(""), Arg::Number(COMPRESSED)],
        );
        self.close();
    }

    /// Waits until the console has printed everything, and ends the machine with that command of reboot(2). Returns the
    /// file of the program.
    pub(crate) fn finish(mut self, end: End) -> Vec<u8> {
        const TCSBRK: u64 = 0x5409;
        const MAGIC: [u64; 2] = [0xfee1_dead, 672_274_793];
        let drain = [STDOUT, TCSBRK, 1].map(Arg::Number);
        self.call(call::IOCTL, &drain);
        self.call(
            call::REBOOT,
            &[MAGIC[0], MAGIC[1], end as u64].map(Arg::Number),
        );
        let mut here = self.code.create_label();
        self.code.set_label(&mut here).expect(ENCODES);
        asm!(self.code; jmp here;);
        for (mut label, text) in std::mem::take(&mut self.texts) {
            self.code.set_label(&mut label).expect(ENCODES);
            self.code.db(&text).expect(ENCODES);
        }
        elf(&self.code.assemble(START).expect(ENCODES))
    }
}

/// An executable whose one segment is the headers and this code, and memory behind them.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = START - BASE + code.len() as u64;
    // ELF64, little-endian, version 1; an executable for x86-64.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [START, ELF_HEADER, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0; 4]);
    for half in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // One segment: loaded, and readable, writable and executable.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [0, BASE, BASE, size, BYTES, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}
