//! Code that the tests share: platforms in the states they start from.
#![allow(dead_code, unused_imports)]

pub mod guest;

use rand_chacha::rand_core::SeedableRng;
pub use soft_amd_sp::command::*;
use soft_amd_sp::crypto::{CERT_LEN, GuestOwner, SESSION_LEN};
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{Builder, PageSize, Platform, RmpUpdate, Status, VlekSeed};
use zerocopy::IntoBytes;

pub const GUEST: u64 = 0x10_0000;
pub const SCRATCH: u64 = 0x40_0000;
pub const TMR: u64 = 0x20_0000;
/// A policy that forbids nothing.
pub const OPEN: SevPolicy = SevPolicy::from_raw(0);

pub fn builder(seed: u64) -> Builder {
    Platform::builder()
        .memory(32 << 20)
        .cores(2)
        .asids(6, 12)
        .seed(seed)
}

/// SEV and SEV-ES initialised and flushed.
pub fn sev(seed: u64) -> Platform {
    sev_from(builder(seed))
}

pub fn sev_from(builder: Builder) -> Platform {
    let p = builder.build().unwrap();
    init(&p).ok().unwrap();
    flush(&p);
    p
}

/// INIT for SEV-ES with a trusted memory region of this length.
pub fn init_es(tmr_length: u32) -> Init {
    Init {
        options: InitFlags::SEV_ES,
        tmr_paddr: TMR.into(),
        tmr_length: tmr_length.into(),
        ..Default::default()
    }
}

pub fn init(p: &Platform) -> Status {
    run(p, init_es(1 << 20))
}

pub fn flush(p: &Platform) {
    p.wbinvd_all();
    p.run(&mut DfFlush).ok().unwrap();
}

pub fn snp_flush(p: &Platform) {
    p.wbinvd_all();
    p.run(&mut SnpDfFlush).ok().unwrap();
}

/// SNP initialised and flushed.
pub fn snp(seed: u64) -> Platform {
    snp_from(builder(seed))
}

pub fn snp_from(builder: Builder) -> Platform {
    let p = builder.build().unwrap();
    p.enable_snp_all();
    p.run(&mut SnpInit).ok().unwrap();
    snp_flush(&p);
    p
}

/// Runs a command and returns its status.
pub fn run<C: CommandStruct>(p: &Platform, buffer: C) -> Status {
    run_out(p, buffer).0
}

/// Runs a command and returns its status and outputs.
pub fn run_out<C: CommandStruct>(p: &Platform, mut buffer: C) -> (Status, C) {
    (p.run(&mut buffer), buffer)
}

/// Runs a command whose buffer is zeros.
pub fn run_zeros(p: &Platform, command: Command) -> Status {
    p.command(command, &mut vec![0; command.buffer_len()])
}

/// The address of a page.
pub fn page(address: u64) -> PageAddress {
    PageAddress::new(address).unwrap()
}

/// A small page of SNP_PAGE_RECLAIM.
pub fn small(address: u64) -> SizedPage {
    SizedPage::new(address, PageSize::Size4K).unwrap()
}

pub fn reclaim(p: &Platform, address: u64) -> Status {
    let page_paddr = small(address);
    run(p, SnpPageReclaim { page_paddr })
}

/// A new guest in LUPDATE.
pub fn new_guest(p: &Platform, policy: SevPolicy) -> u32 {
    let start = LaunchStart {
        policy,
        ..Default::default()
    };
    let (status, out) = run_out(p, start);
    status.ok().unwrap();
    out.handle.get()
}

/// A guest in LUPDATE that is active.
pub fn launch_start(p: &Platform, policy: SevPolicy, asid: u32) -> u32 {
    let handle = new_guest(p, policy);
    activate(p, handle, asid).ok().unwrap();
    handle
}

pub fn activate(p: &Platform, handle: u32, asid: u32) -> Status {
    let (handle, asid) = (handle.into(), asid.into());
    run(p, Activate { handle, asid })
}

pub fn deactivate(p: &Platform, handle: u32) -> Status {
    let handle = handle.into();
    run(p, Deactivate { handle })
}

pub fn decommission(p: &Platform, handle: u32) -> Status {
    let handle = handle.into();
    run(p, Decommission { handle })
}

pub fn launch_finish(p: &Platform, handle: u32) -> Status {
    let handle = handle.into();
    run(p, LaunchFinish { handle })
}

pub fn update_data(p: &Platform, handle: u32, address: u64, len: u32) -> Status {
    let update = LaunchUpdateData {
        handle: handle.into(),
        data_paddr: address.into(),
        data_len: len.into(),
        ..Default::default()
    };
    run(p, update)
}

