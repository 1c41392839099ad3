//! SNP_VLEK_LOAD, and the key that signs a report.

mod common;

use common::guest::*;
use common::*;
use soft_amd_sp::attestation::{CertChain, Report, SigningKey, VerifyError, verify_report};
use soft_amd_sp::measure::PageType;
use soft_amd_sp::message::{GuestChannel, KeySel, ReportRequest};
use soft_amd_sp::{Platform, RmpUpdate, RootOfTrust, Status, TcbVersion, VlekSeed};

/// Asks for a report; the status inside of the response on refusal.
fn report(p: &Platform, guest: &mut GuestChannel, key_sel: KeySel) -> Result<Vec<u8>, u32> {
    let request = ReportRequest {
        user_data: [5; 64],
        key_sel,
        ..Default::default()
    };
    let response = exchange(p, &guest.ask(&request).unwrap()).unwrap();
    match guest.open_report(&response).unwrap() {
        (0, report) => Ok(report),
        (status, _) => Err(status),
    }
}

fn signer(report: &[u8]) -> SigningKey {
    Report::from_bytes(report.try_into().unwrap()).signing_key
}

fn verify(report: &[u8], chain: &CertChain) -> Result<Report, VerifyError> {
    verify_report(report, chain, &RootOfTrust::default().ark())
}

fn number(status: Status) -> u32 {
    status.0.into()
}

