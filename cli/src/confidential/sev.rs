//! What an SEV, SEV-ES or SEV-SNP guest starts with, and what its owner expects of that.

use kvm_ops::{Gpa, Measurement, Pfn, SevParams, Tech};
use kvm_ops_machine::LaunchPage;
use rand_core::OsRng;
use soft_amd_sp::crypto::GuestOwner;
use soft_amd_sp::measure::{
    ApiVersion, BSP_EIP, InitialVmsa, LaunchMeasure, PageInfo, PageType, SevDigest, SnpDigest,
    VMSA_GPA, Vmm,
};
use soft_amd_sp::{Command, CommandBuffer, Platform, policy};

/// Where the pages of the start lie: where a vCPU begins.
const FIRST: u64 = 0xffff_c000;
const PAGES: u64 = 4;

/// The side of the guest's owner.
pub(crate) struct SevOwner {
    digest: Digest,
    version: ApiVersion,
}

enum Digest {
    /// Proved by a MAC under a key that only the firmware and the owner have.
    Legacy([u8; 32], Box<GuestOwner>),
    Snp([u8; 48]),
}

/// The pages of the built-in start.
pub(crate) fn pages() -> Vec<LaunchPage> {
    // Each is another, so that pages that are swapped give another digest.
    let page = |n: u64| {
        let contents = Box::new([n as u8 + 1; 4096]);
        LaunchPage::measured(Gpa::new(FIRST + n * 4096), contents)
    };
    (0..PAGES).map(page).collect()
}

/// The initial state of a vCPU of the software platform: that of a processor after power-on.
fn vmsa(sev_features: u64) -> Box<[u8; 4096]> {
    InitialVmsa {
        eip: BSP_EIP,
        vcpu_sig: 0,
        sev_features,
        vmm: Vmm::Qemu,
    }
    .page()
}

impl SevOwner {
    /// The owner of a guest with these pages and that many vCPUs; `None` where the platform does
    /// not answer.
    pub(crate) fn new(
        tech: Tech,
        pages: &[LaunchPage],
        vcpus: u32,
        platform: &Platform,
    ) -> Option<Self> {
        let mut status = CommandBuffer::new(Command::PLATFORM_STATUS);
        platform.run(&mut status).ok().ok()?;
        let field = |name| status.get(name).and_then(|value| u8::try_from(value).ok());
        let version = ApiVersion {
            major: field("api_major")?,
            minor: field("api_minor")?,
            build: field("build")?,
        };
        let digest = if tech == Tech::SevSnp {
            let mut digest = SnpDigest::new();
            for page in pages {
                let info = PageInfo::new(PageType::Normal, page.gpa.get());
                digest.add_page(&info, &page.contents);
            }
            for _ in 0..vcpus {
                digest.add_page(&PageInfo::new(PageType::Vmsa, VMSA_GPA), &vmsa(1));
            }
            Digest::Snp(digest.value())
        } else {
            let mut digest = SevDigest::new();
            pages
                .iter()
                .for_each(|page| digest.update(&page.contents[..]));
            let is_es = tech == Tech::SevEs;
            (0..vcpus)
                .filter(|_| is_es)
                .for_each(|_| digest.update(&vmsa(0)[..]));
            let policy = if is_es { policy::ES } else { 0 };
            let owner = GuestOwner::new(&platform.pdh_cert(), policy, &mut OsRng)?;
            Digest::Legacy(digest.value(), Box::new(owner))
        };
        Some(Self { digest, version })
    }

    /// The digest that the launch must have.
    pub(crate) fn digest(&self) -> Vec<u8> {
        match &self.digest {
            Digest::Legacy(digest, _) => digest.to_vec(),
            Digest::Snp(digest) => digest.to_vec(),
        }
    }

    /// What LAUNCH_START is told.
    pub(crate) fn params(&self) -> SevParams {
        let session = match &self.digest {
            Digest::Legacy(_, owner) => Some((
                owner.certificate().as_bytes().to_vec(),
                owner.session().to_bytes().to_vec(),
            )),
            Digest::Snp(_) => None,
        };
        SevParams {
            session,
            ..SevParams::default()
        }
    }

    /// The digest of the launch, as the firmware has it.
    ///
    /// # Errors
    /// Why it is not known, or not proved.
    pub(crate) fn check(
        &self,
        measurement: &Measurement,
        gctx: Option<Pfn>,
        platform: &Platform,
    ) -> Result<Vec<u8>, String> {
        let measurement = *measurement.bytes();
        match &self.digest {
            Digest::Legacy(digest, owner) => {
                let got = LaunchMeasure::from_bytes(&measurement);
                if owner.expects(self.version, digest, &got) {
                    return Ok(digest.to_vec());
                }
                Err(format!(
                    "the answer of LAUNCH_MEASURE, {}, does not prove the digest {}",
                    hex::encode(got.measure),
                    hex::encode(digest)
                ))
            }
            Digest::Snp(_) => {
                let gctx = gctx.and_then(Pfn::base).map(|base| base.get());
                let guests = platform.snapshot().snp_guests;
                let guest = guests.iter().find(|guest| Some(guest.context) == gctx);
                let firmware = guest.ok_or("the firmware does not know the guest")?;
                if firmware.launch_digest != measurement {
                    return Err(format!(
                        "the firmware measured {}, the library says {}",
                        hex::encode(firmware.launch_digest),
                        hex::encode(measurement)
                    ));
                }
                Ok(measurement.to_vec())
            }
        }
    }
}
