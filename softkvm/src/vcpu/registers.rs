//! Registers, as user space sets and reads them.

use std::collections::BTreeMap;

use kvm_ops_uapi::state::{Dtable, MpState, Regs, Segment, Sregs, mp_state};
use kvm_ops_uapi::system::{CpuidEntry2, vm_type};
use kvm_ops_uapi::{Errno, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::file::VcpuFile;
use crate::refusal::Result;
use crate::system::lists::{MSRS, each_msr};
use crate::{Process, Refusal, tdx};

pub(super) struct Registers {
    pub(super) cpuid: Vec<CpuidEntry2>,
    pub(super) has_run: bool,
    pub(super) mp_state: u32,
    regs: Regs,
    sregs: Sregs,
    msrs: BTreeMap<u32, u64>,
}

impl Registers {
    /// The state after power-on (SDM vol. 3, table 11-1).
    pub(super) fn new(mp_state: u32) -> Self {
        let segment = |kind: u8, s: u8| Segment {
            limit: U32::new(0xffff),
            kind,
            present: 1,
            s,
            ..Segment::default()
        };
        let data = segment(3, 1);
        let table = Dtable {
            limit: U16::new(0xffff),
            ..Dtable::default()
        };
        Self {
            cpuid: Vec::new(),
            has_run: false,
            mp_state,
            regs: Regs {
                rip: U64::new(0xfff0),
                rflags: U64::new(2),
                ..Regs::default()
            },
            sregs: Sregs {
                cs: Segment {
                    base: U64::new(0xffff_0000),
                    selector: U16::new(0xf000),
                    ..segment(0xb, 1)
                },
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr: segment(0xb, 0),
                ldt: segment(2, 0),
                gdt: table,
                idt: table,
                cr0: U64::new(0x6000_0010),
                apic_base: U64::new(0xfee0_0900),
                ..Sregs::default()
            },
            msrs: MSRS.into_iter().collect(),
        }
    }
}

/// The group of registers is the guest's secret: types 3 and 4 once it is measured, type 5 always, for no TD
/// is under debug.
fn require_readable(file: &VcpuFile) -> Result<()> {
    let is_secret = match file.vm.kind() {
        vm_type::TDX => true,
        _ => file.vm.has_protected_state() && file.vm.lock().sev.is_protected(file.vcpu.id),
    };
    if is_secret {
        return Err(Errno::EINVAL.into());
    }
    Ok(())
}

fn read<T: FromBytes + FromZeros + IntoBytes>(process: &dyn Process, address: u64) -> Result<T> {
    let mut value = T::new_zeroed();
    let read = process.read(address, value.as_mut_bytes());
    read.map_err(|_| Errno::EFAULT)?;
    Ok(value)
}

fn write<T: IntoBytes + Immutable>(process: &dyn Process, address: u64, value: &T) -> Result<i64> {
    let written = process.write(address, value.as_bytes());
    written
        .map(|()| 0)
        .map_err(|_| Refusal::from(Errno::EFAULT))
}

pub(super) fn get_regs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let regs = file.vcpu.lock().regs;
    write(process, argument, &regs)
}

pub(super) fn set_regs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut regs: Regs = read(process, argument)?;
    require_readable(file)?;
    // Bit 1 is always set.
    regs.rflags = U64::new(regs.rflags.get() | 2);
    file.vcpu.lock().regs = regs;
    Ok(0)
}

pub(super) fn get_sregs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let sregs = file.vcpu.lock().sregs;
    write(process, argument, &sregs)
}

/// EFER's bits: SCE, LME, LMA, NXE, and AMD's SVME, LMSLE, FFXSR.
const EFER_BITS: u64 = 0x1 | 0x7d << 8;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const CR0_PG: u64 = 1 << 31;
const CR0_PE: u64 = 1;
const CR4_PAE: u64 = 1 << 5;

/// The rules between control registers that an entry would fail by.
fn are_consistent(sregs: &Sregs) -> bool {
    let (cr0, cr4, efer) = (sregs.cr0.get(), sregs.cr4.get(), sregs.efer.get());
    let long = efer & EFER_LME != 0 && cr0 & CR0_PG != 0;
    let modes = if long {
        cr4 & CR4_PAE != 0 && efer & EFER_LMA != 0
    } else {
        efer & EFER_LMA == 0 && sregs.cs.l == 0
    };
    let paging = cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0;
    modes && paging && cr0 >> 32 == 0 && efer & !EFER_BITS == 0 && sregs.cr8.get() < 16
}

pub(super) fn set_sregs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let sregs: Sregs = read(process, argument)?;
    require_readable(file)?;
    if !are_consistent(&sregs) {
        return Err(Errno::EINVAL.into());
    }
    file.vcpu.lock().sregs = sregs;
    Ok(0)
}

pub(super) fn get_mp_state(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mp_state = U32::new(file.vcpu.lock().mp_state);
    write(process, argument, &MpState { mp_state })
}

pub(super) fn set_mp_state(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let state: MpState = read(process, argument)?;
    if state.mp_state.get() > mp_state::SIPI_RECEIVED {
        return Err(Errno::EINVAL.into());
    }
    file.vcpu.lock().mp_state = state.mp_state.get();
    Ok(0)
}

/// The value of an MSR that user space may read, or write.
fn msr(registers: &mut Registers, is_td: bool, index: u32, write: bool) -> Option<&mut u64> {
    match is_td {
        true => {
            tdx::has_emulated_msr(index, write).then(|| registers.msrs.entry(index).or_default())
        }
        false => registers.msrs.get_mut(&index),
    }
}

pub(super) fn get_msrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let is_td = file.vm.kind() == vm_type::TDX;
    let mut registers = file.vcpu.lock();
    each_msr(process, argument, |entry| {
        let value = msr(&mut registers, is_td, entry.index.get(), false);
        value.map(|value| entry.data = U64::new(*value)).is_some()
    })
}

pub(super) fn set_msrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let is_td = file.vm.kind() == vm_type::TDX;
    let mut registers = file.vcpu.lock();
    each_msr(process, argument, |entry| {
        let msr = msr(&mut registers, is_td, entry.index.get(), true);
        msr.map(|msr| *msr = entry.data.get()).is_some()
    })
}
