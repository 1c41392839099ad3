//! What a TD's registers hold at the end of its run, and what the event log in its memory says of them.

use kvm_ops_attest::event_log::{EventLog, RTMRS};
use serde::Serialize;

use super::event_log::{Area, find, private};
use crate::hosts::{AnyMachine, Place};
use crate::units::plural;

/// Firmware keeps its tables below this.
const FOUR_GIB: u64 = 1 << 32;

/// MRTD and RTMRs, as the software module has them.
#[derive(Serialize)]
pub(crate) struct Measured {
    mrtd: String,
    rtmr: [String; RTMRS],
    /// `None` if no table leads to one.
    event_log: Option<Found>,
}

/// The event log, and its replay.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Found {
    gpa: u64,
    /// Bytes of its area.
    bytes: usize,
    events: usize,
    /// For each RTMR: true if the events replay to it.
    replays: [bool; RTMRS],
    /// The reason why it cannot be read.
    error: Option<String>,
}

impl Found {
    fn new(area: &Area, rtmrs: &[[u8; 48]; RTMRS]) -> Self {
        let log = EventLog::from_bytes(&area.bytes);
        let replayed = log.as_ref().map(EventLog::rtmrs);
        Self {
            gpa: area.gpa,
            bytes: area.bytes.len(),
            events: log.as_ref().map_or(0, |log| log.events().len()),
            replays: std::array::from_fn(|n| {
                replayed
                    .as_ref()
                    .is_ok_and(|replayed| replayed[n] == rtmrs[n])
            }),
            error: log.err().map(|error| error.to_string()),
        }
    }
}

impl Measured {
    /// Of a machine that has run, with that much memory. `None` if it is no TD of a software platform.
    pub(crate) fn of(place: &Place, machine: &dyn AnyMachine, memory: u64) -> Option<Self> {
        let module = place.platform.as_ref()?.tdx_platform()?;
        let td = machine.tdr()?.get();
        let view = module.td(td)?;
        // Without a measurement there is nothing that a log could explain.
        let measures = view.rtmr.iter().flatten().any(|byte| *byte != 0);
        let area = measures.then(|| find(&private(module, td), memory.min(FOUR_GIB)));
        Some(Self {
            mrtd: hex::encode(view.mrtd),
            rtmr: view.rtmr.map(hex::encode),
            event_log: area.flatten().map(|area| Found::new(&area, &view.rtmr)),
        })
    }

    /// A name and a text for each RTMR, and for the log.
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        const NAMES: [&str; RTMRS] = ["RTMR0", "RTMR1", "RTMR2", "RTMR3"];
        let log = self.event_log.as_ref();
        let readable = log.filter(|log| log.error.is_none());
        let row = |(n, name): (usize, &'static str)| {
            let said = match readable.map(|log| log.replays[n]) {
                None => "",
                Some(true) => ", as the event log",
                Some(false) => ", and the event log says another",
            };
            (name, format!("{}{said}", self.rtmr[n]))
        };
        let said = match log {
            None => "none in the TD's memory".to_owned(),
            Some(Found {
                gpa,
                error: Some(error),
                ..
            }) => format!("at {gpa:#x}: {error}"),
            Some(log) => format!("{} at {:#x}", plural(log.events as u64, "event"), log.gpa),
        };
        let registers = NAMES.into_iter().enumerate().map(row);
        registers.chain([("event log", said)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use kvm_ops_attest::event_log::{EventKind, Writer};

    use super::*;

    fn measured(area: Option<&Area>, rtmrs: [[u8; 48]; RTMRS]) -> Measured {
        Measured {
            mrtd: hex::encode([0; 48]),
            rtmr: rtmrs.map(hex::encode),
            event_log: area.map(|area| Found::new(area, &rtmrs)),
        }
    }

    #[test]
    fn each_rtmr_is_told_with_what_the_log_says_of_it() {
        let mut writer = Writer::new();
        writer.measure(2, EventKind::IPL, b"quiet").unwrap();
        let mut bytes = writer.as_bytes().to_vec();
        let mut rtmrs = EventLog::from_bytes(&bytes).unwrap().rtmrs();
        bytes.resize(0x1000, 0xff);
        let gpa = 0x7f00_0000;
        // RTMR3 was extended without an entry.
        rtmrs[3] = [5; 48];
        let measured = measured(Some(&Area { gpa, bytes }), rtmrs);
        let ends = [
            ", as the event log",
            ", as the event log",
            ", as the event log",
            ", and the event log says another",
        ];
        let rows = measured.rows();
        for (row, end) in rows.iter().zip(ends) {
            assert!(row.1.ends_with(end), "{row:?}");
        }
        assert_eq!(rows[4], ("event log", "1 event at 0x7f000000".into()));
    }

    #[test]
    fn a_log_that_cannot_be_read_confirms_nothing_and_no_log_says_nothing() {
        let bytes = vec![1; 64];
        let bad = measured(Some(&Area { gpa: 0x1000, bytes }), [[0; 48]; RTMRS]);
        let found = bad.event_log.as_ref().unwrap();
        assert_eq!(found.replays, [false; RTMRS]);
        let rows = bad.rows();
        assert_eq!(rows[0].1.len(), 96);
        assert!(rows[4].1.starts_with("at 0x1000: "), "{rows:?}");
        let none = measured(None, [[1; 48]; RTMRS]).rows();
        assert_eq!(none[4].1, "none in the TD's memory");
        assert_eq!(none[0].1.len(), 96);
    }
}
