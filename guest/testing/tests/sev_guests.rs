//! SEV guests: mistakes by name, properties of memory, guest messages, any requests.

use kvm_ops_guest::sev::msr::Features;
use kvm_ops_guest::sev::{Permissions, Pvalidate, RmpCode, Rmpadjust, SevGuest, Versions, Vmpl};
use kvm_ops_guest::{GpaRange, PageSize};
use kvm_ops_guest_test::sev::platform::message::GuestChannel;
use kvm_ops_guest_test::sev::{
    BuildError, Fault, Reply, StopCause, TestSev, TestSevBuilder, Vcpu, hosts,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

const PAGE: u64 = 0x1000;
const LARGE: u64 = 2 << 20;

fn start(guest: TestSevBuilder) -> TestSev {
    guest.build().expect("a guest")
}

fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

fn message<T: std::fmt::Debug>(
    guest: TestSevBuilder,
    code: fn(&mut Vcpu) -> Result<T, Fault>,
) -> String {
    let failed = code(&mut start(guest).vcpu());
    format!("{:?}", failed.expect_err("a mistake"))
}

#[test]
fn mistakes_of_an_snp_guest_are_named() {
    let assigned = || TestSev::snp().assigned(0x8000..0x9000);
    assert_eq!(
        message(assigned(), |cpu| cpu.write(0x8010, b"mine")),
        "Fault(#VC at a private write at 0x8010: the guest has not validated the page (PVALIDATE))"
    );
    // Memory that the host gives at the first touch is not validated either.
    let said = message(TestSev::snp(), |cpu| cpu.read(0x5000, 1));
    assert!(said.contains("has not validated"), "{said}");
    let said = message(assigned(), |cpu| cpu.write_shared(0x8000, b"public"));
    assert!(
        said.contains("the page is private: the guest has not made it shared (page state change)"),
        "{said}"
    );
    let said = message(TestSev::snp().validated(0x8000..0x9000), |cpu| {
        let page = range(0x8000, PAGE);
        cpu.kernel().share(page, |_| ()).expect("shared");
        cpu.read(0x8000, 1)
    });
    assert!(
        said.contains("the guest made it so (page state change)"),
        "{said}"
    );
    let said = message(TestSev::snp().memory(0x10_0000), |cpu| {
        cpu.read(0x10_0000, 1)
    });
    assert!(said.contains("there is no memory"), "{said}");
}

#[test]
fn a_host_that_gives_up_is_named_and_unwinds_the_code() {
    let guest = start(TestSev::snp().host(|_, _| Reply::Stop));
    let stopped = guest.run(|cpu| cpu.kernel().features());
    let said = stopped.expect_err("stops").to_string();
    let expected = "the vcpu stopped: the host does not enter it again after: Features";
    assert_eq!(said, expected);
}

#[test]
fn an_honest_host_negotiates_and_has_snp() {
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    assert_eq!(cpu.kernel().negotiate(Versions::SNP), Ok(2));
    let features = cpu.kernel().features().expect("answers");
    assert!(features.has(Features::SNP));
    cpu.kernel().register_ghcb(0x9000).expect("registered");
    assert_eq!(cpu.kernel().cpuid(1), Ok([0; 4]));
}

#[test]
fn what_only_the_processor_refuses_is_named() {
    let guest = start(TestSev::snp().validated(0x8000..0x9000));
    let operation = Pvalidate {
        gpa: 0x8000,
        size: PageSize::Size4K,
        validate: true,
    };
    let above = guest.vcpu().at_vmpl(1).try_pvalidate(operation);
    let Err(Fault::Stopped(stopped)) = above else {
        panic!("{above:?}");
    };
    assert!(matches!(stopped.cause, StopCause::Refused(_)), "{stopped}");
    let gib = PageSize::Size1G;
    let no_such = guest.vcpu().try_pvalidate(Pvalidate {
        size: gib,
        ..operation
    });
    assert_eq!(no_such.map(|done| done.code), Ok(RmpCode::FAIL_INPUT));
    let adjust = Rmpadjust {
        gpa: 0x8000,
        size: gib,
        target: Vmpl::One,
        permissions: Permissions::ALL,
        vmsa: false,
    };
    assert_eq!(guest.vcpu().try_rmpadjust(adjust), Ok(RmpCode::FAIL_INPUT));
}

#[test]
fn a_guest_gets_its_report_from_the_firmware() {
    const SECRETS: u64 = 0x5000;
    let guest = start(TestSev::snp().secrets(SECRETS).measured(0x8000, b"kernel"));
    let mut cpu = guest.vcpu();
    assert_eq!(cpu.read(0x8000, 8).expect("validated"), b"kernel\0\0");
    let secrets = cpu.read(SECRETS, 4096).expect("validated");
    let secrets: [u8; 4096] = secrets.try_into().expect("a page");
    let mut channel = GuestChannel::from_secrets_page(&secrets, 0).expect("VMPL0");
    let request = channel.report_request(&[7; 64], 0).expect("fits");
    let response = guest
        .hypervisor()
        .guest_request(&request)
        .expect("answered");
    let (status, report) = channel.open_report(&response).expect("authentic");
    assert_eq!(status, 0);
    const REPORT_DATA: usize = 0x50;
    assert_eq!(report[REPORT_DATA..][..64], [7; 64]);
    // A message that is carried twice is refused, and so is one that does not fit.
    assert!(guest.hypervisor().guest_request(&request).is_err());
    assert!(guest.hypervisor().guest_request(&[0; 4097]).is_err());
}

#[test]
fn what_needs_snp_is_refused_without_it() {
    let refused = |guest: TestSevBuilder| guest.build().expect_err("refused");
    assert_eq!(
        refused(TestSev::sev().secrets(0x8000)),
        BuildError::NeedsSnp
    );
    let assigned = TestSev::sev_es().assigned(0x8000..0x9000);
    assert_eq!(refused(assigned), BuildError::NeedsSnp);
    let twice = TestSev::snp().secrets(0x8000).validated(0x8000..0x9000);
    assert_eq!(
        refused(twice).to_string(),
        "page 0x8000 is in the layout twice"
    );
    assert!(matches!(
        refused(TestSev::snp().memory(1)),
        BuildError::Memory(1)
    ));
}

#[test]
fn measured_pages_of_guests_without_snp_are_encrypted_from_the_start() {
    for guest in [TestSev::sev(), TestSev::sev_es()] {
        let guest = start(guest.measured(0x8000, b"kernel").shared(0x9000..0xa000));
        let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
        assert_eq!(cpu.read(0x8000, 6).expect("ours"), b"kernel");
        let spa = host.behind(0x8000).expect("mapped");
        assert_ne!(host.read(spa, 6).expect("ram"), b"kernel");
        cpu.write_shared(0x9000, b"public").expect("shared");
        let spa = host.behind(0x9000).expect("mapped");
        assert_eq!(host.read(spa, 6).expect("ram"), b"public");
    }
}

#[test]
fn vcpus_convert_their_memory_at_the_same_time() {
    let guest = start(TestSev::snp());
    std::thread::scope(|scope| {
        for n in 0..4 {
            let guest = &guest;
            scope.spawn(move || {
                let mut cpu = guest.vcpu();
                let mine = range((1 + n) * LARGE, 8 * PAGE);
                cpu.kernel().unshare(mine, |_| ()).expect("private");
                for round in 0..4_u8 {
                    cpu.write(mine.start(), &[round; 8]).expect("ours");
                    let part = range(mine.start() + PAGE, 2 * PAGE);
                    cpu.kernel().share(part, |_| ()).expect("shared");
                    cpu.write_shared(part.start(), &[round; 8]).expect("shared");
                    cpu.kernel().unshare(part, |_| ()).expect("private");
                    assert_eq!(cpu.read(mine.start(), 8).expect("ours"), [round; 8]);
                }
            });
        }
    });
}

/// Conversions and writes over eight pages.
#[derive(Clone, Copy, Debug)]
enum Step {
    Convert(u64, u64, bool),
    Write(u64, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pages = (0u64..8).prop_flat_map(|first| (Just(first), 1..=8 - first));
    let step = prop_oneof![
        (pages, any::<bool>())
            .prop_map(|((first, count), share)| { Step::Convert(first, count, share) }),
        (0u64..8, any::<u8>()).prop_map(|(page, byte)| Step::Write(page, byte)),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memory_is_what_the_guest_made_of_it(steps in steps(), large: bool, eager: bool) {
        let guest = match large {
            true => TestSev::snp().assigned_large(LARGE..2 * LARGE),
            false => TestSev::snp().assigned(LARGE..LARGE + 8 * PAGE),
        };
        let guest = match eager {
            true => guest.host(hosts::large_pages()),
            false => guest,
        };
        let guest = start(guest);
        let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
        cpu.kernel().validate(range(LARGE, 8 * PAGE)).expect("validated");
        // Private pages by number, with their first byte if it was written.
        let mut private: BTreeMap<u64, Option<u8>> = (0..8).map(|page| (page, None)).collect();
        for step in steps {
            match step {
                Step::Convert(first, count, share) => {
                    let pages = first..first + count;
                    let ready = |page: u64| private.contains_key(&page) == share;
                    if !pages.clone().all(ready) {
                        continue;
                    }
                    let range = range(LARGE + first * PAGE, count * PAGE);
                    if share {
                        cpu.kernel().share(range, |_| ()).expect("shared");
                        private.retain(|page, _| !pages.contains(page));
                    } else {
                        cpu.kernel().unshare(range, |_| ()).expect("private");
                        private.extend(pages.map(|page| (page, None)));
                    }
                }
                Step::Write(page, byte) => {
                    let at = LARGE + page * PAGE;
                    if let Some(held) = private.get_mut(&page) {
                        cpu.write(at, &[byte]).expect("ours");
                        *held = Some(byte);
                    } else {
                        cpu.write_shared(at, &[byte]).expect("shared");
                        let spa = host.behind(at).expect("mapped");
                        prop_assert_eq!(host.read(spa, 1).expect("ram"), [byte]);
                    }
                }
            }
            for page in 0..8 {
                let at = LARGE + page * PAGE;
                prop_assert_eq!(host.is_shared(at), !private.contains_key(&page));
                if let Some(Some(byte)) = private.get(&page) {
                    prop_assert_eq!(cpu.read(at, 1).expect("ours"), [*byte]);
                }
            }
        }
    }

    #[test]
    fn no_requests_and_no_addresses_break_anything(
        calls in prop::collection::vec((any::<u64>(), 0u64..0x110, any::<[u64; 4]>(), 0u64..0x30), 1..40),
        kind in 0u8..3,
    ) {
        let guest = match kind {
            0 => TestSev::sev(),
            1 => TestSev::sev_es(),
            _ => TestSev::snp(),
        };
        let guest = start(guest.memory(0x20_000).validated(0x8000..0xa000));
        let mut cpu = guest.vcpu();
        for (noise, code, args, page) in calls {
            let at = page * PAGE + (noise & 0xFFF);
            let _ = cpu.vmgexit(noise & !0xFFF | code);
            let _ = cpu.vmgexit(((1 + (noise & 1)) << 52) + page * PAGE + 0x14);
            let _ = cpu.vmmcall(noise % 16, args);
            let _ = cpu.vmmcall(12, [page * PAGE, args[1] % 8, args[2], 0]);
            for gpa in [at, noise] {
                let _ = cpu.read(gpa, 9);
                let _ = cpu.write(gpa, &[1; 9]);
                let _ = cpu.read_shared(gpa, 9);
                let _ = cpu.write_shared(gpa, &[1; 9]);
                for size in PageSize::DESCENDING {
                    let validate = noise & 2 != 0;
                    let _ = cpu.try_pvalidate(Pvalidate { gpa, size, validate });
                    let operation = Rmpadjust {
                        gpa,
                        size,
                        target: Vmpl::Two,
                        permissions: Permissions::READ,
                        vmsa: noise & 4 != 0,
                    };
                    let _ = cpu.try_rmpadjust(operation);
                }
            }
        }
        // The host is whole, whatever the guest did.
        let whole = SevGuest::new(guest.vcpu(), true).sev_info();
        prop_assert!(whole.is_ok());
    }
}
