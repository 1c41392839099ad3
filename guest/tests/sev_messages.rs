//! Guest messages of SNP guests over the software AMD SP: reports, keys, and hosts in between.

mod common;

use common::range;
use kvm_ops_guest::sev::message::{
    Aes256Gcm, Channel, DerivedKey, KeyFields, KeyRequest, KeySelect, MAX_MESSAGE, MessageError,
    REPORT_LEN, ReportRequest, Request, RootKey, Secrets,
};
use kvm_ops_guest::sev::{GhcbAnswer, GhcbExit, GhcbPort, RequestError, SevGuest, exit_code};
use kvm_ops_guest::{GpaRange, SharedBuffer};
use kvm_ops_guest_test::sev::platform::Status;
use kvm_ops_guest_test::sev::platform::message::{self as firmware, GuestChannel};
use kvm_ops_guest_test::sev::{Exit, Hypervisor, Reply, StopCause, TestSev, TestSevBuilder};
use proptest::prelude::*;
use std::cell::Cell;

const SECRETS: u64 = 0x5000;
const GHCB: u64 = 0x6000;
/// Request, answer, and two pages for certificates.
const BUFFER: u64 = 0x1_0000;

fn builder() -> TestSevBuilder {
    TestSev::snp()
        .secrets(SECRETS)
        .measured(0x8000, b"kernel")
        .shared(GHCB..GHCB + 0x1000)
        .shared(BUFFER..BUFFER + 0x4000)
}

/// A guest with its channel at VMPL0.
struct Asking {
    guest: TestSev,
    channel: Channel<Aes256Gcm>,
}

impl Asking {
    fn new(builder: TestSevBuilder) -> Self {
        Self::at_vmpl(builder, 0)
    }

    fn at_vmpl(builder: TestSevBuilder, vmpl: u8) -> Self {
        let guest = builder.build().expect("a guest");
        let channel = guest.vcpu().channel(SECRETS, vmpl).expect("validated");
        let channel = channel.expect("a key");
        Self { guest, channel }
    }

    fn ask<R: Request>(&mut self, request: &R) -> Result<R::Response, RequestError> {
        self.ask_waiting(request, || false)
    }

    fn ask_waiting<R: Request>(
        &mut self,
        request: &R,
        wait: impl FnMut() -> bool,
    ) -> Result<R::Response, RequestError> {
        let mut memory = self.guest.vcpu().mapping(BUFFER);
        let mut kernel = SevGuest::new(self.guest.vcpu().ghcb(GHCB), true);
        let buffer = range(BUFFER, 0x2000);
        kernel.guest_request(&mut self.channel, buffer, &mut memory, request, wait)
    }

    fn extended(
        &mut self,
        pages: u64,
        certificates: &mut [u8],
    ) -> Result<([u8; REPORT_LEN], usize), RequestError> {
        let mut memory = self.guest.vcpu().mapping(BUFFER);
        let mut kernel = SevGuest::new(self.guest.vcpu().ghcb(GHCB), true);
        kernel.extended_report(
            &mut self.channel,
            range(BUFFER, (2 + pages) * 0x1000),
            &mut memory,
            &ReportRequest::new([3; 64]),
            certificates,
            || false,
        )
    }
}

fn report_data(report: &[u8; REPORT_LEN]) -> &[u8] {
    &report[0x50..0x90]
}

fn key(fields: KeyFields) -> KeyRequest {
    KeyRequest {
        fields,
        ..KeyRequest::default()
    }
}

#[test]
fn a_guest_gets_reports_with_its_data_one_after_another() {
    let mut asking = Asking::new(builder());
    for n in 0..3 {
        let report = asking.ask(&ReportRequest::new([n; 64])).expect("a report");
        assert_eq!(report_data(&report), [n; 64]);
        assert_eq!(asking.channel.sequence(), 2 * (u64::from(n) + 1));
    }
    let exits = asking.guest.take_exits();
    assert_eq!(exits.len(), 3);
    assert!(exits.iter().all(|exit| *exit == Exit::Ghcb { gpa: GHCB }));
}

