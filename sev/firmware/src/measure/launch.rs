//! From a firmware image to the digest its launch must have.

use super::pages;
use super::{
    BSP_EIP, InitialVmsa, PAGE_SIZE, PageInfo, PageType, SevDigest, SnpDigest, VMSA_GPA, Vmm,
    sha384,
};
use kvm_ops_ovmf::{KernelHashes, Ovmf, OvmfError, Section, SectionKind};
use thiserror::Error;

/// End of the guest address range in which firmware lives.
const FOUR_GIB: u64 = 1 << 32;

/// Errors of measuring a launch.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The image's tables are damaged.
    #[error("the firmware image cannot be read")]
    Image(#[from] OvmfError),
    /// SNP measures whole pages below 4 GiB.
    #[error("image length {0:#x} is not a whole number of pages of at most 4 GiB")]
    ImageLength(usize),
    /// More than one vCPU, but the image does not say where the others start.
    #[error("the image has no reset block, which {0} vCPUs need")]
    NoResetBlock(u32),
    /// A kernel was given, but the image has no place for its hashes.
    #[error("the image has no place for kernel hashes")]
    NoHashTable,
    /// A section's address or length is not a multiple of the page size, or is not one page where
    /// it must be.
    #[error("section at gpa {gpa:#x} has the unusable length {size:#x}")]
    Section {
        /// Guest physical address.
        gpa: u32,
        /// Length in bytes.
        size: u32,
    },
    /// The sections cover more than the address space they lie in.
    #[error("the sections of the image add up to more than 4 GiB")]
    TooLarge,
}

/// A launch to be measured: firmware image, vCPUs, and optionally a directly booted kernel.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    image: &'a [u8],
    vcpus: u32,
    vcpu_sig: u32,
    guest_features: u64,
    vmm: Vmm,
    hashes: Option<KernelHashes>,
}

impl<'a> Launch<'a> {
    /// One vCPU with signature 0, QEMU's reset values, SEV_FEATURES 1, no kernel.
    pub fn new(image: &'a [u8]) -> Self {
        Self {
            image,
            vcpus: 1,
            vcpu_sig: 0,
            guest_features: 1,
            vmm: Vmm::Qemu,
            hashes: None,
        }
    }

    /// Number of vCPUs.
    pub fn vcpus(mut self, n: u32) -> Self {
        self.vcpus = n;
        self
    }

    /// CPUID signature of the vCPUs; see [`cpu_signature`](super::cpu_signature).
    pub fn vcpu_sig(mut self, signature: u32) -> Self {
        self.vcpu_sig = signature;
        self
    }

    /// SEV_FEATURES of the vCPUs of an SNP guest. SEV-ES guests are measured with 0.
    pub fn guest_features(mut self, features: u64) -> Self {
        self.guest_features = features;
        self
    }

    /// The VMM whose reset values and section order are used.
    pub fn vmm(mut self, vmm: Vmm) -> Self {
        self.vmm = vmm;
        self
    }

    /// A kernel that is booted directly.
    pub fn kernel_hashes(mut self, hashes: KernelHashes) -> Self {
        self.hashes = Some(hashes);
        self
    }

    /// The SEV launch digest: SHA-256 of the image and the table of kernel hashes.
    pub fn sev(&self) -> Result<[u8; 32], MeasureError> {
        Ok(self.sev_data()?.value())
    }

    /// The SEV-ES launch digest: as [`sev`](Self::sev), then a VMSA per vCPU.
    pub fn sev_es(&self) -> Result<[u8; 32], MeasureError> {
        let mut digest = self.sev_data()?;
        let [first, others] = self.vmsas(0)?;
        for vcpu in 0..self.vcpus {
            digest.update(&if vcpu == 0 { &first } else { &others }[..]);
        }
        Ok(digest.value())
    }

    fn sev_data(&self) -> Result<SevDigest, MeasureError> {
        let mut digest = SevDigest::new();
        digest.update(self.image);
        if let Some(hashes) = &self.hashes {
            if Ovmf::parse(self.image)?.hash_table().is_none() {
                return Err(MeasureError::NoHashTable);
            }
            digest.update(&hashes.table());
        }
        Ok(digest)
    }

    /// The VMSA pages of the first vCPU and of all others. The image is only parsed if it has to be.
    fn vmsas(&self, sev_features: u64) -> Result<[Box<[u8; PAGE_SIZE]>; 2], MeasureError> {
        let ap_eip = match self.vcpus {
            0 | 1 => BSP_EIP,
            n => Ovmf::parse(self.image)?
                .reset_eip()
                .ok_or(MeasureError::NoResetBlock(n))?,
        };
        let (vcpu_sig, vmm) = (self.vcpu_sig, self.vmm);
        Ok([BSP_EIP, ap_eip].map(|eip| {
            InitialVmsa {
                eip,
                vcpu_sig,
                sev_features,
                vmm,
            }
            .page()
        }))
    }

