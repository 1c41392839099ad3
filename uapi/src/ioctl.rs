//! Numbers of ioctls, made from the structures that they carry, as `_IOC` of `asm-generic/ioctl.h`
//! makes them.

use crate::{irq, irqchip, memory, psp, sev, state, system, vm};

/// An ioctl: its number and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ioctl {
    number: u32,
    name: &'static str,
}

impl Ioctl {
    const fn new(name: &'static str, direction: u32, kind: u32, number: u32, size: usize) -> Self {
        assert!(size < 1 << 14);
        let number = direction << 30 | (size as u32) << 16 | kind << 8 | number;
        Self { number, name }
    }

    /// The number that `ioctl` takes.
    pub const fn number(self) -> u32 {
        self.number
    }

    /// The name in the kernel's header.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Bytes of the structure that the number tells of: 0 for a value.
    pub const fn size(self) -> usize {
        (self.number >> 16 & 0x3fff) as usize
    }

    /// The byte that tells which driver the number is for: 0xae for KVM.
    pub const fn kind(self) -> u8 {
        (self.number >> 8) as u8
    }

    /// The ioctl with this number. Bits above the lower 32 are the caller's to drop, as the kernel
    /// does.
    pub fn from_number(number: u32) -> Option<Self> {
        ALL.iter().copied().find(|ioctl| ioctl.number == number)
    }
}

/// The type byte of KVM's ioctls.
pub const KVMIO: u8 = 0xae;