#[test]
fn the_messages_are_those_that_the_firmwares_own_channel_makes() {
    let key = [0x5A; 32];
    let mut ours = Channel::new(Aes256Gcm::new(&key), 2, 0);
    let theirs = GuestChannel::new(2, key);
    let mut message = [0; MAX_MESSAGE];
    let request = ReportRequest {
        data: [9; 64],
        vmpl: 3,
        key: KeySelect::Vlek,
    };
    let len = ours.seal(&request, &mut message).expect("sealed");
    let same = firmware::ReportRequest {
        user_data: [9; 64],
        vmpl: 3.into(),
        key_sel: firmware::KeySel::VLEK,
        ..Default::default()
    };
    assert_eq!(&message[..len], theirs.ask(&same).expect("sealed"));
    let mut ours = Channel::new(Aes256Gcm::new(&key), 2, 0);
    let request = KeyRequest {
        root: RootKey::Vmrk,
        fields: KeyFields::POLICY | KeyFields::TCB_VERSION,
        vmpl: 1,
        guest_svn: 2,
        tcb_version: 0x1122_3344_5566_7788,
    };
    let len = ours.seal(&request, &mut message).expect("sealed");
    let same = firmware::KeyRequest {
        root_key_select: firmware::RootKeySelect::VMRK,
        guest_field_select: firmware::GuestFieldSelect::GUEST_POLICY
            | firmware::GuestFieldSelect::TCB_VERSION,
        vmpl: 1.into(),
        guest_svn: 2.into(),
        tcb_version: 0x1122_3344_5566_7788.into(),
        ..Default::default()
    };
    assert_eq!(&message[..len], theirs.ask(&same).expect("sealed"));
}

#[test]
fn a_derived_key_comes_again_for_the_same_guest_and_request_only() {
    let derive = |builder: TestSevBuilder, request: &KeyRequest| -> DerivedKey {
        Asking::new(builder).ask(request).expect("a key")
    };
    let fields = key(KeyFields::MEASUREMENT | KeyFields::POLICY);
    let first = derive(builder(), &fields);
    assert_eq!(derive(builder(), &fields), first);
    let others = [
        derive(builder(), &key(KeyFields::NONE)),
        derive(builder(), &KeyRequest { vmpl: 1, ..fields }),
        derive(
            builder(),
            &KeyRequest {
                root: RootKey::Vmrk,
                ..fields
            },
        ),
        derive(builder().seed(2), &fields),
        derive(builder().measured(0x9000, b"another kernel"), &fields),
    ];
    for other in others {
        assert_ne!(other, first);
    }
    assert!(!format!("{first:?}").contains("0"), "a secret is not shown");
}

#[test]
fn what_the_firmware_refuses_is_told_and_the_channel_goes_on() {
    let mut asking = Asking::at_vmpl(builder(), 1);
    // A lower VMPL cannot speak for a higher one.
    let refused = asking.ask(&ReportRequest::new([1; 64]));
    let status = u32::from(Status::INVALID_PARAM.0);
    assert_eq!(refused, Err(MessageError::Firmware(status).into()));
    let request = ReportRequest {
        vmpl: 1,
        ..ReportRequest::new([1; 64])
    };
    assert!(asking.ask(&request).is_ok());
    let svn = KeyRequest {
        vmpl: 1,
        guest_svn: 1,
        ..key(KeyFields::GUEST_SVN)
    };
    assert_eq!(asking.ask(&svn), Err(MessageError::Firmware(status).into()));
}

#[test]
fn a_report_is_signed_by_the_vlek_where_the_host_has_loaded_one() {
    const FLAGS: usize = 0x48;
    let signer = |builder: TestSevBuilder, key| {
        let request = ReportRequest {
            key,
            ..ReportRequest::new([0; 64])
        };
        Asking::new(builder)
            .ask(&request)
            .map(|report| report[FLAGS] >> 2 & 7)
    };
    let missing = MessageError::Firmware(Status::INVALID_KEY.0.into());
    assert_eq!(signer(builder(), KeySelect::Any), Ok(0));
    assert_eq!(signer(builder(), KeySelect::Vlek), Err(missing.into()));
    assert_eq!(signer(builder().vlek(7), KeySelect::Any), Ok(1));
    assert_eq!(signer(builder().vlek(7), KeySelect::Vcek), Ok(0));
}