    /// Guest address at which the image begins, so that it ends at 4 GiB.
    pub fn image_gpa(&self) -> Result<u64, MeasureError> {
        let length = self.image.len();
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) || length as u64 > FOUR_GIB {
            return Err(MeasureError::ImageLength(length));
        }
        Ok(FOUR_GIB - length as u64)
    }

    /// The SNP launch digest after the image pages only.
    pub fn snp_image(&self) -> Result<SnpDigest, MeasureError> {
        let mut gpa = self.image_gpa()?;
        let mut digest = SnpDigest::new();
        let (pages, _) = self.image.as_chunks();
        for hash in pages::digests(pages) {
            digest.add_hashed(&PageInfo::new(PageType::Normal, gpa), &hash);
            gpa += PAGE_SIZE as u64;
        }
        Ok(digest)
    }

    /// The SNP launch digest: image pages, the sections of the SEV metadata, then a VMSA per
    /// vCPU, which is the order of QEMU and OVMF.
    pub fn snp(&self) -> Result<[u8; 48], MeasureError> {
        let mut digest = self.snp_image()?;
        // Without SEV metadata there is nothing between the image and the VMSAs.
        let ovmf = match Ovmf::parse(self.image) {
            Err(OvmfError::NoFooter) => Ovmf::default(),
            other => other?,
        };
        self.add_sections(&ovmf, &mut digest)?;
        let info = PageInfo::new(PageType::Vmsa, VMSA_GPA);
        let [first, others] = self
            .vmsas(self.guest_features)?
            .map(|page| sha384(&page[..]));
        for vcpu in 0..self.vcpus {
            digest.add_hashed(&info, if vcpu == 0 { &first } else { &others });
        }
        Ok(digest.value())
    }

    fn add_sections(&self, ovmf: &Ovmf, digest: &mut SnpDigest) -> Result<(), MeasureError> {
        let total: u64 = ovmf.sections().iter().map(|s| u64::from(s.size)).sum();
        if total > FOUR_GIB {
            return Err(MeasureError::TooLarge);
        }
        let has_place = ovmf
            .sections()
            .iter()
            .any(|s| s.kind == SectionKind::KernelHashes);
        if self.hashes.is_some() && !has_place {
            return Err(MeasureError::NoHashTable);
        }
        // EC2 adds the CPUID page after everything else.
        let is_late = |s: &&Section| self.vmm == Vmm::Ec2 && s.kind == SectionKind::Cpuid;
        let early = ovmf.sections().iter().filter(|s| !is_late(s));
        for section in early.chain(ovmf.sections().iter().filter(is_late)) {
            self.add_section(ovmf, section, digest)?;
        }
        Ok(())
    }

    fn add_section(
        &self,
        ovmf: &Ovmf,
        section: &Section,
        digest: &mut SnpDigest,
    ) -> Result<(), MeasureError> {
        let Section { gpa, size, kind } = *section;
        let bad = MeasureError::Section { gpa, size };
        let page_type = match (kind, &self.hashes) {
            (SectionKind::KernelHashes, Some(hashes)) => {
                let region = ovmf.hash_table().ok_or(MeasureError::NoHashTable)?;
                let page = hashes.page(region.gpa as usize % PAGE_SIZE).ok_or(bad)?;
                digest.add_page(&PageInfo::new(PageType::Normal, gpa.into()), &page);
                return Ok(());
            }
            (SectionKind::SecMem, _) if self.vmm == Vmm::Gce => PageType::Unmeasured,
            (SectionKind::SecMem | SectionKind::SvsmCaa | SectionKind::KernelHashes, _) => {
                PageType::Zero
            }
            // These are one page each, whatever length the section gives.
            (SectionKind::Secrets, _) => {
                digest.add_contentless(&PageInfo::new(PageType::Secrets, gpa.into()));
                return Ok(());
            }
            (SectionKind::Cpuid, _) => {
                digest.add_contentless(&PageInfo::new(PageType::Cpuid, gpa.into()));
                return Ok(());
            }
        };
        if size % PAGE_SIZE as u32 != 0 {
            return Err(bad);
        }
        for page in 0..size / PAGE_SIZE as u32 {
            let gpa = u64::from(gpa) + u64::from(page) * PAGE_SIZE as u64;
            digest.add_contentless(&PageInfo::new(page_type, gpa));
        }
        Ok(())
    }
}
