//! Event logs.

use kvm_ops_attest::event_log::{Event, EventLog};
use serde_json::{Map, Value, json};

use super::Shown;
use crate::doctor::text::{finish, table};

/// Most characters of an event's data that are shown as text.
const SHOWN: usize = 60;

/// The events in their order, then the RTMRs that they replay to.
pub(super) fn of_log(log: &EventLog<'_>) -> Shown {
    let mut rows = table(&["EVENT", "REGISTER", "TYPE", "DIGEST", "DATA"]);
    for (n, event) in log.events().iter().enumerate() {
        let digest = event.sha384().map(|digest| hex::encode(&digest[..8]));
        rows.add_row([
            n.to_string(),
            register(event),
            event.kind().to_string(),
            digest.map_or_else(|| "-".to_owned(), |digest| format!("{digest}...")),
            data(event),
        ]);
    }
    let mut rtmrs = table(&["RTMR", "AFTER THESE EVENTS"]);
    for (n, value) in log.rtmrs().iter().enumerate() {
        rtmrs.add_row([format!("RTMR{n}"), hex::encode(value)]);
    }
    Shown {
        text: format!("{}\n\n{}", finish(rows), finish(rtmrs)),
        json: json_of(log),
    }
}

fn json_of(log: &EventLog<'_>) -> Map<String, Value> {
    let events = log.events().iter().map(|event| {
        json!({
            "at": event.at(),
            "register": register(event),
            "type": event.kind().to_string(),
            "type_number": event.kind().0,
            "digest": event.sha384().map(hex::encode),
            "digest_is_of_data": event.digest_is_of_data(),
            "data": hex::encode(event.data()),
        })
    });
    Map::from_iter([
        ("events".to_owned(), events.collect()),
        (
            "rtmrs".to_owned(),
            log.rtmrs().iter().map(hex::encode).collect(),
        ),
    ])
}

fn register(event: &Event<'_>) -> String {
    match event.rtmr() {
        Some(n) => format!("RTMR{n}"),
        None if event.register() == 0 => "MRTD".to_owned(),
        None => "-".to_owned(),
    }
}

/// The data in a few characters, and a warning if the digest is not of it but should be.
fn data(event: &Event<'_>) -> String {
    let shown = text(event.data()).unwrap_or_else(|| {
        let head = event.data().get(..8).unwrap_or(event.data());
        let more = if head.len() < event.data().len() {
            "..."
        } else {
            ""
        };
        format!(
            "{:#x} bytes {}{more}",
            event.data().len(),
            hex::encode(head)
        )
    });
    match event.digest_is_of_data() {
        Some(false) => format!("{shown} (the digest is not of this)"),
        _ => shown,
    }
}

/// Data that is text of one byte or two bytes a character, or the name of a UEFI variable.
fn text(data: &[u8]) -> Option<String> {
    let shown = ascii(data)
        .or_else(|| wide(data))
        .or_else(|| variable(data))?;
    Some(match shown.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{:?}...", &shown[..at]),
        None => format!("{shown:?}"),
    })
}

fn ascii(data: &[u8]) -> Option<String> {
    let data = data.strip_suffix(&[0]).unwrap_or(data);
    let is_text = data
        .iter()
        .all(|byte| matches!(byte, b' '..=b'~' | b'\n' | b'\t'));
    (is_text && !data.is_empty()).then(|| String::from_utf8_lossy(data).into_owned())
}

/// Text in UCS-2, as UEFI has it.
fn wide(data: &[u8]) -> Option<String> {
    let (pairs, []) = data.as_chunks() else {
        return None;
    };
    let bytes: Option<Vec<u8>> = pairs
        .iter()
        .map(|[low, high]| (*high == 0).then_some(*low))
        .collect();
    ascii(&bytes?)
}

/// The name in a UEFI_VARIABLE_DATA: after a GUID the lengths of name (characters) and data (bytes).
fn variable(data: &[u8]) -> Option<String> {
    let (length, rest) = data.get(16..)?.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    wide(rest.get(8..)?.get(..length.checked_mul(2)?)?)
}
