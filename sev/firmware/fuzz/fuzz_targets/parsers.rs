//! Bytes from outside: images, reports, chains, messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soft_amd_sp::RootOfTrust;
use soft_amd_sp::attestation::{CertChain, verify_report};
use soft_amd_sp::crypto::{CERT_LEN, Certificate};
use soft_amd_sp::measure::{KernelHashes, Launch, Ovmf};
use soft_amd_sp::message::{Header, open};

fuzz_target!(|data: &[u8]| {
    let _ = Ovmf::parse(data);
    // Sections may legally cover gigabytes, which would only be slow.
    let small = |o: &Ovmf| o.sections().iter().all(|s| s.size < 1 << 20);
    if Ovmf::parse(data).as_ref().is_ok_and(small) {
        let launch = Launch::new(data)
            .vcpus(2)
            .kernel_hashes(KernelHashes::new(b"k", b"", None));
        let _ = (launch.sev(), launch.sev_es(), launch.snp());
    }
    let _ = Header::parse(data);
    let _ = open(&[0; 32], data);
    if let Some(Ok(bytes)) = data.get(..CERT_LEN).map(<&[u8; CERT_LEN]>::try_from) {
        let _ = Certificate::from_bytes(bytes);
    }
    if let Some((chain, report)) = data.split_at_checked(CertChain::LEN) {
        if let Ok(chain) = CertChain::from_bytes(chain) {
            assert!(verify_report(report, &chain, &RootOfTrust::default().ark()).is_err());
        }
    }
});
