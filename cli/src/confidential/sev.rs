//! The measured start of an SEV, SEV-ES or SEV-SNP guest, and the guest owner's checks of it.

use kvm_ops::{Gpa, Measurement, Pfn, SevParams, Tech};
use kvm_ops_machine::LaunchPage;
use rand_core::OsRng;
use soft_amd_sp::Platform;
use soft_amd_sp::command::{PlatformStatus, SevPolicy};
use soft_amd_sp::crypto::GuestOwner;
use soft_amd_sp::measure::{
    ApiVersion, BSP_EIP, InitialVmsa, LaunchMeasure, PageInfo, PageType, SevDigest, SnpDigest,
    VMSA_GPA, Vmm,
};

/// The address of the launch pages. They end at 4 GiB, and contain the reset vector.
const FIRST: u64 = 0xffff_c000;
const PAGES: u64 = 4;

/// The guest owner's side of a launch.
pub(crate) struct SevOwner {
    digest: Digest,
    version: ApiVersion,
}

enum Digest {
    /// The digest is authenticated by a MAC under a key that only the firmware and the owner have.
    Legacy([u8; 32], Box<GuestOwner>),
    Snp([u8; 48]),
}

/// The pages of the built-in start.
pub(crate) fn pages() -> Vec<LaunchPage> {
    // Each page differs, so that swapped pages change the digest.
    let page = |n: u64| {
        let contents = Box::new([n as u8 + 1; 4096]);
        LaunchPage::measured(Gpa::new(FIRST + n * 4096), contents)
    };
    (0..PAGES).map(page).collect()
}

/// The initial state of a vCPU of the software platform: the state after power-on.
fn vmsa(sev_features: u64) -> Box<[u8; 4096]> {
    InitialVmsa {
        eip: BSP_EIP,
        vcpu_sig: 0,
        sev_features,
        vmm: Vmm::Qemu,
    }
    .page()
}

/// The digest of a guest with these pages and this many vCPUs.
fn digest(tech: Tech, pages: &[LaunchPage], vcpus: u32) -> Vec<u8> {
    if tech == Tech::SevSnp {
        let mut digest = SnpDigest::new();
        for page in pages {
            let info = PageInfo::new(PageType::Normal, page.gpa.get());
            digest.add_page(&info, &page.contents);
        }
        for _ in 0..vcpus {
            digest.add_page(&PageInfo::new(PageType::Vmsa, VMSA_GPA), &vmsa(1));
        }
        return digest.value().to_vec();
    }
    let mut digest = SevDigest::new();
    pages
        .iter()
        .for_each(|page| digest.update(&page.contents[..]));
    (0..vcpus)
        .filter(|_| tech == Tech::SevEs)
        .for_each(|_| digest.update(&vmsa(0)[..]));
    digest.value().to_vec()
}

impl SevOwner {
    /// Creates the owner of a guest with these pages and this many vCPUs; `None` if the platform
    /// does not answer.
    pub(crate) fn new(
        tech: Tech,
        pages: &[LaunchPage],
        vcpus: u32,
        platform: &Platform,
    ) -> Option<Self> {
        Self::expecting(tech, digest(tech, pages, vcpus), platform)
    }

    /// Creates the owner of a guest that must have this digest; `None` if the platform does not
    /// answer.
    pub(crate) fn expecting(tech: Tech, digest: Vec<u8>, platform: &Platform) -> Option<Self> {
        let mut status = PlatformStatus::default();
        platform.run(&mut status).ok().ok()?;
        let version = ApiVersion {
            major: status.api_major,
            minor: status.api_minor,
            build: status.build,
        };
        let digest = if tech == Tech::SevSnp {
            Digest::Snp(digest.try_into().ok()?)
        } else {
            let policy = match tech {
                Tech::SevEs => SevPolicy::ES.bits(),
                _ => 0,
            };
            let owner = GuestOwner::new(&platform.pdh_cert(), policy, &mut OsRng)?;
            Digest::Legacy(digest.try_into().ok()?, Box::new(owner))
        };
        Some(Self { digest, version })
    }

    /// The expected launch digest.
    pub(crate) fn digest(&self) -> Vec<u8> {
        match &self.digest {
            Digest::Legacy(digest, _) => digest.to_vec(),
            Digest::Snp(digest) => digest.to_vec(),
        }
    }

    /// The parameters of LAUNCH_START.
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

    /// Returns the launch digest that the firmware holds.
    ///
    /// # Errors
    /// The reason if the digest is unknown or not authenticated.
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