#[test]
fn an_extended_request_brings_the_hosts_certificates_once_they_have_room() {
    let table: Vec<u8> = (0..0x1800_u32).map(|n| n as u8 ^ 0x5A).collect();
    let mut asking = Asking::new(builder().certificates(&table));
    let mut certificates = vec![0; 0x2000];
    for pages in [0, 1] {
        let needs = asking.extended(pages, &mut certificates);
        assert_eq!(needs, Err(RequestError::Certificates { pages: 2 }));
    }
    // The message has not been used up: the same request again, with more room.
    let (report, len) = asking.extended(2, &mut certificates).expect("a report");
    assert_eq!((report_data(&report), len), (&[3; 64][..], 0x2000));
    assert_eq!(certificates[..table.len()], table);
    // Into less memory, what fits.
    let (_, len) = asking
        .extended(2, &mut certificates[..16])
        .expect("a report");
    assert_eq!(len, 16);
    // A host without certificates needs no pages.
    let mut asking = Asking::new(builder());
    assert_eq!(asking.extended(0, &mut []).map(|(_, len)| len), Ok(0));
}

#[test]
fn a_request_without_an_answer_is_asked_again_and_no_other_one() {
    // The host takes the exit and does nothing.
    let mut asking = Asking::new(builder());
    asking
        .guest
        .set_host(|hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
            Exit::Ghcb { gpa } => {
                hypervisor.answer_ghcb(gpa, GhcbAnswer::default());
                Reply::Enter
            }
            _ => hypervisor.honestly(exit),
        });
    let request = ReportRequest::new([1; 64]);
    assert_eq!(asking.ask(&request), Err(MessageError::Header.into()));
    let other = ReportRequest::new([2; 64]);
    assert_eq!(asking.ask(&other), Err(MessageError::Unanswered.into()));
    let derive = asking.ask(&key(KeyFields::NONE));
    assert_eq!(derive, Err(MessageError::Unanswered.into()));
    // A later stage must not use the number again either.
    assert_eq!(asking.channel.sequence(), 2);
    asking
        .guest
        .set_host(kvm_ops_guest_test::sev::hosts::honest());
    let report = asking.ask(&request).expect("a report");
    assert_eq!(report_data(&report), [1; 64]);
    assert!(asking.ask(&other).is_ok());
}

#[test]
fn a_host_that_hides_an_answer_ends_the_channel_and_learns_nothing() {
    let mut asking = Asking::new(builder());
    asking
        .guest
        .set_host(|hypervisor: &Hypervisor<'_>, exit: &Exit| {
            let reply = hypervisor.honestly(exit);
            if let Exit::Ghcb { .. } = exit {
                let spa = hypervisor.behind(BUFFER + 0x1000).expect("shared");
                hypervisor.write(spa, &[0; 0x1000]).expect("the host's");
            }
            reply
        });
    let request = ReportRequest::new([1; 64]);
    assert_eq!(asking.ask(&request), Err(MessageError::Header.into()));
    // The firmware has answered this number, and does not take it again.
    let refused = RequestError::Firmware(Status::INVALID_PARAM.0.into());
    assert_eq!(asking.ask(&request), Err(refused));
    let other = asking.ask(&ReportRequest::new([2; 64]));
    assert_eq!(other, Err(MessageError::Unanswered.into()));
}

/// What a host does to the page with the answer.
fn with_answers(change: impl Fn(&mut [u8]) + Send + 'static) -> Asking {
    let asking = Asking::new(builder());
    asking
        .guest
        .set_host(move |hypervisor: &Hypervisor<'_>, exit: &Exit| {
            let reply = hypervisor.honestly(exit);
            if let Exit::Ghcb { .. } = exit {
                let spa = hypervisor.behind(BUFFER + 0x1000).expect("shared");
                let mut page = hypervisor.read(spa, 0x1000).expect("the host's");
                change(&mut page);
                hypervisor.write(spa, &page).expect("the host's");
            }
            reply
        });
    asking
}

