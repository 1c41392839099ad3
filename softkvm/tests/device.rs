//! `/dev/sev`: what its commands answer, and what they change.

mod common;

use common::World;
use common::psp::{INVALID_LEN, bytes, certificates, done, issue};
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::Kernel;
use kvm_ops_uapi::psp::{self, *};
use kvm_ops_uapi::{Errno, U32, U64};
use zerocopy::IntoBytes;

fn world() -> (SimHost, World) {
    let host = SimHost::new(Vendor::Amd);
    let world = World::of(&Kernel::new(host.clone()));
    (host, world)
}

fn blob(address: u64, length: u32) -> Blob {
    Blob {
        address: U64::new(address),
        length: U32::new(length),
    }
}

fn status(w: &World) -> Status {
    done(w, psp::PLATFORM_STATUS, &Status::default())
}

#[test]
fn the_platforms_state_follows_its_guests() {
    let (_, w) = world();
    let fresh = status(&w);
    assert_eq!((fresh.state, fresh.guest_count.get()), (1, 0));
    assert_ne!(fresh.flags.get() & 1 << 8, 0, "SEV-ES is initialised");
    let vm = w.guest(2);
    w.launch(vm, 0);
    let working = status(&w);
    assert_eq!((working.state, working.guest_count.get()), (2, 1));
    w.task.close(vm).unwrap();
    assert_eq!(status(&w).guest_count.get(), 0);
}

#[test]
fn lengths_are_asked_for_without_a_buffer_and_then_fit() {
    let (_, w) = world();
    for cmd in [psp::PEK_CSR, psp::GET_ID2] {
        let (answer, error, told) = issue(&w, cmd, &Blob::default());
        assert_eq!((answer, error), (Err(Errno::EIO), INVALID_LEN), "{cmd}");
        let len = told.length.get();
        let room = w.task.map(len as usize);
        let back = done(&w, cmd, &blob(room, len));
        assert_eq!(back.length.get(), len);
        assert_ne!(bytes(&w, room, len), vec![0; len as usize]);
        let (answer, error, told) = issue(&w, cmd, &blob(room, len - 1));
        assert_eq!((answer, error), (Err(Errno::EIO), INVALID_LEN), "{cmd}");
        assert_eq!(told.length.get(), len);
    }
}

#[test]
fn new_keys_give_new_certificates_and_a_reset_gives_them_all() {
    let (_, w) = world();
    let first = certificates(&w);
    assert_eq!(certificates(&w), first);
    done(&w, psp::PDH_GEN, &U32::ZERO);
    let second = certificates(&w);
    assert_ne!(second.0, first.0);
    assert_eq!(second.1, first.1, "its chain is older than the key");
    done(&w, psp::PEK_GEN, &U32::ZERO);
    let third = certificates(&w);
    assert_ne!(third.1, second.1);
    for _ in 0..2 {
        done(&w, psp::FACTORY_RESET, &U32::ZERO);
        assert_eq!(status(&w).state, 0, "not initialised until it is used");
    }
    assert_ne!(certificates(&w).1, third.1);
    assert_eq!(status(&w).state, 0, "for the command alone");
    let vm = w.guest(3);
    w.launch(vm, 4);
    assert_eq!(status(&w).state, 2, "guests are launched as before");
}

#[test]
fn a_certificate_that_is_none_is_firmwares_to_refuse() {
    let (_, w) = world();
    let junk = w.task.map(64);
    let args = PekCertImport {
        pek_cert: U64::new(junk),
        pek_cert_len: U32::new(64),
        oca_cert: U64::new(junk),
        oca_cert_len: U32::new(64),
    };
    let (answer, error, _) = issue(&w, psp::PEK_CERT_IMPORT, &args);
    assert_eq!(answer, Err(Errno::EIO));
    assert_ne!(error, 0);
}

#[test]
fn both_forms_of_the_identity_are_one() {
    let (_, w) = world();
    let ids = done(&w, psp::GET_ID, &Ids::default());
    let room = w.task.map(4096);
    let len = done(&w, psp::GET_ID2, &blob(room, 4096)).length.get();
    assert_eq!(ids.as_bytes()[..len as usize], bytes(&w, room, len)[..]);
}

#[test]
fn snps_status_follows_its_configuration() {
    let (_, w) = world();
    let before = done(&w, psp::SNP_PLATFORM_STATUS, &SnpStatus::default());
    assert_eq!((before.state, before.is_rmp_initialized), (1, 1));
    assert_eq!(before.current_tcb_version, before.reported_tcb_version);
    let config = SnpConfig {
        reported_tcb: U64::ZERO,
        ..SnpConfig::default()
    };
    done(&w, psp::SNP_SET_CONFIG, &config);
    done(&w, psp::SNP_COMMIT, &U32::ZERO);
    let higher = SnpConfig {
        reported_tcb: U64::new(u64::MAX),
        ..config
    };
    let (answer, error, _) = issue(&w, psp::SNP_SET_CONFIG, &higher);
    assert_eq!(answer, Err(Errno::EIO));
    assert_ne!(error, 0, "firmware reports nothing newer than itself");
    let load = SnpVlekLoad {
        len: U32::new(16),
        vlek_wrapped: U64::new(w.task.map(432)),
        ..SnpVlekLoad::default()
    };
    let (answer, error, _) = issue(&w, psp::SNP_VLEK_LOAD, &load);
    assert_eq!(answer, Err(Errno::EIO), "zeros are no wrapped key");
    assert_ne!(error, 0);
}

#[test]
fn no_memory_of_the_machine_is_left_with_firmware() {
    let (host, w) = world();
    let free = || kvm_ops::Host::pages(&host).map(|pages| pages.frames_out());
    certificates(&w);
    let before = free();
    for _ in 0..3 {
        certificates(&w);
        done(&w, psp::SNP_PLATFORM_STATUS, &SnpStatus::default());
    }
    assert_eq!(free(), before);
}
