//! RDMSR and WRMSR of a TD: those that its MSR bitmaps let through are the processor's.

use kvm_ops_cpu::{Cpu, Exception, Exit as CpuExit};
use soft_tdx_module::MsrAccess;

use super::exits::{RAX, RCX, RDX, vm_exit};
use super::{Left, Processor};

/// The registers of the virtual APIC page: those that are none fault.
const X2APIC: core::ops::RangeInclusive<u32> = 0x800..=0x8ff;

const GP: u8 = 13;
const LOW: u64 = 0xffff_ffff;

impl Processor {
    pub(super) fn msr(&mut self, exit: CpuExit, access: MsrAccess) -> Left {
        let index = self.cpu.gpr(RCX) as u32;
        let exits = self.platform.guest_msr_exits(self.tdvpr, index, access);
        if exits != Some(false) {
            return self.play(vm_exit(&self.cpu, &exit), Some(exit));
        }
        let done = match access {
            MsrAccess::Read => self.read(index),
            MsrAccess::Write => self.write(index),
        };
        match done {
            Some(()) => self.cpu.skip(&exit),
            None => self.raise(Exception::with_code(GP, 0))?,
        }
        Ok(None)
    }

    fn read(&mut self, index: u32) -> Option<()> {
        let value = match is_the_processors(index) {
            true => self.cpu.read_msr(index)?,
            false => self.kept_msr(index),
        };
        self.cpu.set_gpr(RAX, value & LOW);
        self.cpu.set_gpr(RDX, value >> 32);
        Some(())
    }

    fn write(&mut self, index: u32) -> Option<()> {
        let value = self.cpu.gpr(RDX) << 32 | self.cpu.gpr(RAX) & LOW;
        if is_the_processors(index) {
            return self.cpu.write_msr(index, value);
        }
        // Of a command the value is not kept; nothing is there to be flushed.
        const COMMANDS: [u32; 2] = [0x49, 0x10b];
        if !COMMANDS.contains(&index) {
            self.keep_msr(index, value);
        }
        Some(())
    }

    /// An MSR that the processor does not have: it keeps what is written. The module has a place for most.
    fn kept_msr(&self, index: u32) -> u64 {
        let kept = field_of(index).and_then(|id| self.platform.processor_state(self.tdvpr, id));
        kept.unwrap_or_else(|| self.msrs.get(&index).copied().unwrap_or(0))
    }

    fn keep_msr(&mut self, index: u32, value: u64) {
        let is_kept = |id| self.platform.set_processor_state(self.tdvpr, id, value);
        if !field_of(index).is_some_and(is_kept) {
            self.msrs.insert(index, value);
        }
    }
}

/// The identifier of an MSR's field among a vCPU's, if there can be one.
const fn field_of(index: u32) -> Option<u64> {
    /// Class 19, with values of 8 bytes.
    const MSRS: u64 = 0x1320_0003_0000_0000;
    const HIGH: u32 = 0xc000_0000;
    match index {
        0..=0x1fff => Some(MSRS | index as u64),
        HIGH..=0xc000_1fff => Some(MSRS | 0x2000 | (index - HIGH) as u64),
        _ => None,
    }
}

fn is_the_processors(index: u32) -> bool {
    Cpu::has_msr(index) || X2APIC.contains(&index)
}