#[test]
fn an_answer_with_any_byte_changed_is_refused() {
    let used = 0x60 + 0x20 + REPORT_LEN;
    // Reserved bytes behind the tag, and around the sequence number, are not read by the cipher.
    let ignored = |at: usize| (16..0x20).contains(&at) || (0x28..0x30).contains(&at);
    for at in (0..0x60).chain((0x60..used).step_by(61)) {
        let mut asking = with_answers(move |page| page[at] ^= 0x10);
        let answer = asking.ask(&ReportRequest::new([1; 64]));
        match answer {
            Ok(report) => assert!(ignored(at) && report_data(&report) == [1; 64], "{at:#x}"),
            Err(RequestError::Message(error)) => assert!(
                matches!(
                    error,
                    MessageError::Header | MessageError::Sequence | MessageError::Authentication
                ) && !ignored(at),
                "{at:#x}: {error}"
            ),
            Err(other) => panic!("{at:#x}: {other}"),
        }
    }
    // What lies behind the message is not part of it.
    assert!(
        with_answers(move |page| page[used] ^= 1)
            .ask(&ReportRequest::new([1; 64]))
            .is_ok()
    );
}

#[test]
fn an_old_answer_is_no_answer_to_a_new_request() {
    let mut asking = Asking::new(builder());
    let mut old: Option<Vec<u8>> = None;
    asking
        .guest
        .set_host(move |hypervisor: &Hypervisor<'_>, exit: &Exit| {
            let reply = hypervisor.honestly(exit);
            if let Exit::Ghcb { .. } = exit {
                let spa = hypervisor.behind(BUFFER + 0x1000).expect("shared");
                match &old {
                    Some(old) => hypervisor.write(spa, old).expect("the host's"),
                    None => old = Some(hypervisor.read(spa, 0x1000).expect("the host's")),
                }
            }
            reply
        });
    assert!(asking.ask(&ReportRequest::new([1; 64])).is_ok());
    let replayed = asking.ask(&ReportRequest::new([1; 64]));
    assert_eq!(replayed, Err(MessageError::Sequence.into()));
}

#[test]
fn a_busy_host_gets_the_same_message_again_until_the_caller_gives_up() {
    const BUSY: u64 = 2 << 32;
    let mut asking = Asking::new(builder());
    let mut seen: Option<Vec<u8>> = None;
    let mut left = 3;
    asking.guest.set_host(
        move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
            Exit::Ghcb { gpa } if left > 0 => {
                left -= 1;
                let spa = hypervisor.behind(BUFFER).expect("shared");
                let message = hypervisor.read(spa, 0xC0).expect("the host's");
                assert_eq!(*seen.get_or_insert(message.clone()), message);
                let info2 = BUSY;
                hypervisor.answer_ghcb(
                    gpa,
                    GhcbAnswer {
                        info2,
                        ..Default::default()
                    },
                );
                Reply::Enter
            }
            _ => hypervisor.honestly(exit),
        },
    );
    let request = ReportRequest::new([1; 64]);
    let waits = Cell::new(0);
    let wait = || {
        waits.set(waits.get() + 1);
        waits.get() < 2
    };
    assert_eq!(
        asking.ask_waiting(&request, wait),
        Err(RequestError::Host(2))
    );
    assert_eq!(waits.get(), 2);
    assert!(asking.ask_waiting(&request, || true).is_ok());
}

