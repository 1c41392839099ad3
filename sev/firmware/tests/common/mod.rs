//! Code that the tests share: platforms in the states they start from.
#![allow(dead_code)]

pub mod guest;

use rand_chacha::rand_core::SeedableRng;
use soft_amd_sp::crypto::{CERT_LEN, GuestOwner, SESSION_LEN};
use soft_amd_sp::{Builder, Command, CommandBuffer, Platform, RmpUpdate, Status, policy};

pub const GUEST: u64 = 0x10_0000;
pub const SCRATCH: u64 = 0x40_0000;
pub const TMR: u64 = 0x20_0000;

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

pub fn init(p: &Platform) -> Status {
    let init = CommandBuffer::new(Command::INIT)
        .with("flags", 1)
        .with("tmr_address", TMR)
        .with("tmr_len", 1 << 20);
    p.run(&mut init.clone())
}

pub fn flush(p: &Platform) {
    p.wbinvd_all();
    p.command(Command::DF_FLUSH, &mut []).ok().unwrap();
}

/// SNP initialised and flushed.
pub fn snp(seed: u64) -> Platform {
    snp_from(builder(seed))
}

pub fn snp_from(builder: Builder) -> Platform {
    let p = builder.build().unwrap();
    p.enable_snp_all();
    p.command(Command::SNP_INIT, &mut []).ok().unwrap();
    p.wbinvd_all();
    p.command(Command::SNP_DF_FLUSH, &mut []).ok().unwrap();
    p
}

/// Runs a command with fields and returns its status.
pub fn run(p: &Platform, command: Command, fields: &[(&str, u64)]) -> Status {
    run_out(p, command, fields).0
}

pub fn run_out(p: &Platform, command: Command, fields: &[(&str, u64)]) -> (Status, CommandBuffer) {
    let mut buffer = CommandBuffer::new(command);
    for (name, value) in fields {
        assert!(buffer.get(name).is_some(), "{command} has no {name}");
        buffer = buffer.with(name, *value);
    }
    (p.run(&mut buffer), buffer)
}

/// A guest in LUPDATE that is active.
pub fn launch_start(p: &Platform, policy: u32, asid: u32) -> u32 {
    let (status, buffer) = run_out(p, Command::LAUNCH_START, &[("policy", policy.into())]);
    status.ok().unwrap();
    let handle = buffer.get("handle").unwrap() as u32;
    activate(p, handle, asid).ok().unwrap();
    handle
}

pub fn activate(p: &Platform, handle: u32, asid: u32) -> Status {
    run(
        p,
        Command::ACTIVATE,
        &[("handle", handle.into()), ("asid", asid.into())],
    )
}

pub fn on(p: &Platform, command: Command, handle: u32) -> Status {
    run(p, command, &[("handle", handle.into())])
}

/// Handle, ASID and memory of a guest that runs.
pub fn running(p: &Platform, policy: u32, asid: u32, content: &[u8]) -> u32 {
    let handle = launch_start(p, policy, asid);
    p.host_write(GUEST, content).unwrap();
    let (at, len) = (GUEST, content.len() as u64);
    let fields = [("handle", handle.into()), ("address", at), ("len", len)];
    run(p, Command::LAUNCH_UPDATE_DATA, &fields).ok().unwrap();
    let fields = [("handle", handle.into()), ("address", SCRATCH), ("len", 48)];
    run(p, Command::LAUNCH_MEASURE, &fields).ok().unwrap();
    on(p, Command::LAUNCH_FINISH, handle).ok().unwrap();
    handle
}

pub fn guest_state(p: &Platform, handle: u32) -> u64 {
    let (status, buffer) = run_out(p, Command::GUEST_STATUS, &[("handle", handle.into())]);
    status.ok().unwrap();
    buffer.get("state").unwrap()
}

/// A guest owner for a platform.
pub fn owner(p: &Platform, policy: u32) -> GuestOwner {
    let mut rng = rand_chacha::ChaCha20Rng::seed_from_u64(policy.into());
    GuestOwner::new(&p.pdh_cert(), policy, &mut rng).unwrap()
}