/// A guest that runs and whose reports the VCEK may not sign.
fn without_vcek(p: &Platform) -> GuestChannel {
    snp_launch(p, GCTX, POLICY, ASID);
    snp_add(p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    let finish = SnpLaunchFinish {
        gctx_paddr: page(GCTX),
        flags: SnpLaunchFinishFlags::VCEK_DIS,
        ..Default::default()
    };
    run(p, finish).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    channel(p, 0)
}

/// Flags of SNP_PLATFORM_STATUS.
fn status_flags(p: &Platform) -> SnpStatusFlags {
    let at = 0x60_0000;
    p.rmpupdate(at, &RmpUpdate::firmware()).unwrap();
    let status_paddr = at.into();
    run(p, SnpPlatformStatus { status_paddr }).ok().unwrap();
    let mut out = SnpPlatformStatusPage::default();
    p.host_read(at, zerocopy::IntoBytes::as_mut_bytes(&mut out))
        .unwrap();
    p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
    out.flags
}

#[test]
fn the_signing_key_is_the_one_asked_for_if_it_is_there_and_allowed() {
    use KeySel as Sel;
    let missing = Err(number(Status::INVALID_KEY));
    let unknown = Err(number(Status::INVALID_PARAM));
    let (vcek, vlek) = (Ok(SigningKey::Vcek), Ok(SigningKey::Vlek));
    for (loaded, allowed, answers) in [
        (false, true, [vcek, vcek, missing]),
        (true, true, [vlek, vcek, vlek]),
        (false, false, [missing, missing, missing]),
        (true, false, [vlek, missing, vlek]),
    ] {
        let p = snp(1);
        if loaded {
            let load = vlek_load(&p, &VlekSeed::from_seed(1));
            run(&p, load).ok().unwrap();
        }
        let mut guest = match allowed {
            true => with_channel(&p, 0),
            false => without_vcek(&p),
        };
        for (wanted, expected) in [Sel::ANY, Sel::VCEK, Sel::VLEK].into_iter().zip(answers) {
            let got = report(&p, &mut guest, wanted).map(|bytes| signer(&bytes));
            assert_eq!(got, expected, "{wanted:?}, {loaded} {allowed}");
        }
        let got = report(&p, &mut guest, Sel::from_raw(3));
        assert_eq!(got.map(|bytes| signer(&bytes)), unknown);
    }
}

#[test]
fn a_vlek_report_verifies_with_the_vlek_chain_of_any_chip_of_the_provider() {
    let (p, q) = (snp(1), snp(2));
    assert_eq!(p.vlek_chain(), None);
    for chip in [&p, &q] {
        let load = vlek_load(chip, &VlekSeed::from_seed(1));
        run(chip, load).ok().unwrap();
    }
    let mut guest = with_channel(&p, 0);
    let bytes = report(&p, &mut guest, KeySel::VLEK).unwrap();
    let chain = p.vlek_chain().unwrap();
    assert_eq!(verify(&bytes, &chain).unwrap().report_data, [5; 64]);
    assert_eq!(q.vlek_chain(), Some(chain.clone()));
    assert_eq!(CertChain::from_bytes(&chain.to_bytes()), Ok(chain.clone()));
    // Neither key stands in for the other.
    let vcek = report(&p, &mut guest, KeySel::VCEK).unwrap();
    verify(&vcek, &p.cert_chain()).unwrap();
    assert!(matches!(
        verify(&bytes, &p.cert_chain()),
        Err(VerifyError::Certificate(_))
    ));
    assert!(matches!(
        verify(&vcek, &chain),
        Err(VerifyError::Certificate(_))
    ));
    // Another provider has another key, and so has another security version.
    let load = vlek_load(&q, &VlekSeed::from_seed(2));
    run(&q, load).ok().unwrap();
    let other = q.vlek_chain().unwrap();
    assert_eq!(verify(&bytes, &other), Err(VerifyError::Signature));
    let config = SnpConfig {
        reported_tcb: TcbVersion::new(1, 0, 0, 0).0.into(),
        ..Default::default()
    };
    run(&p, config).ok().unwrap();
    let older = p.vlek_chain().unwrap();
    assert_eq!(verify(&bytes, &older), Err(VerifyError::Signature));
}

#[test]
fn a_masked_chip_key_signs_nothing_but_the_vlek_still_does() {
    let p = snp(3);
    let load = vlek_load(&p, &VlekSeed::from_seed(1));
    run(&p, load).ok().unwrap();
    let config = SnpConfig {
        flags: SnpConfigFlags::MASK_CHIP_KEY,
        ..Default::default()
    };
    run(&p, config).ok().unwrap();
    let mut guest = with_channel(&p, 0);
    let vcek = report(&p, &mut guest, KeySel::VCEK).unwrap();
    assert_eq!(verify(&vcek, &p.cert_chain()), Err(VerifyError::Unsigned));
    let vlek = report(&p, &mut guest, KeySel::ANY).unwrap();
    verify(&vlek, &p.vlek_chain().unwrap()).unwrap();
}

#[test]
fn a_seed_is_loaded_unharmed_for_its_chip_and_until_snp_ends() {
    let (p, q) = (snp(4), snp(5));
    let good = vlek_load(&p, &VlekSeed::from_seed(1));
    for at in [0, 0xc, 0x10, 0x18f, 0x190, 0x1a0, 0x1af] {
        let mut byte = [0];
        p.host_read(SCRATCH + at, &mut byte).unwrap();
        p.host_write(SCRATCH + at, &[byte[0] ^ 1]).unwrap();
        assert_eq!(run(&p, good), Status::BAD_MEASUREMENT, "{at:#x}");
        p.host_write(SCRATCH + at, &byte).unwrap();
    }
    let mut wrapped = [0; 0x1b0];
    p.host_read(SCRATCH, &mut wrapped).unwrap();
    q.host_write(SCRATCH, &wrapped).unwrap();
    assert_eq!(run(&q, good), Status::BAD_MEASUREMENT);
    let short = SnpVlekLoad {
        length: Length::from_raw(0xf),
        ..good
    };
    assert_eq!(run(&p, short), Status::INVALID_LEN);
    let newer = SnpVlekLoad {
        vlek_wrapped_version: 1,
        ..good
    };
    assert_eq!(run(&p, newer), Status::INVALID_PARAM);
    let outside = SnpVlekLoad {
        vlek_wrapped_address: (p.memory_len() - 0x100).into(),
        ..good
    };
    assert_eq!(run(&p, outside), Status::INVALID_ADDRESS);
    assert!(!status_flags(&p).contains(SnpStatusFlags::VLEK_EN));
    run(&p, good).ok().unwrap();
    assert!(status_flags(&p).contains(SnpStatusFlags::VLEK_EN));
    p.run(&mut SnpShutdown).ok().unwrap();
    assert_eq!(p.vlek_chain(), None);
    assert_eq!(run(&p, good), Status::INVALID_PLATFORM_STATE);
}
