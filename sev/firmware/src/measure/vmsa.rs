//! The register state a vCPU starts with, as it is measured.
//!
//! Only what is not zero is written. Offsets are those of the VMSA (APM volume 2, appendix B);
//! the values are what each virtual machine monitor puts there at reset.

use super::PAGE_SIZE;

/// Guest physical address under which KVM measures every VMSA page.
pub const VMSA_GPA: u64 = 0x0000_ffff_ffff_f000;

/// Start address of the boot processor.
pub const BSP_EIP: u32 = 0xffff_fff0;

/// The virtual machine monitor whose reset values are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Vmm {
    /// QEMU.
    #[default]
    Qemu,
    /// Amazon EC2. RDX is 0x600 as `sev-snp-measure` has it; the crate `sev` writes 0 there.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

impl Vmm {
    /// Reads the name that the vector files and command lines use.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qemu" => Some(Vmm::Qemu),
            "ec2" => Some(Vmm::Ec2),
            "gce" => Some(Vmm::Gce),
            _ => None,
        }
    }
}

/// Inputs of the initial VMSA of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitialVmsa {
    /// First instruction: [`BSP_EIP`], or the reset block's address for application processors.
    pub eip: u32,
    /// CPUID signature, put in RDX at reset.
    pub vcpu_sig: u32,
    /// SEV_FEATURES: bit 0 is SNP, so 0 for SEV-ES.
    pub sev_features: u64,
    /// VMM whose reset values are used.
    pub vmm: Vmm,
}

struct Values {
    cs_attributes: u16,
    ss_attributes: u16,
    tr_attributes: u16,
    pat: u64,
    rdx: u64,
    mxcsr: u32,
    fcw: u16,
}

impl InitialVmsa {
    fn values(&self) -> Values {
        let qemu = Values {
            cs_attributes: 0x9b,
            ss_attributes: 0x93,
            tr_attributes: 0x8b,
            pat: 0x0007_0406_0007_0406,
            rdx: self.vcpu_sig.into(),
            mxcsr: 0x1f80,
            fcw: 0x37f,
        };
        match self.vmm {
            Vmm::Qemu => qemu,
            Vmm::Ec2 => Values {
                cs_attributes: if self.eip == BSP_EIP { 0x9a } else { 0x9b },
                ss_attributes: 0x92,
                tr_attributes: 0x83,
                rdx: 0x600,
                mxcsr: 0,
                fcw: 0,
                ..qemu
            },
            Vmm::Gce => Values {
                pat: 0x0007_0106,
                rdx: 0x600,
                mxcsr: 0,
                fcw: 0,
                ..qemu
            },
        }
    }

    /// The 4096-byte page.
    pub fn page(&self) -> Box<[u8; PAGE_SIZE]> {
        let v = self.values();
        let mut page = Box::new([0_u8; PAGE_SIZE]);
        let mut put = |offset: usize, bytes: &[u8]| {
            page[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let mut segment = |offset: usize, selector: u16, attributes: u16, base: u64| {
            put(offset, &selector.to_le_bytes());
            put(offset + 2, &attributes.to_le_bytes());
            put(offset + 4, &0xffff_u32.to_le_bytes());
            put(offset + 8, &base.to_le_bytes());
        };
        segment(0x00, 0, 0x93, 0); // ES
        segment(
            0x10,
            0xf000,
            v.cs_attributes,
            (self.eip & 0xffff_0000).into(),
        ); // CS
        segment(0x20, 0, v.ss_attributes, 0); // SS
        segment(0x30, 0, 0x93, 0); // DS
        segment(0x40, 0, 0x93, 0); // FS
        segment(0x50, 0, 0x93, 0); // GS
        segment(0x60, 0, 0, 0); // GDTR
        segment(0x70, 0, 0x82, 0); // LDTR
        segment(0x80, 0, 0, 0); // IDTR
        segment(0x90, 0, v.tr_attributes, 0); // TR
        for (offset, value) in [
            (0x0d0, 0x1000),                       // EFER: SVME
            (0x148, 0x40),                         // CR4: MCE
            (0x158, 0x10),                         // CR0: ET
            (0x160, 0x400),                        // DR7
            (0x168, 0xffff_0ff0),                  // DR6
            (0x170, 0x2),                          // RFLAGS
            (0x178, u64::from(self.eip & 0xffff)), // RIP
            (0x268, v.pat),                        // G_PAT
            (0x310, v.rdx),                        // RDX
            (0x3b0, self.sev_features),            // SEV_FEATURES
            (0x3e8, 1),                            // XCR0: x87
        ] {
            put(offset, &u64::to_le_bytes(value));
        }
        put(0x408, &v.mxcsr.to_le_bytes());
        put(0x410, &v.fcw.to_le_bytes());
        page
    }
}
