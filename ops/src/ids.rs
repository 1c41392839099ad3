//! Numbers that name things: VMs, vCPUs, processors, packages, KeyIDs and ASIDs.

use core::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $raw:ty, $label:literal) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $raw);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($label, "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id! {
    /// A VM, unique among the VMs of one host value.
    VmId, u64, "VmId"
}
id! {
    /// A vCPU's index in its VM, from 0. On KVM also its APIC id.
    VcpuId, u32, "VcpuId"
}
id! {
    /// A logical processor of the host.
    CpuId, u32, "CpuId"
}
id! {
    /// A processor package (socket). TDX configures and flushes a KeyID once per package.
    PackageId, u32, "PackageId"
}
id! {
    /// A memory slot of a VM.
    SlotId, u32, "SlotId"
}
id! {
    /// A TDX KeyID (HKID), the key that encrypts a TD's private memory.
    Hkid, u16, "Hkid"
}
id! {
    /// An SEV address-space identifier, which on AMD also selects the memory key.
    Asid, u32, "Asid"
}
