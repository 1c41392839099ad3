//! The parameters that a VM is created with.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::{CpuidEntry, Error, Field, Result, VcpuId};

/// The most vCPUs a VM can have, as Linux has it on x86 (`KVM_MAX_VCPUS`).
pub const MAX_VCPUS: u32 = 4096;

/// The place of the interrupt controllers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Irqchip {
    /// Nowhere: the embedder injects interrupts itself, and HLT is an exit.
    #[default]
    None,
    /// PIC, IOAPIC and local APICs in the platform, with a PIT. HLT is no exit.
    Full,
    /// Local APICs in the platform, PIC and IOAPIC with the embedder. TDs need it.
    Split,
}

/// The parameters of every VM, whatever its technology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmParams {
    /// The number of vCPUs that the VM may have, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// The place of its interrupt controllers.
    pub irqchip: Irqchip,
    /// The parameters that only a VM with private memory has.
    pub enc: EncParams,
}

/// The parameters of a VM with private memory. A back end refuses those of another technology.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EncParams {
    /// The defaults of the technology.
    #[default]
    Default,
    /// Of a TD.
    Td(Box<TdParams>),
    /// Of an SEV, SEV-ES or SNP guest.
    Sev(Box<SevParams>),
    /// Of a normal VM with private memory (`KVM_X86_SW_PROTECTED_VM`): what is private is in other pages than what is
    /// shared, and not in the host program's reach, but nothing encrypts it. Its memory begins shared. It is for
    /// developing and testing conversions where no technology is: it protects nobody.
    Private,
}

/// The width of a TD's guest-physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gpaw {
    /// 48 bits: the shared bit is 47, the Secure-EPT has 4 levels.
    #[default]
    Bits48,
    /// 52 bits: the shared bit is 51, the Secure-EPT has 5 levels.
    Bits52,
}

/// The parameters of a TD: the input of TDH.MNG.INIT (`struct kvm_tdx_init_vm`; TDX module ABI,
/// TD_PARAMS), and what it is created for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TdParams {
    /// ATTRIBUTES: bit 0 DEBUG, bit 28 SEPT_VE_DISABLE, ...
    pub attributes: u64,
    /// XFAM: the extended features that the TD may use. Bits 0 and 1 are required.
    pub xfam: u64,
    /// The width of its guest-physical addresses.
    pub gpaw: Gpaw,
    /// The virtual TSC's frequency in kHz, a multiple of 25 MHz.
    pub tsc_khz: u32,
    /// CONFIG_FLAGS.NO_RBP_MOD, where the module offers it: the host keeps its RBP in TDH.VP.ENTER, and the guest may
    /// not pass RBP in TDG.VP.VMCALL. Set by default, as Linux sets it for each TD: a kernel that holds the TD itself
    /// does not ask. Firmware that passes RBP all the same, such as Debian 12's OVMF.fd, needs a TD without.
    pub no_rbp_mod: bool,
    /// MRCONFIGID: the software-defined configuration. Not measured.
    pub mrconfigid: [u8; 48],
    /// MROWNER: the owner of the TD.
    pub mrowner: [u8; 48],
    /// MROWNERCONFIG: the owner's configuration.
    pub mrownerconfig: [u8; 48],
    /// The CPUID values that the module lets the host choose.
    pub cpuid: Vec<CpuidEntry>,
    /// The migration TD that may be bound once the TD runs (TDH.SERVTD.PREBIND). It is part of the TD's
    /// identity, so it is fixed before the TD is finalised.
    pub migration_td: Option<PreboundTd>,
    /// The TD comes from another host, with parameters and vCPUs: there is no TDH.MNG.INIT, and no
    /// launch. Attributes, XFAM, owner, configuration and CPUID values given here are not used then.
    pub arrives: bool,
}

/// A service TD that is not there yet (TDX module ABI, TDH.SERVTD.PREBIND).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreboundTd {
    /// SHA-384 of its TDINFO, in which `attributes` blank some fields.
    pub info_hash: [u8; 48],
    /// SERVTD_ATTR: bits 42:32 leave parts of TDINFO out of the hash, 0 none.
    pub attributes: u64,
}

