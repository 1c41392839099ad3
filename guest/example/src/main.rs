//! A kernel of a confidential guest, in a TD and in an SNP guest alike: it takes memory into use, shares a page with the host,
//! prints, proves what it is, and switches off.
//!
//! It starts without firmware, at its 64-bit entry, as docs/guest-testing.md describes.

#![no_std]
#![no_main]

mod memory;
mod snp;
mod td;

use core::fmt::{self, Write};

use kvm_ops_guest::GpaRange;

use memory::Shared;
use snp::Snp;
use td::Td;

/// The memory that the kernel accepts. It shares the last page with the host; the others stay private.
const MEMORY: u64 = 0x80_0000;
const BYTES: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;

/// What the evidence repeats.
const DATA: [u8; 64] = [0x5a; 64];

/// The width of a TD's addresses; what an SNP guest has in its place is the number of the C-bit.
const TD_WIDTHS: [u64; 2] = [48, 52];
/// The serial line, and the port and value by which a Q35 is switched off.
const SERIAL: u16 = 0x3f8;
const POWER: u16 = 0x604;
const OFF: u16 = 1 << 13;

/// A technology.
trait Guest: Write {
    const NAME: &str;

    /// Takes memory into use, which the host has given at the start.
    fn accept(&mut self, range: GpaRange) -> Result<(), Failed>;
    /// Shares pages with the host.
    fn share(&mut self, range: GpaRange) -> Result<(), Failed>;
    /// Prints what the firmware says about this guest. `scratch` is memory that it may use for that.
    fn tell_evidence(&mut self, scratch: GpaRange) -> Result<(), Failed>;
    /// Asks the host to end this guest.
    fn switch_off(&mut self);
}

/// What went wrong, in a word.
#[derive(Debug)]
struct Failed(&'static str);

/// The entry, with the registers that it finds.
#[unsafe(no_mangle)]
extern "C" fn _start(_memory: u64, vcpu: u64, width: u64, secrets: u64, _cpuid: u64) {
    // A return halts a vCPU.
    if vcpu != 0 {
        return;
    }
    if TD_WIDTHS.contains(&width) {
        // SAFETY: a vCPU of a TD starts here, at privilege level 0, and no other runs.
        finish(unsafe { Td::new() });
    } else {
        // SAFETY: the first vCPU of an SNP guest starts here, at privilege level 0, with the address of its secrets page.
        finish(unsafe { Snp::new(secrets) });
    }
}

fn finish<G: Guest>(guest: Result<G, Failed>) {
    // Without a guest there is no way to print.
    let Ok(mut guest) = guest else { return };
    if let Err(Failed(what)) = run(&mut guest) {
        say(&mut guest, format_args!("failed: {what}"));
    }
    guest.switch_off();
}

/// What the kernel does in a guest of each technology.
fn run<G: Guest>(guest: &mut G) -> Result<(), Failed> {
    say(guest, format_args!("hello from {}", G::NAME));
    let range = |at, bytes| GpaRange::new(at, bytes).map_err(|_| Failed("a range"));
    guest.accept(range(MEMORY, BYTES)?)?;
    say(guest, format_args!("accepted {BYTES:#x} bytes"));

    let shared = range(MEMORY + BYTES - PAGE, PAGE)?;
    guest.share(shared)?;
    // SAFETY: the page is shared since now, and nothing else uses it.
    let mut page = unsafe { Shared::new(shared) };
    kvm_ops_guest::SharedBuffer::write(&mut page, 0, b"for the host to see");
    guest.tell_evidence(range(MEMORY, BYTES - PAGE)?)
}

fn say(to: &mut impl Write, line: fmt::Arguments<'_>) {
    // The ports of the technologies take every byte.
    let _ = writeln!(to, "{line}");
}

/// A digest as digits.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
