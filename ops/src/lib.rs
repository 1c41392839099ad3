#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

extern crate alloc;
// The test kit and the docs name the crate as users do.
extern crate self as kvm_ops_core;

#[macro_use]
mod error;

mod addr;
mod asids;
mod backend;
mod backend_enum;
mod diagnosis;
mod enc;
mod exit;
mod field_cache;
pub mod guest;
mod ids;
mod keys;
mod kick;
#[cfg(feature = "kit")]
pub mod kit;
mod leak;
mod life;
mod main_c;
pub mod moves;
mod page;
mod page_account;
mod params;
mod plain;
mod plain_vcpu;
mod port;
mod serial;
mod slot;
mod spte;
mod state;
mod step;
mod tech;
mod token;
mod vcpu_ops;
mod vm_ops;
pub mod volatile;

#[doc(no_inline)]
pub use alloc::boxed::Box;
#[doc(no_inline)]
pub use alloc::sync::Arc;

pub use addr::{Gfn, Gpa, Hpa, Level, PAGE_SIZE, Pfn, Privacy, SharedMask};
pub use asids::{AsidLease, AsidPools, SnpAsids};
pub use backend::Backend;
pub use diagnosis::{Diagnosis, FirmwareCall};
pub use enc::{EncCmd, EncRegion, InitialPage, InitialPageKind, Measurement};
pub use error::{Call, Error, Field, Missing, OpName, Result};
pub use exit::{Answer, Exit, ExitKind, TdxRequest};
pub use field_cache::FieldCache;
pub use ids::{Asid, CpuId, Hkid, PackageId, SlotId, VcpuId, VmId};
pub use keys::{KeyLease, KeyPool};
pub use kick::Kick;
pub use leak::{FreeReport, Leak, Leaked};
pub use life::Life;
pub use main_c::{Class, Fate, LINUX_7_3, MAIN_C, MainCChange, MainCOp};
pub use page::Page;
pub use page_account::{PageAccount, PageTotals};
pub use params::{EncParams, Gpaw, Irqchip, MAX_VCPUS, PreboundTd, SevParams, TdParams, VmParams};
pub use plain::{PlainTech, PlainVm, VmIds};
pub use plain_vcpu::PlainVcpu;
pub use port::{
    DevicePort, Fault, FaultInjector, FaultPlan, GuestResponse, HeldFailure, HeldPort, Host,
    HostEvent, InjectedHost, IoEvent, IoEventMatch, IrqEvent, Msi, NestedFaultAnswer, NestedFaults,
    NoPort, PagePort, Programs, PspPort, Runs, SeamPort, SeamRegs, SevPort, SharedMemory, TdPort,
    VmPort,
};
pub use serial::PortId;
pub use slot::{HostRange, MemSlot, PrivateBacking, SlotFlags};
pub use spte::{PrivateSpte, SpteChange, TableRoot};
pub use state::{
    CodeSize, CpuidEntry, DebugRegs, Delivery, DescTable, Events, Exception, GuestDebug, Interrupt,
    InterruptShadow, MpState, Msr, Nmi, Regs, Segment, SegmentName, Smi, Sregs, TdApic,
    TdVcpuState, Xcrs, Xsave, cr0, cr4, rflags,
};
pub use step::Step;
pub use tech::{Tech, Vendor};
pub use token::{Drained, KeyReleased};
pub use vcpu_ops::VcpuOps;
pub use vm_ops::VmOps;

// For the code that `backend_enum!` and the traits write.
#[doc(hidden)]
pub use backend::other_technology;
#[doc(hidden)]
pub use enum_dispatch::enum_dispatch;
#[doc(hidden)]
pub use kvm_ops_macros::{__vanish, dispatchable};
/// Signatures of dispatchable traits name their types from here.
#[doc(hidden)]
pub mod __root {
    pub use crate::*;
}