impl Default for TdParams {
    /// No attributes but SEPT_VE_DISABLE, x87 and SSE, 48 bits, 1 GHz, no migration TD.
    fn default() -> Self {
        Self {
            attributes: 1 << 28,
            xfam: 0b11,
            gpaw: Gpaw::Bits48,
            tsc_khz: 1_000_000,
            no_rbp_mod: true,
            mrconfigid: [0; 48],
            mrowner: [0; 48],
            mrownerconfig: [0; 48],
            cpuid: Vec::new(),
            migration_td: None,
            arrives: false,
        }
    }
}

/// The parameters of the launch of an SEV guest (`KVM_SEV_INIT2`, `LAUNCH_START`, `SNP_LAUNCH_START`,
/// `SNP_LAUNCH_FINISH`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SevParams {
    /// The guest policy (SEV API, 2; SNP ABI, 4.3). `None` takes the least that the technology
    /// demands.
    pub policy: Option<u64>,
    /// SEV_FEATURES of the guest's VMSAs.
    pub vmsa_features: u64,
    /// The GHCB protocol version, 1 or 2; 0 for plain SEV.
    pub ghcb_version: u16,
    /// The guest owner's Diffie-Hellman certificate and session data for LAUNCH_START.
    pub session: Option<(Vec<u8>, Vec<u8>)>,
    /// HOST_DATA of an SNP guest, part of its reports.
    pub host_data: [u8; 32],
    /// ID block and ID authentication block of an SNP guest.
    pub id_block: Option<(Vec<u8>, Vec<u8>)>,
    /// GOSVW of an SNP guest.
    pub gosvw: [u8; 16],
    /// The address of the context page of another SNP guest of the same host, the migration agent of this one: firmware gives this
    /// guest's context to no other. The policy must have MIGRATE_MA (bit 18), else the launch ends with POLICY_FAILURE. The
    /// agent is launched before, and must not be torn down until this launch has begun. `None` for no agent; KVM names none.
    pub migration_agent: Option<crate::Hpa>,
    /// The guest shall be able to move to another VM of its host. A back end that has the keys itself moves every guest.
    /// Linux must know it from the beginning: it makes a VM of type 0 then, by `KVM_SEV_INIT` or `KVM_SEV_ES_INIT`,
    /// because up to 7.3.4 no other runs after a move. Such a guest has no `vmsa_features`, and for SEV-ES
    /// `ghcb_version` is 1. Linux moves no SNP guests.
    pub movable: bool,
    /// The guest comes from another VM of this host, by a move or as a mirror: the VM takes no ASID, and has no launch.
    /// The other parameters are the guest's own and not used. It can move on.
    pub arrives: bool,
}

impl Default for SevParams {
    fn default() -> Self {
        Self {
            policy: None,
            vmsa_features: 0,
            ghcb_version: 2,
            session: None,
            host_data: [0; 32],
            id_block: None,
            gosvw: [0; 16],
            migration_agent: None,
            movable: false,
            arrives: false,
        }
    }
}

impl VmParams {
    /// Parameters of a VM with that many vCPUs and no irqchip.
    pub const fn new(vcpus: u32) -> Self {
        Self {
            vcpus,
            irqchip: Irqchip::None,
            enc: EncParams::Default,
        }
    }

    /// Checks that the VM can have a vCPU of that number.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the number.
    pub const fn check_vcpu(&self, id: VcpuId) -> Result<()> {
        if id.0 < self.vcpus {
            Ok(())
        } else {
            Err(Error::Invalid(Field::Vcpu, id.0 as u64))
        }
    }

    /// Checks an interrupt before it is sent to a local APIC of the platform.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vCPU that the VM cannot have, or a vector below 16, which the APIC
    /// refuses (SDM vol. 3, 11.5.3); [`Error::NotOffered`] without an irqchip in the platform.
    pub fn check_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.check_vcpu(vcpu)?;
        if vector < 16 {
            return Err(Error::Invalid(Field::Vector, vector.into()));
        }
        if self.irqchip == Irqchip::None {
            return not_offered!("deliver_interrupt without an irqchip in the platform");
        }
        Ok(())
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the number of vCPUs that is out of range.
    pub const fn validate(&self) -> Result<()> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(Error::Invalid(Field::VcpuCount, self.vcpus as u64));
        }
        Ok(())
    }
}
