//! The vCPU of a normal VM: the port's vCPU under the name of a technology.

use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;

use crate::guest::GuestProgram;
use crate::{
    Arc, CpuId, CpuidEntry, DescTable, EncCmd, Exception, Exit, Hpa, Kick, Regs, Result, Segment,
    SegmentName, VcpuId, VcpuOps,
};

/// A vCPU of a normal VM of technology `T`: every operation goes to the port's vCPU, which is the
/// processor itself or answers as it does.
///
/// It is a type of its own, and not `P`, because the variants of an enum of back ends must be
/// told apart by their types.
pub struct PlainVcpu<P, T> {
    port: P,
    tech: PhantomData<fn() -> T>,
}

impl<P, T> PlainVcpu<P, T> {
    /// Wraps the port's vCPU.
    #[inline]
    pub const fn new(port: P) -> Self {
        Self {
            port,
            tech: PhantomData,
        }
    }

    /// The vCPU below, for what only its platform offers.
    #[inline]
    pub fn port(&self) -> &P {
        &self.port
    }

    /// The vCPU below, for what only its platform offers.
    #[inline]
    pub fn port_mut(&mut self) -> &mut P {
        &mut self.port
    }
}

impl<P: fmt::Debug, T> fmt::Debug for PlainVcpu<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.port.fmt(f)
    }
}

macro_rules! forward {
    ($( fn $name:ident(&$($m:ident)? $(, $arg:ident: $ty:ty)*) $(-> $ret:ty)?; )*) => {
        impl<P: VcpuOps, T> VcpuOps for PlainVcpu<P, T> {
            fn vcpu_free(self) -> Result<()> {
                self.port.vcpu_free()
            }

            $( forward!(@method [$($m)?] $name ($($arg: $ty),*) ($($ret)?)); )*
        }

        /// What is forwarded, so that a test can see that nothing is left out.
        #[cfg(test)]
        const FORWARDED: &[&str] = &["vcpu_free", $(stringify!($name)),*];
    };
    (@method [] $name:ident ($($arg:ident: $ty:ty),*) ($($ret:ty)?)) => {
        #[inline]
        fn $name(&self, $($arg: $ty),*) $(-> $ret)? { self.port.$name($($arg),*) }
    };
    (@method [mut] $name:ident ($($arg:ident: $ty:ty),*) ($($ret:ty)?)) => {
        #[inline]
        fn $name(&mut self, $($arg: $ty),*) $(-> $ret)? { self.port.$name($($arg),*) }
    };
}

forward! {
    fn id(&) -> VcpuId;
    fn vcpu_run(&mut) -> Result<Exit<'_>>;
    fn kick_handle(&) -> Arc<dyn Kick>;
    fn vcpu_reset(&mut, init_event: bool) -> Result<()>;
    fn vcpu_load(&mut, cpu: CpuId) -> Result<()>;
    fn vcpu_put(&mut);
    fn vcpu_mem_enc_op(&mut, cmd: &mut EncCmd<'_>) -> Result<()>;
    fn load_program(&mut, program: Box<dyn GuestProgram>) -> Result<()>;
    fn get_regs(&) -> Result<Regs>;
    fn set_regs(&mut, regs: &Regs) -> Result<()>;
    fn set_cpuid(&mut, entries: &[CpuidEntry]) -> Result<()>;
    fn get_msr(&, index: u32) -> Result<u64>;
    fn set_msr(&mut, index: u32, value: u64) -> Result<()>;
    fn set_efer(&mut, value: u64) -> Result<()>;
    fn get_segment_base(&, segment: SegmentName) -> Result<u64>;
    fn get_segment(&, segment: SegmentName) -> Result<Segment>;
    fn set_segment(&mut, segment: SegmentName, value: &Segment) -> Result<()>;
    fn get_cpl(&) -> Result<u8>;
    fn get_cs_db_l_bits(&) -> Result<(bool, bool)>;
    fn is_valid_cr0(&, value: u64) -> bool;
    fn is_valid_cr4(&, value: u64) -> bool;
    fn set_cr0(&mut, value: u64) -> Result<()>;
    fn set_cr4(&mut, value: u64) -> Result<()>;
    fn get_idt(&) -> Result<DescTable>;
    fn set_idt(&mut, table: DescTable) -> Result<()>;
    fn get_gdt(&) -> Result<DescTable>;
    fn set_gdt(&mut, table: DescTable) -> Result<()>;
    fn set_dr7(&mut, value: u64) -> Result<()>;
    fn get_rflags(&) -> Result<u64>;
    fn set_rflags(&mut, value: u64) -> Result<()>;
    fn get_if_flag(&) -> Result<bool>;
    fn set_guest_debug(&mut, debug: bool, single_step: bool) -> Result<()>;
    fn load_mmu_pgd(&mut, root: Hpa, levels: u8) -> Result<()>;
    fn inject_irq(&mut, vector: u8) -> Result<()>;
    fn inject_nmi(&mut) -> Result<()>;
    fn inject_exception(&mut, exception: Exception) -> Result<()>;
    fn cancel_injection(&mut) -> Result<()>;
    fn interrupt_allowed(&) -> Result<bool>;
    fn nmi_allowed(&) -> Result<bool>;
    fn get_nmi_mask(&) -> Result<bool>;
    fn set_nmi_mask(&mut, masked: bool) -> Result<()>;
    fn enable_irq_window(&mut) -> Result<()>;
    fn get_interrupt_shadow(&) -> Result<u32>;
    fn set_interrupt_shadow(&mut, shadow: u32) -> Result<()>;
    fn write_tsc_offset(&mut, offset: u64) -> Result<()>;
    fn write_tsc_multiplier(&mut, khz: u32) -> Result<()>;
    fn setup_mce(&mut, mcg_cap: u64) -> Result<()>;
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::FORWARDED;
    use std::vec::Vec;

    #[test]
    fn every_method_of_the_trait_is_forwarded() {
        let text = include_str!("backend_enum.rs");
        let vcpu = &text[text.find("pub trait VcpuOps").unwrap()..];
        let declared: Vec<&str> = vcpu
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("fn "))
            .map(|rest| rest.split('(').next().unwrap())
            .collect();
        assert!(declared.len() > 40);
        for name in &declared {
            assert!(FORWARDED.contains(name), "{name} is not forwarded");
        }
        assert_eq!(declared.len(), FORWARDED.len());
    }
}
