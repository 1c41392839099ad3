#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

// The trait text names everything `::kvm_ops::..`, so that it resolves in every crate that
// declares an enum of back ends; here too.
extern crate alloc;
extern crate self as kvm_ops;

#[macro_use]
mod backend_enum;

mod addr;
mod answers;
mod asids;
pub mod control;
mod enc;
mod error;
mod exit;
mod field_cache;
pub mod guest;
mod host;
mod ids;
mod keys;
mod kick;
#[cfg(feature = "kit")]
pub mod kit;
mod leak;
mod main_c;
mod params;
mod plain;
mod plain_vcpu;
mod slot;
mod spte;
mod state;
mod step;
mod tech;
mod token;
mod vm_ops;

pub use alloc::boxed::Box;
pub use alloc::sync::Arc;
pub use enum_dispatch::enum_dispatch;

pub use addr::{Gfn, Gpa, Hpa, Level, PAGE_SIZE, Pfn, Privacy, SharedMask};
pub use answers::{Class, FixedAnswer, VCPU_ANSWERS, VM_ANSWERS};
pub use asids::{AsidPools, SnpAsids};
pub use enc::{EncCmd, EncContext, EncRegion, EncTransfer, InitialPage, InitialPageKind};
pub use error::{Call, Error, Field, Missing, OpName, Result};
pub use exit::{Exit, ExitKind, TdxRequest};
pub use field_cache::FieldCache;
pub use host::{
    Host, NestedFaultAnswer, NestedFaults, NoPort, PagePort, PspPort, SeamPort, SeamRegs, VmPort,
};
pub use ids::{Asid, CpuId, Hkid, PackageId, SlotId, VcpuId, VmId};
pub use keys::KeyPool;
pub use kick::Kick;
pub use leak::{FreeReport, Leak, Leaked};
pub use main_c::{Fate, MAIN_C, MainCOp};
pub use params::{EncParams, Gpaw, Irqchip, MAX_VCPUS, SevParams, TdParams, VmParams};
pub use plain::{PlainVm, VmIds};
pub use plain_vcpu::PlainVcpu;
pub use slot::{HostRange, MemSlot, PrivateBacking, SlotFlags};
pub use spte::{PrivateSpte, SpteChange};
pub use state::{CpuidEntry, DescTable, Exception, Regs, Segment, SegmentName};
pub use step::Step;
pub use tech::{Tech, Vendor};
pub use token::{Drained, KeyReleased};
pub use vm_ops::{Backend, VcpuOps, VmOps};
