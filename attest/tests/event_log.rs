//! Event logs of TDs: one of hardware, and what a writer wrote.

use kvm_ops_attest::event_log::{EventKind, EventLog, LogError, MAX_EVENTS, MAX_LOG, Writer};
use proptest::prelude::*;
use sha2::{Digest, Sha384};

/// The log of a Container-Optimized OS 113 in a TD of Google Cloud, with the RTMRs that the TD had
/// then. Both are test data of google/go-eventlog (Apache-2.0).
const COS: &[u8] = include_bytes!("data/ccel_cos_113.bin");
const COS_RTMRS: [&str; 4] = [
    "a4de2df23e9611299123ba4359c42a5e578b0f8488bf1bba8ef5606d9ea5d81c97c064b482a5eac537d166bd0f0f752d",
    "0ee9366c928a77092f55e9e114c7394181fd264699155f0df77d23577618d5f650568a17d379355a07bd846e552f4e20",
    "4969684dc87381fc3b3134176c8d8806eaf0a901859f5f70cfae8d17714b46c10a8de219048c9fc09f11f381a6fbe7c1",
    // Nothing is measured into it.
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
];

#[test]
fn the_log_of_a_td_on_hardware_replays_to_its_rtmrs() {
    let log = EventLog::from_bytes(COS).unwrap();
    assert_eq!(log.rtmrs().map(hex::encode), COS_RTMRS);
    assert_eq!(log.events().len(), 43);
    for event in log.events() {
        assert!(event.kind().name().is_some(), "{event:?}");
        assert_ne!(event.digest_is_of_data(), Some(false), "{event:?}");
    }
}

#[test]
fn every_byte_of_a_digest_counts_and_no_byte_of_a_log_makes_a_panic() {
    let good = EventLog::from_bytes(COS).unwrap().rtmrs();
    let last = EventLog::from_bytes(COS)
        .unwrap()
        .events()
        .last()
        .unwrap()
        .at();
    let mut changed = COS.to_vec();
    for at in 0..COS.len() {
        changed[at] ^= 0x80;
        // It is refused, or replays to something; a digest's byte changes the RTMRs.
        let _ = EventLog::from_bytes(&changed);
        changed[at] ^= 0x80;
    }
    let log = EventLog::from_bytes(COS).unwrap();
    for event in log.events() {
        let Some(digest) = event.sha384().filter(|_| event.rtmr().is_some()) else {
            continue;
        };
        let from = COS[event.at()..]
            .windows(48)
            .position(|bytes| bytes == digest);
        let at = event.at() + from.unwrap();
        changed[at + 47] ^= 1;
        let rtmrs = EventLog::from_bytes(&changed).map(|log| log.rtmrs());
        assert_ne!(
            rtmrs,
            Ok(good),
            "the event at {:#x} of {last:#x}",
            event.at()
        );
        changed[at + 47] ^= 1;
    }
}

#[test]
fn a_log_cut_anywhere_is_refused_or_ends_at_an_event() {
    let log = EventLog::from_bytes(COS).unwrap();
    let ends: Vec<usize> = log.events().iter().map(|event| event.at()).collect();
    for length in 0..COS.len() {
        match EventLog::from_bytes(&COS[..length]) {
            Ok(_) => assert!(ends.contains(&length), "{length:#x}"),
            Err(error) => {
                assert!(
                    matches!(error, LogError::Cut(_) | LogError::Header),
                    "{error}"
                );
                assert!(!ends.contains(&length), "{length:#x}: {error}");
            }
        }
    }
}

#[test]
fn the_unused_memory_behind_a_log_is_no_event() {
    let events = EventLog::from_bytes(COS).unwrap();
    for filling in [0, 0xff] {
        let mut padded = COS.to_vec();
        padded.resize(0x4_0000, filling);
        assert_eq!(
            EventLog::from_bytes(&padded).unwrap().rtmrs(),
            events.rtmrs()
        );
        *padded.last_mut().unwrap() = 1;
        assert!(EventLog::from_bytes(&padded).is_err());
    }
}

#[test]
fn limits_hold_for_reading_and_writing() {
    let mut writer = Writer::new();
    assert_eq!(
        writer.measure(4, EventKind::IPL, b""),
        Err(LogError::Rtmr(4))
    );
    let huge = vec![0; MAX_LOG];
    assert!(matches!(
        writer.measure(0, EventKind::IPL, &huge),
        Err(LogError::TooLong(_))
    ));
    assert_eq!(
        EventLog::from_bytes(&[0; MAX_LOG + 1]),
        Err(LogError::TooLong(MAX_LOG + 1))
    );
    for _ in 0..=MAX_EVENTS {
        writer.measure(3, EventKind::IPL, b"").unwrap();
    }
    assert_eq!(
        EventLog::from_bytes(writer.as_bytes()),
        Err(LogError::TooMany)
    );
}

