//! VMGEXIT with the GHCB MSR, PVALIDATE and RMPADJUST.

use crate::PageSize;
use crate::sev::{
    GhcbMsrPort, Pvalidate, PvalidatePort, RmpCode, Rmpadjust, RmpadjustPort, Validated,
};
use core::arch::asm;

/// The MSR that holds the GHCB's address or a value of the MSR protocol.
const SEV_GHCB: u32 = 0xC001_0130;

/// The GHCB MSR with VMGEXIT as a port.
#[derive(Debug)]
pub struct GhcbMsr(());

impl GhcbMsr {
    /// The port.
    ///
    /// # Safety
    /// * The code runs at privilege level 0 in an SEV-ES or SNP guest, with interrupts off and no
    ///   other user of the MSR, now and at every call.
    /// * Requests that take pages away name memory that nothing else of this guest uses.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

impl GhcbMsrPort for GhcbMsr {
    fn exchange(&mut self, request: u64) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: whoever made this port vouched for privilege level, guest and memory. WRMSR, VMGEXIT
        // (REP VMMCALL) and RDMSR change EAX and EDX only, as far as this guest's state goes: under
        // SEV-ES the host cannot change registers that the GHCB does not pass.
        unsafe {
            asm!(
                "wrmsr",
                ".byte 0xf3, 0x0f, 0x01, 0xd9",
                "rdmsr",
                in("ecx") SEV_GHCB,
                inout("eax") request as u32 => low,
                inout("edx") (request >> 32) as u32 => high,
            );
        }
        u64::from(high) << 32 | u64::from(low)
    }
}

/// PVALIDATE of the page that the linear address `address` maps.
///
/// # Safety
/// * The code runs at privilege level 0 and VMPL0 in an SNP guest.
/// * `address` is mapped as private, by a page of `size`, to memory that nothing else of this guest
///   uses: its contents become undefined.
#[must_use = "the result tells whether the page is the guest's"]
pub unsafe fn pvalidate(address: u64, size: PageSize, validate: bool) -> Validated {
    let (code, carry): (u64, u8);
    // SAFETY: the caller's duties are the instruction's.
    unsafe {
        asm!(
            ".byte 0xf2, 0x0f, 0x01, 0xff",
            "setc {carry}",
            carry = out(reg_byte) carry,
            inout("rax") address => code,
            in("ecx") operand(size),
            in("edx") u32::from(validate),
            options(nostack),
        );
    }
    Validated {
        // EAX: the upper half is not defined.
        code: RmpCode(code as u32),
        unchanged: carry != 0,
    }
}

/// RMPADJUST of the page that the linear address `address` maps; `rdx` as
/// [`Rmpadjust::operand`] makes it.
///
/// # Safety
/// * The code runs at privilege level 0 in an SNP guest, above the VMPL that `rdx` names.
/// * `address` is mapped as private, by a page of `size`; whoever runs at the VMPL may do with it
///   what `rdx` says.
#[must_use = "the code tells whether the permissions changed"]
pub unsafe fn rmpadjust(address: u64, size: PageSize, rdx: u64) -> RmpCode {
    let code: u64;
    // SAFETY: the caller's duties are the instruction's.
    unsafe {
        asm!(
            ".byte 0xf3, 0x0f, 0x01, 0xfe",
            inout("rax") address => code,
            in("rcx") u64::from(operand(size)),
            in("rdx") rdx,
            options(nostack),
        );
    }
    RmpCode(code as u32)
}

/// RCX of PVALIDATE and RMPADJUST. Their users never ask for 1 GiB.
const fn operand(size: PageSize) -> u32 {
    match size {
        PageSize::Size4K => 0,
        PageSize::Size2M | PageSize::Size1G => 1,
    }
}

/// The kernel's mapping of guest-physical memory as private.
pub trait Translate {
    /// The linear address at which the page at `gpa` is mapped as private, by a page of `size`: a
    /// mapping made for the instruction that follows.
    fn private(&self, gpa: u64, size: PageSize) -> u64;
}

/// All ports of an SNP guest.
#[derive(Debug)]
pub struct Snp<T> {
    msr: GhcbMsr,
    map: T,
}

impl<T: Translate> Snp<T> {
    /// The ports.
    ///
    /// # Safety
    /// * What [`GhcbMsr::new`], [`pvalidate`] and [`rmpadjust`] ask for holds at every call, for
    ///   every page that the ranges given to what uses these ports contain.
    /// * `map` answers truly.
    pub const unsafe fn new(map: T) -> Self {
        Self {
            msr: GhcbMsr(()),
            map,
        }
    }
}

impl<T: Translate> GhcbMsrPort for Snp<T> {
    fn exchange(&mut self, request: u64) -> u64 {
        self.msr.exchange(request)
    }
}

impl<T: Translate> PvalidatePort for Snp<T> {
    fn pvalidate(&mut self, operation: Pvalidate) -> Validated {
        let address = self.map.private(operation.gpa, operation.size);
        // SAFETY: whoever made this port vouched for it.
        unsafe { pvalidate(address, operation.size, operation.validate) }
    }
}

impl<T: Translate> RmpadjustPort for Snp<T> {
    fn rmpadjust(&mut self, operation: Rmpadjust) -> RmpCode {
        let address = self.map.private(operation.gpa, operation.size);
        // SAFETY: whoever made this port vouched for it.
        unsafe { rmpadjust(address, operation.size, operation.operand()) }
    }
}