/// Puts an owner's certificate and session into memory and returns the fields of LAUNCH_START.
pub fn owner_fields(p: &Platform, owner: &GuestOwner, policy: u32) -> [(&'static str, u64); 5] {
    p.host_write(SCRATCH, owner.certificate().as_bytes())
        .unwrap();
    p.host_write(SCRATCH + 0x1000, &owner.session().to_bytes())
        .unwrap();
    [
        ("policy", policy.into()),
        ("dh_cert", SCRATCH),
        ("dh_cert_len", CERT_LEN as u64),
        ("session", SCRATCH + 0x1000),
        ("session_len", SESSION_LEN as u64),
    ]
}

/// Fields of SEND_START towards another platform, whose certificates are put into memory.
pub fn send_fields(from: &Platform, to: &Platform, handle: u32) -> Vec<(&'static str, u64)> {
    let chain_len = 3 * CERT_LEN as u64;
    let out = CommandBuffer::new(Command::PDH_CERT_EXPORT)
        .with("pdh_cert_address", SCRATCH)
        .with("pdh_cert_len", CERT_LEN as u64)
        .with("cert_chain_address", SCRATCH + 0x1000)
        .with("cert_chain_len", chain_len);
    to.run(&mut out.clone()).ok().unwrap();
    let mut certs = vec![0; 0x1000 + chain_len as usize];
    to.host_read(SCRATCH, &mut certs).unwrap();
    from.host_write(SCRATCH, &certs).unwrap();
    from.host_write(SCRATCH + 0x4000, &to.vendor_certs())
        .unwrap();
    vec![
        ("handle", handle.into()),
        ("pdh_cert_address", SCRATCH),
        ("pdh_cert_len", CERT_LEN as u64),
        ("plat_certs_address", SCRATCH + 0x1000),
        ("plat_certs_len", chain_len),
        ("amd_certs_address", SCRATCH + 0x4000),
        ("amd_certs_len", 2 * CERT_LEN as u64),
        ("session_address", SCRATCH + 0x6000),
        ("session_len", SESSION_LEN as u64),
    ]
}

/// Carries the sender's session over and starts receiving.
pub fn receive_start(from: &Platform, to: &Platform, policy: u32) -> (Status, u32) {
    let mut session = [0; SESSION_LEN];
    from.host_read(SCRATCH + 0x6000, &mut session).unwrap();
    to.host_write(SCRATCH, from.pdh_cert().as_bytes()).unwrap();
    to.host_write(SCRATCH + 0x1000, &session).unwrap();
    let (status, buffer) = run_out(
        to,
        Command::RECEIVE_START,
        &[
            ("policy", policy.into()),
            ("pdh_cert_address", SCRATCH),
            ("pdh_cert_len", CERT_LEN as u64),
            ("session_address", SCRATCH + 0x1000),
            ("session_len", SESSION_LEN as u64),
        ],
    );
    (status, buffer.get("handle").unwrap() as u32)
}

/// Fields that SEND_UPDATE, RECEIVE_UPDATE and LAUNCH_UPDATE_SECRET share.
pub fn packet_fields(handle: u32, guest: u64, len: u64) -> Vec<(&'static str, u64)> {
    vec![
        ("handle", handle.into()),
        ("hdr_address", SCRATCH),
        ("hdr_len", 52),
        ("guest_address", guest),
        ("guest_len", len),
        ("trans_address", SCRATCH + 0x1000),
        ("trans_len", len),
    ]
}

pub const NODBG: u32 = policy::NODBG;

/// An SNP guest in LAUNCH that is active, with its context page at `gctx`.
pub fn snp_launch(p: &Platform, gctx: u64, policy: u64, asid: u32) {
    p.rmpupdate(gctx, &RmpUpdate::firmware()).unwrap();
    run(p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", gctx)])
        .ok()
        .unwrap();
    let fields = [("gctx_paddr", gctx), ("policy", policy)];
    run(p, Command::SNP_LAUNCH_START, &fields).ok().unwrap();
    let fields = [("gctx_paddr", gctx), ("asid", asid.into())];
    run(p, Command::SNP_ACTIVATE, &fields).ok().unwrap();
}

/// Adds a page at a system address to an SNP guest in LAUNCH.
pub fn snp_add(p: &Platform, gctx: u64, asid: u32, spa: u64, gpa: u64, page_type: u64) -> Status {
    p.rmpupdate(spa, &RmpUpdate::pre_guest(asid, gpa)).unwrap();
    let fields = [
        ("gctx_paddr", gctx),
        ("flags", page_type << 1),
        ("address", spa),
    ];
    run(p, Command::SNP_LAUNCH_UPDATE, &fields)
}