pub fn update_vmsa(p: &Platform, handle: u32, address: u64, len: u32) -> Status {
    let update = LaunchUpdateVmsa {
        handle: handle.into(),
        vmsa_paddr: address.into(),
        vmsa_len: len.into(),
        ..Default::default()
    };
    run(p, update)
}

pub fn launch_measure(p: &Platform, handle: u32, address: u64) -> Status {
    let measure = LaunchMeasure {
        handle: handle.into(),
        measure_paddr: address.into(),
        measure_len: 48.into(),
        ..Default::default()
    };
    run(p, measure)
}

/// ATTESTATION into scratch memory.
pub fn attestation(handle: u32) -> Attestation {
    Attestation {
        handle: handle.into(),
        paddr: SCRATCH.into(),
        length: 0xd0.into(),
        ..Default::default()
    }
}

/// Handle of a guest that runs.
pub fn running(p: &Platform, policy: SevPolicy, asid: u32, content: &[u8]) -> u32 {
    let handle = launch_start(p, policy, asid);
    p.host_write(GUEST, content).unwrap();
    update_data(p, handle, GUEST, content.len() as u32)
        .ok()
        .unwrap();
    launch_measure(p, handle, SCRATCH).ok().unwrap();
    launch_finish(p, handle).ok().unwrap();
    handle
}

pub fn guest_status(p: &Platform, handle: u32) -> GuestStatus {
    let status = GuestStatus {
        handle: handle.into(),
        ..Default::default()
    };
    let (status, out) = run_out(p, status);
    status.ok().unwrap();
    out
}

pub fn guest_state(p: &Platform, handle: u32) -> u8 {
    guest_status(p, handle).state
}

/// A guest owner for a platform.
pub fn owner(p: &Platform, policy: SevPolicy) -> GuestOwner {
    let policy = policy.bits();
    let mut rng = rand_chacha::ChaCha20Rng::seed_from_u64(policy.into());
    GuestOwner::new(&p.pdh_cert(), policy, &mut rng).unwrap()
}

/// Puts an owner's certificate and session into memory for a LAUNCH_START.
pub fn owner_start(p: &Platform, owner: &GuestOwner, policy: SevPolicy) -> LaunchStart {
    p.host_write(SCRATCH, owner.certificate().as_bytes())
        .unwrap();
    p.host_write(SCRATCH + 0x1000, &owner.session().to_bytes())
        .unwrap();
    LaunchStart {
        policy,
        dh_cert_paddr: SCRATCH.into(),
        dh_cert_len: (CERT_LEN as u32).into(),
        session_paddr: (SCRATCH + 0x1000).into(),
        session_len: (SESSION_LEN as u32).into(),
        ..Default::default()
    }
}

/// PDH_CERT_EXPORT into scratch memory.
pub fn pdh_cert_export() -> PdhCertExport {
    PdhCertExport {
        pdh_cert_paddr: SCRATCH.into(),
        pdh_cert_length: (CERT_LEN as u32).into(),
        certs_paddr: (SCRATCH + 0x1000).into(),
        certs_length: (3 * CERT_LEN as u32).into(),
        ..Default::default()
    }
}

/// SEND_START towards another platform, whose certificates are put into memory.
pub fn send_start(from: &Platform, to: &Platform, handle: u32) -> SendStart {
    run(to, pdh_cert_export()).ok().unwrap();
    let mut certs = vec![0; 0x1000 + 3 * CERT_LEN];
    to.host_read(SCRATCH, &mut certs).unwrap();
    from.host_write(SCRATCH, &certs).unwrap();
    from.host_write(SCRATCH + 0x4000, &to.vendor_certs())
        .unwrap();
    SendStart {
        handle: handle.into(),
        pdh_cert_paddr: SCRATCH.into(),
        pdh_cert_len: (CERT_LEN as u32).into(),
        plat_cert_paddr: (SCRATCH + 0x1000).into(),
        plat_cert_len: (3 * CERT_LEN as u32).into(),
        amd_cert_paddr: (SCRATCH + 0x4000).into(),
        amd_cert_len: (2 * CERT_LEN as u32).into(),
        session_paddr: (SCRATCH + 0x6000).into(),
        session_len: (SESSION_LEN as u32).into(),
        ..Default::default()
    }
}