#[test]
fn headers_and_digests_that_do_not_fit_are_refused_by_name() {
    let mut writer = Writer::new();
    writer.measure(0, EventKind::SEPARATOR, &[0; 4]).unwrap();
    let good = writer.as_bytes().to_vec();
    let header = 65;
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        EventLog::from_bytes(&bytes).err()
    };
    let table = [
        // The header: its type, its signature, its number of algorithms, the algorithm.
        (4, 4, Some(LogError::Header)),
        (32, b'X', Some(LogError::Header)),
        (56, 9, Some(LogError::Header)),
        (60, 0xb, Some(LogError::NoSha384)),
        // The event: its register, its number of digests, the algorithm of the digest.
        (
            header,
            5,
            Some(LogError::Register {
                at: header,
                register: 5,
            }),
        ),
        (header + 8, 0, Some(LogError::Digest(header))),
        (
            header + 12,
            0xb,
            Some(LogError::Algorithm {
                at: header,
                algorithm: 0xb,
            }),
        ),
        // The length of its data.
        (header + 62, 5, Some(LogError::Cut(header))),
        // Its data, which the digest is not of any more, but which is not measured itself.
        (header + 66, 1, None),
    ];
    for (at, byte, error) in table {
        assert_eq!(changed(at, byte), error, "{at}");
    }
    let mut twice = good.clone();
    twice[header + 8] = 2;
    let digest = good[header + 12..header + 62].to_vec();
    twice.splice(header + 62..header + 62, digest);
    assert_eq!(EventLog::from_bytes(&twice), Err(LogError::Digest(header)));
}

#[test]
fn notes_and_events_of_mrtd_extend_no_rtmr() {
    let mut writer = Writer::new();
    writer.measure(0, EventKind::NO_ACTION, b"a note").unwrap();
    let log = EventLog::from_bytes(writer.as_bytes()).unwrap();
    assert_eq!(
        (log.events()[0].rtmr(), log.events()[0].sha384()),
        (None, None)
    );
    assert_eq!(log.rtmrs(), [[0; 48]; 4]);
    let mut writer = Writer::new();
    writer.measure(0, EventKind::SEPARATOR, &[0; 4]).unwrap();
    let mut of_mrtd = writer.as_bytes().to_vec();
    of_mrtd[65] = 0;
    let log = EventLog::from_bytes(&of_mrtd).unwrap();
    assert_eq!(
        (log.events()[0].register(), log.events()[0].rtmr()),
        (0, None)
    );
    assert_eq!(log.rtmrs(), [[0; 48]; 4]);
}

proptest! {
    /// The replay of the module (TDG.MR.RTMR.EXTEND), in other words.
    #[test]
    fn what_is_written_is_read_and_replays(
        events in prop::collection::vec((0..4_usize, 0_u32..16, prop::collection::vec(any::<u8>(), 0..80)), 0..20)
    ) {
        let mut writer = Writer::new();
        let mut rtmrs = [[0_u8; 48]; 4];
        for (rtmr, kind, data) in &events {
            let digest = writer.measure(*rtmr, EventKind(*kind), data).unwrap();
            prop_assert_eq!(digest, <[u8; 48]>::from(Sha384::digest(data)));
            if *kind != EventKind::NO_ACTION.0 {
                rtmrs[*rtmr] = Sha384::digest([rtmrs[*rtmr], digest].concat()).into();
            }
        }
        let log = EventLog::from_bytes(writer.as_bytes()).unwrap();
        prop_assert_eq!(log.rtmrs(), rtmrs);
        prop_assert!(EventLog::is_log(writer.as_bytes()));
        for (event, (rtmr, kind, data)) in log.events().iter().zip(&events) {
            prop_assert_eq!(event.register() as usize, rtmr + 1);
            prop_assert_eq!(event.kind(), EventKind(*kind));
            prop_assert_eq!(event.data(), data.as_slice());
        }
    }

    #[test]
    fn no_bytes_make_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let header = Writer::new();
        let _ = EventLog::from_bytes(&bytes);
        let _ = EventLog::from_bytes(&[header.as_bytes(), &bytes].concat());
    }
}