macro_rules! ioctls {
    ($($kind:literal $number:literal $direction:ident $size:expr => $name:ident;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`.")]
            pub const $name: Ioctl =
                Ioctl::new(stringify!($name), ioctls!(@$direction), $kind, $number, $size);
        )*

        /// All of them.
        pub const ALL: &[Ioctl] = &[$($name),*];
    };
    (@none) => { 0 };
    (@w) => { 1 };
    (@r) => { 2 };
    (@rw) => { 3 };
}

ioctls! {
    0xae 0x00 none 0 => KVM_GET_API_VERSION;
    0xae 0x01 none 0 => KVM_CREATE_VM;
    0xae 0x02 rw size_of::<system::MsrList>() => KVM_GET_MSR_INDEX_LIST;
    0xae 0x03 none 0 => KVM_CHECK_EXTENSION;
    0xae 0x04 none 0 => KVM_GET_VCPU_MMAP_SIZE;
    0xae 0x05 rw size_of::<system::Cpuid2>() => KVM_GET_SUPPORTED_CPUID;
    0xae 0x09 rw size_of::<system::Cpuid2>() => KVM_GET_EMULATED_CPUID;
    0xae 0x0a rw size_of::<system::MsrList>() => KVM_GET_MSR_FEATURE_INDEX_LIST;
    0xae 0x41 none 0 => KVM_CREATE_VCPU;
    0xae 0x42 w size_of::<memory::DirtyLog>() => KVM_GET_DIRTY_LOG;
    0xae 0x44 none 0 => KVM_SET_NR_MMU_PAGES;
    0xae 0x45 none 0 => KVM_GET_NR_MMU_PAGES;
    0xae 0x46 w size_of::<memory::UserspaceMemoryRegion>() => KVM_SET_USER_MEMORY_REGION;
    0xae 0x47 none 0 => KVM_SET_TSS_ADDR;
    0xae 0x48 w 8 => KVM_SET_IDENTITY_MAP_ADDR;
    0xae 0x49 w size_of::<memory::UserspaceMemoryRegion2>() => KVM_SET_USER_MEMORY_REGION2;
    0xae 0x60 none 0 => KVM_CREATE_IRQCHIP;
    0xae 0x61 w size_of::<vm::IrqLevel>() => KVM_IRQ_LINE;
    0xae 0x62 rw size_of::<irqchip::Irqchip>() => KVM_GET_IRQCHIP;
    0xae 0x63 r size_of::<irqchip::Irqchip>() => KVM_SET_IRQCHIP;
    0xae 0x67 rw size_of::<vm::IrqLevel>() => KVM_IRQ_LINE_STATUS;
    0xae 0x67 w size_of::<irq::CoalescedMmioZone>() => KVM_REGISTER_COALESCED_MMIO;
    0xae 0x68 w size_of::<irq::CoalescedMmioZone>() => KVM_UNREGISTER_COALESCED_MMIO;
    0xae 0x6a w size_of::<vm::IrqRouting>() => KVM_SET_GSI_ROUTING;
    0xae 0x76 w size_of::<irq::Irqfd>() => KVM_IRQFD;
    0xae 0x77 w size_of::<vm::PitConfig>() => KVM_CREATE_PIT2;
    0xae 0x78 none 0 => KVM_SET_BOOT_CPU_ID;
    0xae 0x79 w size_of::<irq::IoEventFd>() => KVM_IOEVENTFD;
    0xae 0x7b w size_of::<vm::ClockData>() => KVM_SET_CLOCK;
    0xae 0x7c r size_of::<vm::ClockData>() => KVM_GET_CLOCK;
    0xae 0x80 none 0 => KVM_RUN;
    0xae 0x81 r size_of::<state::Regs>() => KVM_GET_REGS;
    0xae 0x82 w size_of::<state::Regs>() => KVM_SET_REGS;
    0xae 0x83 r size_of::<state::Sregs>() => KVM_GET_SREGS;
    0xae 0x84 w size_of::<state::Sregs>() => KVM_SET_SREGS;
    0xae 0x86 w size_of::<state::Interrupt>() => KVM_INTERRUPT;
    0xae 0x88 rw size_of::<system::Msrs>() => KVM_GET_MSRS;
    0xae 0x89 w size_of::<system::Msrs>() => KVM_SET_MSRS;
    0xae 0x8b w 4 => KVM_SET_SIGNAL_MASK;
    0xae 0x8c r size_of::<state::Fpu>() => KVM_GET_FPU;
    0xae 0x8d w size_of::<state::Fpu>() => KVM_SET_FPU;
    0xae 0x8e r size_of::<irqchip::LapicState>() => KVM_GET_LAPIC;
    0xae 0x8f w size_of::<irqchip::LapicState>() => KVM_SET_LAPIC;
    0xae 0x90 w size_of::<system::Cpuid2>() => KVM_SET_CPUID2;
    0xae 0x91 rw size_of::<system::Cpuid2>() => KVM_GET_CPUID2;
    0xae 0x92 rw size_of::<state::TprAccessCtl>() => KVM_TPR_ACCESS_REPORTING;
    0xae 0x93 w 8 => KVM_SET_VAPIC_ADDR;
    0xae 0x98 r size_of::<state::MpState>() => KVM_GET_MP_STATE;
    0xae 0x99 w size_of::<state::MpState>() => KVM_SET_MP_STATE;
    0xae 0x9a none 0 => KVM_NMI;
    0xae 0x9b w size_of::<state::GuestDebug>() => KVM_SET_GUEST_DEBUG;
    0xae 0x9c w 8 => KVM_X86_SETUP_MCE;
    0xae 0x9d r 8 => KVM_X86_GET_MCE_CAP_SUPPORTED;
    0xae 0x9f r size_of::<state::VcpuEvents>() => KVM_GET_VCPU_EVENTS;
    0xae 0x9f r size_of::<irqchip::PitState2>() => KVM_GET_PIT2;
    0xae 0xa0 w size_of::<irqchip::PitState2>() => KVM_SET_PIT2;
    0xae 0xa0 w size_of::<state::VcpuEvents>() => KVM_SET_VCPU_EVENTS;
    0xae 0xa1 r size_of::<state::DebugRegs>() => KVM_GET_DEBUGREGS;
    0xae 0xa2 w size_of::<state::DebugRegs>() => KVM_SET_DEBUGREGS;
    0xae 0xa2 none 0 => KVM_SET_TSC_KHZ;
    0xae 0xa3 none 0 => KVM_GET_TSC_KHZ;
    0xae 0xa3 w size_of::<vm::EnableCap>() => KVM_ENABLE_CAP;
    0xae 0xa4 r state::XSAVE_SIZE => KVM_GET_XSAVE;
    0xae 0xa5 w state::XSAVE_SIZE => KVM_SET_XSAVE;
    0xae 0xa5 w size_of::<vm::Msi>() => KVM_SIGNAL_MSI;
    0xae 0xa6 r size_of::<state::Xcrs>() => KVM_GET_XCRS;
    0xae 0xa7 w size_of::<state::Xcrs>() => KVM_SET_XCRS;
    0xae 0xab w size_of::<state::OneReg>() => KVM_GET_ONE_REG;
    0xae 0xac w size_of::<state::OneReg>() => KVM_SET_ONE_REG;
    0xae 0xad none 0 => KVM_KVMCLOCK_CTRL;
    0xae 0xb0 rw size_of::<state::RegList>() => KVM_GET_REG_LIST;
    0xae 0xba rw 8 => KVM_MEMORY_ENCRYPT_OP;
    0xae 0xbb r size_of::<sev::EncRegion>() => KVM_MEMORY_ENCRYPT_REG_REGION;
    0xae 0xbc r size_of::<sev::EncRegion>() => KVM_MEMORY_ENCRYPT_UNREG_REGION;
    0xae 0xc0 rw size_of::<memory::ClearDirtyLog>() => KVM_CLEAR_DIRTY_LOG;
    0xae 0xc6 w size_of::<vm::MsrFilter>() => KVM_X86_SET_MSR_FILTER;
    0xae 0xcc r size_of::<state::Sregs2>() => KVM_GET_SREGS2;
    0xae 0xcd w size_of::<state::Sregs2>() => KVM_SET_SREGS2;
    0xae 0xce none 0 => KVM_GET_STATS_FD;
    0xae 0xcf r state::XSAVE_SIZE => KVM_GET_XSAVE2;
    0xae 0xd2 w size_of::<memory::MemoryAttributes>() => KVM_SET_MEMORY_ATTRIBUTES;
    0xae 0xd4 rw size_of::<memory::CreateGuestMemfd>() => KVM_CREATE_GUEST_MEMFD;
    0xae 0xd5 rw size_of::<memory::PreFaultMemory>() => KVM_PRE_FAULT_MEMORY;
    0xae 0xe0 rw 12 => KVM_CREATE_DEVICE;
    0xae 0xe1 w size_of::<system::DeviceAttr>() => KVM_SET_DEVICE_ATTR;
    0xae 0xe2 w size_of::<system::DeviceAttr>() => KVM_GET_DEVICE_ATTR;
    0xae 0xe3 w size_of::<system::DeviceAttr>() => KVM_HAS_DEVICE_ATTR;
    0x53 0x00 rw size_of::<psp::IssueCmd>() => SEV_ISSUE_CMD;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Numbers as a program compiled against the kernel's headers prints them.
    #[test]
    fn numbers_are_those_of_the_kernels_headers() {
        for (ioctl, number) in [
            (KVM_CREATE_VM, 0xae01),
            (KVM_GET_SUPPORTED_CPUID, 0xc008_ae05),
            (KVM_GET_MSR_INDEX_LIST, 0xc004_ae02),
            (KVM_SET_USER_MEMORY_REGION, 0x4020_ae46),
            (KVM_SET_USER_MEMORY_REGION2, 0x40a0_ae49),
            (KVM_CREATE_GUEST_MEMFD, 0xc040_aed4),
            (KVM_SET_MEMORY_ATTRIBUTES, 0x4020_aed2),
            (KVM_PRE_FAULT_MEMORY, 0xc040_aed5),
            (KVM_ENABLE_CAP, 0x4068_aea3),
            (KVM_HAS_DEVICE_ATTR, 0x4018_aee3),
            (KVM_GET_DEVICE_ATTR, 0x4018_aee2),
            (KVM_MEMORY_ENCRYPT_OP, 0xc008_aeba),
            (KVM_MEMORY_ENCRYPT_REG_REGION, 0x8010_aebb),
            (KVM_MEMORY_ENCRYPT_UNREG_REGION, 0x8010_aebc),
            (KVM_GET_REGS, 0x8090_ae81),
            (KVM_SET_SREGS, 0x4138_ae84),
            (KVM_SET_CPUID2, 0x4008_ae90),
            (KVM_GET_MSRS, 0xc008_ae88),
            (KVM_GET_CLOCK, 0x8030_ae7c),
            (KVM_CREATE_PIT2, 0x4040_ae77),
            (KVM_SET_GSI_ROUTING, 0x4008_ae6a),
            (KVM_SIGNAL_MSI, 0x4020_aea5),
            (KVM_CREATE_DEVICE, 0xc00c_aee0),
            (KVM_GET_MP_STATE, 0x8004_ae98),
            (KVM_INTERRUPT, 0x4004_ae86),
            (KVM_SET_SIGNAL_MASK, 0x4004_ae8b),
            (KVM_SET_GUEST_DEBUG, 0x4048_ae9b),
            (KVM_GET_ONE_REG, 0x4010_aeab),
            (KVM_SET_ONE_REG, 0x4010_aeac),
            (KVM_GET_REG_LIST, 0xc008_aeb0),
            (KVM_GET_FPU, 0x81a0_ae8c),
            (KVM_SET_FPU, 0x41a0_ae8d),
            (KVM_GET_VCPU_EVENTS, 0x8040_ae9f),
            (KVM_SET_VCPU_EVENTS, 0x4040_aea0),
            (KVM_GET_DEBUGREGS, 0x8080_aea1),
            (KVM_SET_DEBUGREGS, 0x4080_aea2),
            (KVM_GET_XSAVE, 0x9000_aea4),
            (KVM_SET_XSAVE, 0x5000_aea5),
            (KVM_GET_XCRS, 0x8188_aea6),
            (KVM_SET_XCRS, 0x4188_aea7),
            (KVM_IRQFD, 0x4020_ae76),
            (KVM_IOEVENTFD, 0x4040_ae79),
            (KVM_IRQ_LINE, 0x4008_ae61),
            (KVM_IRQ_LINE_STATUS, 0xc008_ae67),
            (KVM_REGISTER_COALESCED_MMIO, 0x4010_ae67),
            (KVM_UNREGISTER_COALESCED_MMIO, 0x4010_ae68),
            (KVM_GET_IRQCHIP, 0xc208_ae62),
            (KVM_SET_IRQCHIP, 0x8208_ae63),
            (KVM_GET_PIT2, 0x8070_ae9f),
            (KVM_SET_PIT2, 0x4070_aea0),
            (KVM_GET_LAPIC, 0x8400_ae8e),
            (KVM_SET_LAPIC, 0x4400_ae8f),
            (KVM_TPR_ACCESS_REPORTING, 0xc028_ae92),
            (KVM_SET_VAPIC_ADDR, 0x4008_ae93),
            (KVM_CLEAR_DIRTY_LOG, 0xc018_aec0),
            (KVM_X86_SET_MSR_FILTER, 0x4188_aec6),
            (KVM_GET_SREGS2, 0x8140_aecc),
            (KVM_SET_SREGS2, 0x4140_aecd),
            (KVM_GET_XSAVE2, 0x9000_aecf),
            (SEV_ISSUE_CMD, 0xc010_5300),
        ] {
            assert_eq!(ioctl.number(), number, "{}", ioctl.name());
        }
    }

    #[test]
    fn each_number_belongs_to_one_ioctl() {
        let numbers: BTreeSet<u32> = ALL.iter().map(|ioctl| ioctl.number()).collect();
        assert_eq!(numbers.len(), ALL.len());
        for ioctl in ALL {
            assert_eq!(Ioctl::from_number(ioctl.number()), Some(*ioctl));
        }
        assert_eq!(Ioctl::from_number(0), None);
    }
}
