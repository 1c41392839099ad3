//! Persistent keys, ownership, exported certificates.

mod common;

use common::*;
use soft_amd_sp::crypto::{CERT_LEN, CertUsage, Certificate, PrivateKey};
use soft_amd_sp::{Platform, Status};

const NV: u64 = 0x60_0000;
const NV_LEN: usize = 32 << 10;

fn init_ex(p: &Platform) -> Status {
    init_ex_with(p, NV_LEN as u32)
}

fn init_ex_with(p: &Platform, nv_length: u32) -> Status {
    let init = InitEx {
        nv_paddr: NV.into(),
        nv_length: nv_length.into(),
        ..Default::default()
    };
    run(p, init)
}

fn nv(p: &Platform) -> Vec<u8> {
    let mut out = vec![0; NV_LEN];
    p.host_read(NV, &mut out).unwrap();
    out
}

fn shutdown(p: &Platform) {
    p.run(&mut Shutdown).ok().unwrap();
}

#[test]
fn keys_survive_in_the_buffer_of_init_ex() {
    let p = builder(1).build().unwrap();
    p.host_write(NV, &[0xff; NV_LEN]).unwrap();
    init_ex(&p).ok().unwrap();
    let (pdh, saved) = (p.pdh_cert(), nv(&p));
    assert_ne!(saved, vec![0xff; NV_LEN]);

    // New keys, then the saved ones again.
    p.run(&mut PekGen).ok().unwrap();
    let other = p.pdh_cert();
    assert_ne!(other, pdh);
    assert_ne!(nv(&p), saved);
    shutdown(&p);
    p.host_write(NV, &saved).unwrap();
    init_ex(&p).ok().unwrap();
    assert_eq!(p.pdh_cert(), pdh);

    // Another chip cannot read them.
    let q = builder(2).build().unwrap();
    q.host_write(NV, &saved).unwrap();
    assert_eq!(init_ex(&q), Status::SECURE_DATA_INVALID);
}

#[test]
fn damaged_persistent_data_is_reported_once_and_replaced() {
    let p = builder(3).build().unwrap();
    p.host_write(NV, &[0xff; NV_LEN]).unwrap();
    init_ex(&p).ok().unwrap();
    let saved = nv(&p);
    for at in [0, 0x10, 0x20, 0x40, NV_LEN - 1] {
        shutdown(&p);
        let mut damaged = saved.clone();
        damaged[at] ^= 1;
        p.host_write(NV, &damaged).unwrap();
        assert_eq!(init_ex(&p), Status::SECURE_DATA_INVALID, "{at:#x}");
        init_ex(&p).ok().unwrap();
    }
    shutdown(&p);
    assert_eq!(init_ex_with(&p, 0x1000), Status::INVALID_LEN);
}

#[test]
fn the_exported_chain_leads_from_pdh_to_the_vendor() {
    let p = sev(4);
    let query = run_out(&p, PdhCertExport::default());
    assert_eq!(query.0, Status::INVALID_LEN);
    assert_eq!(query.1.pdh_cert_length, CERT_LEN as u32);
    assert_eq!(query.1.certs_length, 3 * CERT_LEN as u32);
    run(&p, pdh_cert_export()).ok().unwrap();
    let cert = |at| {
        let mut bytes = [0; CERT_LEN];
        p.host_read(at, &mut bytes).unwrap();
        Certificate::from_bytes(&bytes).unwrap()
    };
    let chain = |i: usize| cert(SCRATCH + 0x1000 + (i * CERT_LEN) as u64);
    let (pdh, pek, oca, cek) = (cert(SCRATCH), chain(0), chain(1), chain(2));
    assert_eq!(pdh, p.pdh_cert());
    assert!(pdh.is_signed_by(&pek));
    assert!(pek.is_signed_by(&oca) && pek.is_signed_by(&cek));
    let vendor = p.cert_chain();
    assert!(cek.is_signed_by(&vendor.ask) && vendor.ask.is_signed_by(&vendor.ark));
    assert!(!cek.is_signed_by(&vendor.ark));
}

#[test]
fn an_owner_certifies_the_platform_once() {
    let p = sev(5);
    let owner = PrivateKey::from_scalar(&[5; 48]).unwrap();
    let oca =
        Certificate::new(CertUsage::Oca, &owner.public(), 0, 0).signed_by(CertUsage::Oca, &owner);
    let query = run_out(&p, PekCsr::default());
    assert_eq!(
        (query.0, query.1.csr_length.get()),
        (Status::INVALID_LEN, CERT_LEN as u32)
    );
    let csr_paddr = SCRATCH.into();
    let csr_length = (CERT_LEN as u32).into();
    let csr = PekCsr {
        csr_paddr,
        csr_length,
    };
    run(&p, csr).ok().unwrap();
    let mut request = [0; CERT_LEN];
    p.host_read(SCRATCH, &mut request).unwrap();
    let request = Certificate::from_bytes(&request).unwrap();

    let import = |pek: &Certificate, oca: &Certificate| {
        p.host_write(SCRATCH, pek.as_bytes()).unwrap();
        p.host_write(SCRATCH + 0x1000, oca.as_bytes()).unwrap();
        let import = PekCertImport {
            pek_cert_paddr: SCRATCH.into(),
            pek_cert_length: (CERT_LEN as u32).into(),
            oca_cert_paddr: (SCRATCH + 0x1000).into(),
            oca_cert_length: (CERT_LEN as u32).into(),
            ..Default::default()
        };
        run(&p, import)
    };
    let pek = request.clone().signed_by(CertUsage::Oca, &owner);
    let stranger =
        Certificate::new(CertUsage::Pek, &owner.public(), 0, 0).signed_by(CertUsage::Oca, &owner);
    assert_eq!(import(&request, &oca), Status::BAD_SIGNATURE);
    assert_eq!(import(&stranger, &oca), Status::INVALID_CERTIFICATE);
    assert_eq!(import(&oca, &oca), Status::INVALID_CERTIFICATE);
    let flags = || run_out(&p, PlatformStatus::default()).1.flags.bits();
    assert_eq!(flags(), 1 << 8);
    import(&pek, &oca).ok().unwrap();
    assert_eq!(flags(), 1 << 8 | 1);
    assert_eq!(import(&pek, &oca), Status::ALREADY_OWNED);
    assert!(p.pek_cert().is_signed_by(&oca));
    assert!(p.pdh_cert().is_signed_by(&p.pek_cert()));
    // A new PEK ends the ownership.
    p.run(&mut PekGen).ok().unwrap();
    assert_eq!(flags(), 1 << 8);
}

#[test]
fn get_id_reports_one_identity_per_chip() {
    let id = |p: &Platform| {
        let (id_paddr, id_length) = (SCRATCH.into(), 64.into());
        let get = GetId {
            id_paddr,
            id_length,
        };
        run(p, get).ok().unwrap();
        let mut out = [0; 64];
        p.host_read(SCRATCH, &mut out).unwrap();
        out
    };
    let (p, q) = (builder(6).build().unwrap(), builder(7).build().unwrap());
    assert_eq!(id(&p), id(&builder(6).build().unwrap()));
    assert_ne!(id(&p), id(&q));
}
