//! A guest of some pages, and what its launch shall measure.

use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVm, EncParams, Gpa, HostRange, InitialPage, InitialPageKind, Kind, MemSlot, SevParams,
    SlotId, Tech, Vendor, Vm, VmConfig, create,
};
use rand_core::OsRng;
use soft_amd_sp::Platform;
use soft_amd_sp::command::PlatformStatus;
use soft_amd_sp::crypto::{GuestOwner, PrivateKey};
use soft_amd_sp::measure::{
    ApiVersion, BSP_EIP, IdAuth, IdBlock, InitialVmsa, LaunchMeasure, PageInfo, PageType,
    SevDigest, SnpDigest, VMSA_GPA, Vmm,
};
use vm_memory::MmapRegion;

use crate::common::SEED;

/// What the client holds on an AMD host.
pub(crate) const TECHS: [Tech; 3] = [Tech::Sev, Tech::SevEs, Tech::SevSnp];

/// The start of the guest's memory, which ends at 4 GiB with the reset vector.
pub(crate) const START: u64 = 0xfffc_0000;
pub(crate) const BYTES: u64 = 0x4_0000;
/// The pages that are measured: the last of the memory.
pub(crate) const PAGES: u64 = 4;
pub(crate) const FIRST: u64 = 0x1_0000_0000 - PAGES * 4096;

/// The policy of SNP guests: the bit that is always set, and SMT.
pub(crate) const SNP_POLICY: u64 = 1 << 17 | 1 << 16;

pub(crate) fn host() -> KvmHost {
    KvmHost::open().expect("the library's")
}

/// Memory for a slot. Guests are destroyed in front of it.
pub(crate) fn memory() -> MmapRegion<()> {
    MmapRegion::new(BYTES as usize).unwrap()
}

pub(crate) fn slot(memory: &MmapRegion<()>) -> MemSlot {
    // SAFETY: the region stays mapped until the test ends, and nothing references its contents.
    let range = unsafe { HostRange::new(memory.as_ptr() as u64, memory.size() as u64) };
    MemSlot::new(SlotId(0), Gpa::new(START), range.unwrap())
}

pub(crate) fn config(tech: Tech, params: SevParams) -> VmConfig {
    VmConfig::new(Kind::Of(tech))
        .vcpus(2)
        .enc(EncParams::Sev(Box::new(params)))
}

/// The contents of a page. Each differs, so that swapped pages change the digest.
pub(crate) fn contents(page: u64) -> [u8; 4096] {
    [page as u8 + 1; 4096]
}

/// Adds the measured pages.
pub(crate) fn add_pages(vm: &mut Vm<AnyVm<KvmHost>>) {
    for page in 0..PAGES {
        vm.add_initial_page(&InitialPage {
            gpa: Gpa::new(FIRST + page * 4096),
            contents: &contents(page),
            kind: InitialPageKind::Measured,
        })
        .unwrap();
    }
}

/// A guest with memory, that many vCPUs made, and its pages added.
pub(crate) fn launched(host: &KvmHost, tech: Tech, memory: &MmapRegion<()>) -> Vm<AnyVm<KvmHost>> {
    let mut vm = create(host, &config(tech, SevParams::default())).unwrap();
    vm.set_memory_slot(slot(memory)).unwrap();
    add_pages(&mut vm);
    vm.finalize().unwrap();
    vm
}

/// The platform that the library makes from the seed, made once more: its keys are the same.
pub(crate) struct Twin(SimHost);

impl Twin {
    pub(crate) fn new() -> Self {
        let control = std::fs::read_to_string("/sys/devices/system/cpu/smt/control");
        let smt = control.is_ok_and(|control| control.trim() == "on");
        let platform = Platform::builder().smt(smt).seed(SEED);
        Self(SimHost::builder(Vendor::Amd).sev(platform).build().unwrap())
    }

    pub(crate) fn host(&self) -> &SimHost {
        &self.0
    }

    fn platform(&self) -> &Platform {
        self.0.sev_platform().expect("an AMD SP")
    }

    fn version(&self) -> ApiVersion {
        let mut status = PlatformStatus::default();
        self.platform().run(&mut status).ok().unwrap();
        ApiVersion {
            major: status.api_major,
            minor: status.api_minor,
            build: status.build,
        }
    }

    /// The owner of an SEV or SEV-ES guest.
    pub(crate) fn owner(&self, policy: u32) -> GuestOwner {
        GuestOwner::new(&self.platform().pdh_cert(), policy, &mut OsRng).expect("a key")
    }

    /// True if that is the measurement of this digest.
    pub(crate) fn expects(
        &self,
        owner: &GuestOwner,
        digest: &[u8; 32],
        measurement: &[u8; 48],
    ) -> bool {
        let got = LaunchMeasure::from_bytes(measurement);
        owner.expects(self.version(), digest, &got)
    }
}

/// The parameters of a launch that the owner checks.
pub(crate) fn with_session(owner: &GuestOwner, policy: u32) -> SevParams {
    SevParams {
        policy: Some(policy.into()),
        session: Some((
            owner.certificate().as_bytes().to_vec(),
            owner.session().to_bytes().to_vec(),
        )),
        ..SevParams::default()
    }
}

/// The parameters of a launch that firmware itself compares with a digest.
pub(crate) fn with_id_block(digest: [u8; 48]) -> SevParams {
    let block = IdBlock::new(digest, SNP_POLICY);
    let key = PrivateKey::random(&mut OsRng);
    let auth = IdAuth::sign(&block, &key, None);
    SevParams {
        policy: Some(SNP_POLICY),
        id_block: Some((block.to_bytes().to_vec(), auth.as_bytes().to_vec())),
        ..SevParams::default()
    }
}

/// The state of a vCPU after power-on.
fn vmsa(sev_features: u64) -> Box<[u8; 4096]> {
    InitialVmsa {
        eip: BSP_EIP,
        vcpu_sig: 0,
        sev_features,
        vmm: Vmm::Qemu,
    }
    .page()
}

/// The launch digest of the pages, and of that many vCPUs, for SEV (0) and SEV-ES.
pub(crate) fn sev_digest(vcpus: u32) -> [u8; 32] {
    let mut digest = SevDigest::new();
    (0..PAGES).for_each(|page| digest.update(&contents(page)));
    (0..vcpus).for_each(|_| digest.update(&vmsa(0)[..]));
    digest.value()
}

/// The launch digest of the pages and of that many vCPUs for SNP.
pub(crate) fn snp_digest(vcpus: u32) -> [u8; 48] {
    let mut digest = SnpDigest::new();
    for page in 0..PAGES {
        let info = PageInfo::new(PageType::Normal, FIRST + page * 4096);
        digest.add_page(&info, &contents(page));
    }
    for _ in 0..vcpus {
        digest.add_page(&PageInfo::new(PageType::Vmsa, VMSA_GPA), &vmsa(1));
    }
    digest.value()
}
