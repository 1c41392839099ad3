//! Events: eventfds as interrupts and as devices, and routes.

use crate::layout::layout;
use crate::{U32, U64};

layout! {
    /// `struct kvm_irqfd`.
    Irqfd 32 { 0 fd: U32, 4 gsi: U32, 8 flags: U32, 12 resamplefd: U32, 16 pad: [u8; 16], }
}

/// Bits of [`Irqfd`]'s `flags`.
pub mod irqfd_flags {
    /// Takes it away.
    pub const DEASSIGN: u32 = 1;
    /// The line is a level, which the end of the interrupt takes back and tells `resamplefd`.
    pub const RESAMPLE: u32 = 2;
}

layout! {
    /// `struct kvm_ioeventfd`.
    IoEventFd 64 { 0 datamatch: U64, 8 addr: U64, 16 len: U32, 20 fd: U32, 24 flags: U32, 28 pad: [u8; 36], }
}

/// Bits of [`IoEventFd`]'s `flags`.
pub mod ioeventfd_flags {
    /// Only writes of `datamatch` count.
    pub const DATAMATCH: u32 = 1;
    /// The address is a port.
    pub const PIO: u32 = 2;
    /// Takes it away.
    pub const DEASSIGN: u32 = 4;
    /// A bus of another architecture.
    pub const VIRTIO_CCW_NOTIFY: u32 = 8;
    /// All of them.
    pub const ALL: u32 = DATAMATCH | PIO | DEASSIGN | VIRTIO_CCW_NOTIFY;
}

/// The most devices, of which each ioeventfd is one, on a bus.
pub const MAX_BUS_DEVICES: usize = 1000;

layout! {
    /// The route of an [`IrqRoutingEntry`](crate::vm::IrqRoutingEntry) to an input of an interrupt controller.
    IrqchipRoute 8 { 0 irqchip: U32, 4 pin: U32, }
}

layout! {
    /// The route to an interrupt message.
    MsiRoute 16 { 0 address_lo: U32, 4 address_hi: U32, 8 data: U32, 12 devid: U32, }
}

/// Values of an entry's `kind`.
pub mod route_type {
    /// [`IrqchipRoute`](super::IrqchipRoute).
    pub const IRQCHIP: u32 = 1;
    /// [`MsiRoute`](super::MsiRoute).
    pub const MSI: u32 = 2;
}

/// The flag of messages and of routes to them: `devid` counts, which x86 passes over.
pub const MSI_VALID_DEVID: u32 = 1;

layout! {
    /// `struct kvm_coalesced_mmio_zone`.
    CoalescedMmioZone 16 { 0 addr: U64, 8 size: U32, 12 pio: U32, }
}

layout! {
    /// `struct kvm_coalesced_mmio`: a write that waits in the ring.
    CoalescedMmio 24 { 0 phys_addr: U64, 8 len: U32, 12 pio: U32, 16 data: [u8; 8], }
}

layout! {
    /// The numbers in front of `struct kvm_coalesced_mmio_ring`: the first write that waits, and the first free place.
    CoalescedMmioRing 8 { 0 first: U32, 4 last: U32, }
}

/// Places for writes in the ring. One stays free.
pub const COALESCED_MMIO_MAX: u32 =
    ((4096 - size_of::<CoalescedMmioRing>()) / size_of::<CoalescedMmio>()) as u32;

/// Flags of `KVM_CAP_X2APIC_API`.
pub mod x2apic_flags {
    /// Destinations of messages, and numbers of local APICs in their registers, have 32 bits.
    pub const USE_32BIT_IDS: u64 = 1;
    /// Number 0xff is no broadcast in x2APIC mode.
    pub const DISABLE_BROADCAST_QUIRK: u64 = 2;
    /// Both.
    pub const ALL: u64 = USE_32BIT_IDS | DISABLE_BROADCAST_QUIRK;
}