/// Carries the sender's session over and starts receiving.
pub fn receive_start(from: &Platform, to: &Platform, policy: SevPolicy) -> (Status, u32) {
    let mut session = [0; SESSION_LEN];
    from.host_read(SCRATCH + 0x6000, &mut session).unwrap();
    to.host_write(SCRATCH, from.pdh_cert().as_bytes()).unwrap();
    to.host_write(SCRATCH + 0x1000, &session).unwrap();
    let start = ReceiveStart {
        policy,
        pdh_cert_paddr: SCRATCH.into(),
        pdh_cert_len: (CERT_LEN as u32).into(),
        session_paddr: (SCRATCH + 0x1000).into(),
        session_len: (SESSION_LEN as u32).into(),
        ..Default::default()
    };
    let (status, out) = run_out(to, start);
    (status, out.handle.get())
}

/// A command that makes or takes a packet, header and data in scratch memory.
pub fn packet<C: Packet>(handle: u32, guest: u64, len: u32) -> C {
    C::new(handle, guest, len)
}

/// The commands that make or take a packet; their fields are the same.
pub trait Packet: CommandStruct {
    fn new(handle: u32, guest: u64, len: u32) -> Self;
}

macro_rules! packets {
    ($($Name:ident),+) => { $(impl Packet for $Name {
        fn new(handle: u32, guest: u64, len: u32) -> Self {
            Self {
                handle: handle.into(),
                hdr_paddr: SCRATCH.into(),
                hdr_len: 52.into(),
                guest_paddr: guest.into(),
                guest_len: len.into(),
                trans_paddr: (SCRATCH + 0x1000).into(),
                trans_len: len.into(),
                ..Default::default()
            }
        }
    })+ };
}
packets!(
    LaunchSecret,
    SendUpdateData,
    SendUpdateVmsa,
    ReceiveUpdateData,
    ReceiveUpdateVmsa
);

/// A context for an SNP guest in a page that the firmware is given.
pub fn gctx_create(p: &Platform, gctx: u64) {
    p.rmpupdate(gctx, &RmpUpdate::firmware()).unwrap();
    let gctx_paddr = page(gctx);
    run(p, SnpGctxCreate { gctx_paddr }).ok().unwrap();
}

pub fn snp_launch_start(p: &Platform, gctx: u64, policy: SnpPolicy) -> Status {
    let start = SnpLaunchStart {
        gctx_paddr: page(gctx),
        policy,
        ..Default::default()
    };
    run(p, start)
}

pub fn snp_activate(p: &Platform, gctx: u64, asid: u32) -> Status {
    let (gctx_paddr, asid) = (page(gctx), asid.into());
    run(p, SnpActivate { gctx_paddr, asid })
}

pub fn snp_finish(p: &Platform, gctx: u64) -> Status {
    let finish = SnpLaunchFinish {
        gctx_paddr: page(gctx),
        ..Default::default()
    };
    run(p, finish)
}

pub fn snp_decommission(p: &Platform, gctx: u64) -> Status {
    let gctx_paddr = page(gctx);
    run(p, SnpDecommission { gctx_paddr })
}

/// SNP_VLEK_LOAD of a seed that the vendor wrapped for this platform.
pub fn vlek_load(p: &Platform, seed: &VlekSeed) -> SnpVlekLoad {
    let wrapped = p.wrap_vlek(seed, [7; 12]);
    p.host_write(SCRATCH, wrapped.as_bytes()).unwrap();
    SnpVlekLoad {
        vlek_wrapped_address: SCRATCH.into(),
        ..Default::default()
    }
}

/// An SNP guest in LAUNCH that is active, with its context page at `gctx`.
pub fn snp_launch(p: &Platform, gctx: u64, policy: SnpPolicy, asid: u32) {
    gctx_create(p, gctx);
    snp_launch_start(p, gctx, policy).ok().unwrap();
    snp_activate(p, gctx, asid).ok().unwrap();
}

/// SNP_LAUNCH_UPDATE of a small page.
pub fn snp_update(gctx: u64, spa: u64, page_type: PageType) -> SnpLaunchUpdate {
    SnpLaunchUpdate {
        gctx_paddr: page(gctx),
        flags: SnpLaunchUpdateFlags::of(page_type),
        page_paddr: page(spa),
        ..Default::default()
    }
}

/// Adds a page at a system address to an SNP guest in LAUNCH.
pub fn snp_add(
    p: &Platform,
    gctx: u64,
    asid: u32,
    spa: u64,
    gpa: u64,
    page_type: PageType,
) -> Status {
    p.rmpupdate(spa, &RmpUpdate::pre_guest(asid, gpa)).unwrap();
    run(p, snp_update(gctx, spa, page_type))
}