#[test]
fn exits_that_a_host_does_not_understand_are_told() {
    let guest = builder().build().expect("a guest");
    let mut ghcb = guest.vcpu().ghcb(GHCB);
    let malformed = |reason| GhcbAnswer::malformed(reason);
    let exit = |code, info1, info2| GhcbExit {
        code,
        info1,
        info2,
        ..GhcbExit::default()
    };
    let request = exit_code::GUEST_REQUEST;
    for (exit, reason) in [
        (exit(0x72, BUFFER, BUFFER + 0x1000), 5),
        (exit(request, BUFFER, BUFFER), 5),
        (exit(request, BUFFER + 8, BUFFER + 0x1000), 5),
        (exit(request, 0x8000, BUFFER), 5),
        (exit(request, u64::MAX, BUFFER), 5),
        (
            exit(exit_code::EXTENDED_GUEST_REQUEST, BUFFER, BUFFER + 0x1000),
            4,
        ),
    ] {
        assert_eq!(ghcb.ghcb_exit(exit), malformed(reason), "{exit:x?}");
    }
    let mut page = guest.vcpu().mapping(GHCB);
    page.write(0xFFC, &[1]);
    assert_eq!(guest.hypervisor().ghcb(GHCB), None);
    // A GHCB that is private is not the host's to read.
    let stopped = guest.run(|_| guest.vcpu().ghcb(0x8000).ghcb_exit(GhcbExit::default()));
    assert_eq!(stopped.expect_err("stopped").cause, StopCause::NotShared);
    let small = GpaRange::new(BUFFER, 0x1000).expect("a page");
    let mut asking = Asking::new(builder());
    let mut memory = asking.guest.vcpu().mapping(BUFFER);
    let refused = SevGuest::new(asking.guest.vcpu().ghcb(GHCB), true).guest_request(
        &mut asking.channel,
        small,
        &mut memory,
        &ReportRequest::new([0; 64]),
        || false,
    );
    assert_eq!(refused, Err(RequestError::Buffer { bytes: 0x1000 }));
}

#[test]
fn the_last_sequence_number_is_not_used() {
    let last = u64::from(u32::MAX);
    let mut message = [0; MAX_MESSAGE];
    let request = ReportRequest::new([0; 64]);
    for (sequence, sealed) in [
        (last - 2, Ok(0xC0)),
        (last - 1, Err(MessageError::Exhausted)),
    ] {
        let mut channel = Channel::new(Aes256Gcm::new(&[1; 32]), 0, sequence);
        assert_eq!(channel.seal(&request, &mut message), sealed);
    }
}

#[test]
fn the_secrets_page_has_four_keys_and_the_numbers_of_an_earlier_stage() {
    let mut page = [0; 4096];
    for vmpl in 0..4_u8 {
        let vmpl_at = usize::from(vmpl);
        page[0x20 + 32 * vmpl_at..][..32].fill(vmpl);
        page[0xA0 + 4 * vmpl_at] = 2 * vmpl;
    }
    let secrets = Secrets::new(&page);
    // A key of zeros has been erased.
    assert_eq!(secrets.vmpck(0), None);
    assert_eq!(secrets.vmpck(3), Some(&[3; 32]));
    assert_eq!((secrets.vmpck(4), secrets.vmpck(255)), (None, None));
    assert_eq!((secrets.sequence(3), secrets.sequence(4)), (6, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_answer_of_a_host_breaks_anything_or_is_taken_for_the_firmwares(
        noise in prop::collection::vec(any::<u8>(), 0..0x600),
        header in any::<bool>(),
        info1 in prop_oneof![Just(0), any::<u64>()],
        info2 in prop_oneof![Just(0), any::<u64>()],
        rbx in any::<Option<u64>>(),
    ) {
        let mut asking = Asking::new(builder());
        asking.guest.set_host(move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
            Exit::Ghcb { gpa } => {
                let mut page = noise.clone();
                page.resize(0x1000, 0);
                if header {
                    // A header as it must be, around noise.
                    page[0x20..0x28].copy_from_slice(&2_u64.to_le_bytes());
                    page[0x30..0x38].copy_from_slice(&[1, 1, 0x60, 0, 6, 1, 0xC0, 4]);
                    page[0x38..0x60].fill(0);
                }
                let spa = hypervisor.behind(BUFFER + 0x1000).expect("shared");
                hypervisor.write(spa, &page).expect("the host's");
                hypervisor.answer_ghcb(gpa, GhcbAnswer { info1, info2, rbx });
                Reply::Enter
            }
            _ => hypervisor.honestly(exit),
        });
        let answer = asking.ask(&ReportRequest::new([1; 64]));
        prop_assert!(answer.is_err());
        if header && info1 as u32 == 0 && info2 == 0 {
            prop_assert_eq!(answer, Err(MessageError::Authentication.into()));
        }
    }
}
