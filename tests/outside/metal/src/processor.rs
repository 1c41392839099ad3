//! The processor of kvm-ops-cpu over one page of code.

use core::cell::UnsafeCell;
use core::ptr::NonNull;

use alloc::boxed::Box;
use kvm_ops_cpu::{Access, Bus, CodePages, Cpu, CpuidTable, FRAME, Frame, Mapping, Stopped};

/// One page of memory, at every guest-physical address.
struct Page(Box<UnsafeCell<Bytes>>);

#[repr(align(4096))]
struct Bytes([u8; FRAME]);

impl Bus for Page {
    fn map(&mut self, _: u64, _: Access) -> Mapping {
        let host = NonNull::new(self.0.get().cast()).expect("a box is not null");
        // SAFETY: the page lives as long as the bus, and only the processor uses it.
        Mapping::Frame(unsafe { Frame::new(host, true) })
    }

    fn read(&mut self, _: u64, _: &mut [u8]) -> bool {
        false
    }

    fn write(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
        None
    }

    fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
        None
    }
}

/// The number of instructions after which a processor that starts with this code, at its reset
/// vector, halts.
pub fn halts_after(code: [u8; 16]) -> Option<u64> {
    let mut page = Bytes([0x90; FRAME]);
    page.0[FRAME - code.len()..].copy_from_slice(&code);
    let bus = Page(Box::new(UnsafeCell::new(page)));
    let mut cpu = Cpu::new(Box::new(bus), CodePages::new(1), CpuidTable::intel());
    (cpu.run(100) == Stopped::Halted).then(|| cpu.retired())
}
